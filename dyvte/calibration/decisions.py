"""What a set of exit decisions costs and keeps.

Shape letters: B samples, L decoder layers.
"""

from __future__ import annotations

import torch
from torch import Tensor


def visual_compute(exit_layers_B: Tensor, num_visual_B: Tensor, num_layers: int) -> float:
    """Share of the full model's layer passes of visual tokens: sum n_i k_i / (L sum n_i).

    Rows without an image (exit layer -1) are left out; nan if no row is left.
    """
    has_image_B = exit_layers_B >= 0
    num_visual_B = num_visual_B[has_image_B].double()
    spent = (num_visual_B * exit_layers_B[has_image_B].double()).sum()
    full = num_layers * num_visual_B.sum()
    return float(spent / full) if full > 0 else float("nan")


def at_exit(values_BL1: Tensor, exit_layers_B: Tensor) -> Tensor:
    """(B,) entries of a trace's (B, L+1) column at each row's exit layer; nan where the row has no image."""
    has_image_B = exit_layers_B >= 0
    values_B = values_BL1.gather(1, exit_layers_B.clamp(min=0)[:, None]).squeeze(1).float()
    return torch.where(has_image_B, values_B, torch.full_like(values_B, float("nan")))
