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
from dyvte.calibration.path import Labels, at_pairs, traced_pairs
from dyvte.costs.schedules import schedule_compute
from dyvte.gates import Schedules

ORACLE_LAMS = tuple(float(x) for x in np.geomspace(1e-4, 30.0, 41))
"""Prices of the oracle's curve."""


def oracle_exits(risk_BL1: Tensor, lam: float) -> Tensor:
    """(B,) argmin over k in 1..L of risk_k + lam * k / L, ties to the smaller k.

    Parameters
    ----------
    risk_BL1
        (B, L+1) in nats.
    lam
        Price of the visual compute.
    """
    num_layers = risk_BL1.shape[1] - 1
    price_L = lam * torch.arange(1, num_layers + 1, dtype=torch.float64) / num_layers
    cost_BL = risk_BL1[:, 1:].double() + price_L
    return cost_BL.nan_to_num(nan=math.inf).argmin(1) + 1  # nan: no label there, so no choice either


def oracle_points(
    risk_BL1: Tensor, num_visual_B: Tensor, lams: Sequence[float] = ORACLE_LAMS
) -> OperatingPoints:
    """oracle(lambda) over falling lambda: rising compute.

    Parameters
    ----------
    risk_BL1
        (B, L+1) in nats.
    num_visual_B
        (B,) visual tokens.
    lams
        Prices.
    """
    lams = sorted(lams, reverse=True)
    exits_SB = torch.stack([oracle_exits(risk_BL1, lam) for lam in lams])
    return OperatingPoints("oracle", tuple(lams), exits_SB, num_visual_B, risk_BL1.shape[1] - 1)


def schedule_oracle_points(
    risk: Labels, num_visual_B: Tensor, kv_share: float, lams: Sequence[float] = ORACLE_LAMS
) -> OperatingPoints:
    """oracle(lambda) over all traced schedules (f, k) with k >= 1, falling lambda: rising compute.

    Parameters
    ----------
    risk
        In nats, of every traced schedule.
    num_visual_B
        (B,) visual tokens.
    kv_share
        FLOPs of a frozen token's keys and values, as a share of its layer's.
    lams
        Prices.
    """
    num_layers = risk.values_BGL1.shape[2] - 1
    pairs, lams = traced_pairs(num_layers, risk.freeze_layers), sorted(lams, reverse=True)
    chosen_S = cheapest_at_prices(at_pairs(risk, pairs), pairs, num_layers, kv_share, lams)
    return OperatingPoints.of_schedules("schedule oracle", lams, chosen_S, num_visual_B, num_layers, kv_share)


def first_safe_schedule(same_answer: Labels, kv_share: float) -> Schedules:
    """The cheapest traced (f, k), k >= 1, from which on every later freeze and exit gives the full model's
    answer.

    Parameters
    ----------
    same_answer
        1 or 0, of every traced schedule.
    kv_share
        FLOPs of a frozen token's keys and values, as a share of its layer's.
    """
    num_layers = same_answer.values_BGL1.shape[2] - 1
    pairs = traced_pairs(num_layers, same_answer.freeze_layers)
    known_M = ~at_pairs(same_answer, pairs).isnan().any(0)
    pairs = [pair for pair, known in zip(pairs, known_M.tolist(), strict=True) if known]
    right_BM, pairs_M2 = at_pairs(same_answer, pairs) == 1, torch.tensor(pairs)
    # later_MM[i, j]: schedule j updates and reads at least as long as schedule i.
    later_MM = (pairs_M2[None] >= pairs_M2[:, None]).all(-1)
    unsafe_BM = (~right_BM).float() @ later_MM.float().T
    return cheapest_at_prices(unsafe_BM.sign().double(), pairs, num_layers, kv_share, [0.5])[0]


def cheapest_at_prices(
    loss_BM: Tensor,
    pairs: Sequence[tuple[int, int]],
    num_layers: int,
    kv_share: float,
    lams: Sequence[float],
) -> list[Schedules]:
    """For each price the schedule of least loss + lam * visual compute, of equal ones the cheapest.

    Parameters
    ----------
    loss_BM : (B, M) float64 losses, nan where none is known: never taken.
    pairs : the M schedules (f, k).
    num_layers, kv_share : L, and r of `dyvte.costs.schedules`.
    lams : prices.
    """
    pairs_M2 = torch.tensor(pairs)
    cost_M = schedule_compute(*pairs_M2.double().unbind(1), num_layers, kv_share)
    order = cost_M.argsort(stable=True)  # argmin takes the first of equal ones
    loss_BM = loss_BM[:, order].nan_to_num(nan=math.inf)
    return [Schedules(*pairs_M2[order][(loss_BM + lam * cost_M[order]).argmin(1)].unbind(1)) for lam in lams]


def first_safe_layer(same_answer_BL1: Tensor) -> Tensor:
    """(B,) smallest labelled k >= 1 such that every labelled exit from k on gives the full model's answer."""
    exits_E = (~same_answer_BL1.isnan().any(0)).nonzero().flatten()
    exits_E = exits_E[exits_E > 0]
    safe_BE = same_answer_BL1[:, exits_E].flip(1).cumprod(1)
    return exits_E[len(exits_E) - safe_BE.sum(1).long()]


def within_wording_share(exits_B: Tensor, questions: Sequence[str]) -> float:
    """Share of the exit layers' variance that lies within identical wordings; nan without any variance.

    Deviations within a wording asked n times are scaled by n / (n - 1), since its own mean is fitted to it.
    Wordings asked once cannot tell and are excluded from both sums.

    Parameters
    ----------
    exits_B
        (B,) exit layers.
    questions
        Their wordings.
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
