"""Visual compute: what is spent on visual tokens, as a share of what the full model spends on them.

Shape letters: B samples, L decoder layers.
"""

from __future__ import annotations

from torch import Tensor


def visual_compute(exit_layers_B: Tensor, num_visual_B: Tensor, num_layers: int) -> float:
    """Share of the full model's layer passes of visual tokens: sum n_i k_i / (L sum n_i).

    Parameters
    ----------
    exit_layers_B : (B,) exit layers k, 0..L; -1 for a row without an image.
    num_visual_B : (B,) visual tokens n.
    num_layers : L.

    Returns
    -------
    float
        Rows without an image are left out; nan if no row is left.
    """
    has_image_B = exit_layers_B >= 0
    num_visual_B = num_visual_B[has_image_B].double()
    spent = (num_visual_B * exit_layers_B[has_image_B].double()).sum()
    full = num_layers * num_visual_B.sum()
    return float(spent / full) if full > 0 else float("nan")
