"""What knows the outcome: the bound that no rule beats, and how much of it the wording of a question tells.

Shape letters: B samples, L decoder layers.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from dyvte.calibration.operating_points import OperatingPoints

ORACLE_LAMS = tuple(float(x) for x in np.geomspace(1e-4, 30.0, 41))
"""Prices of the oracle's curve."""


def oracle_exits(risk_BL1: Tensor, lam: float) -> Tensor:
    """(B,) argmin over k in 1..L of risk_k + lam * k / L, ties to the smaller k."""
    num_layers = risk_BL1.shape[1] - 1
    price_L = lam * torch.arange(1, num_layers + 1, dtype=torch.float64) / num_layers
    cost_BL = risk_BL1[:, 1:].double() + price_L
    return cost_BL.nan_to_num(nan=math.inf).argmin(1) + 1  # nan: no label there, so no choice either


def oracle_points(
    risk_BL1: Tensor, num_visual_B: Tensor, lams: Sequence[float] = ORACLE_LAMS
) -> OperatingPoints:
    """oracle(lambda) over falling lambda: rising compute."""
    lams = sorted(lams, reverse=True)
    exits_SB = torch.stack([oracle_exits(risk_BL1, lam) for lam in lams])
    return OperatingPoints("oracle", tuple(lams), exits_SB, num_visual_B, risk_BL1.shape[1] - 1)


def first_safe_layer(same_answer_BL1: Tensor) -> Tensor:
    """(B,) smallest k >= 1 such that every exit from k on gives the full model's answer."""
    safe_BL = same_answer_BL1[:, 1:].flip(1).cumprod(1).flip(1)
    return same_answer_BL1.shape[1] - safe_BL.sum(1).long()


def within_wording_share(exits_B: Tensor, questions: Sequence[str]) -> float:
    """Share of the exit layers' variance that lies within identical wordings; nan without any variance.

    Deviations within a wording asked n times are scaled by n / (n - 1), since its own mean is fitted to it.
    Wordings asked once cannot tell and are excluded from both sums.
    """
    groups: dict[str, list[float]] = {}
    for k, question in zip(exits_B.tolist(), questions, strict=True):
        groups.setdefault(question, []).append(float(k))
    repeated = [np.array(ks) for ks in groups.values() if len(ks) > 1]
    if not repeated:
        return float("nan")
    within = sum(ks.var(ddof=1) * len(ks) for ks in repeated)
    total = np.concatenate(repeated).var() * sum(map(len, repeated))
    return min(1.0, float(within / total)) if total > 0 else float("nan")
