"""P-values for "the mean loss exceeds alpha", from independent losses in [0, 1].

Both are valid for any distribution on [0, 1], at any n. Shapes: (..., I, G) losses of I images at G
thresholds, with any number of leading dimensions; p-values are (..., G).
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

PValue = Callable[[Tensor, float, float], Tensor]


def bentkus(losses_IG: Tensor, alpha: float, delta: float) -> Tensor:
    """e P(Binomial(I, alpha) <= ceil(sum of losses)), Bentkus 2004; ``delta`` is not used.

    Parameters
    ----------
    losses_IG
        (I, G) in [0, 1], of I images at G thresholds.
    alpha
        Bound on the mean loss.
    delta
        Chance of being wrong.
    """
    num_images = losses_IG.shape[-2]
    # A sum that should be whole may come out as 3.0000002; its ceiling must stay 3.
    totals_G = (losses_IG.double().sum(-2) - 1e-9).ceil().clamp(0, num_images).long()
    return (math.e * _binomial_cdf(num_images, alpha)[totals_G]).clamp(max=1.0)


def betting(losses_IG: Tensor, alpha: float, delta: float) -> Tensor:
    """One over the largest wealth of a bettor against the hypothesis (Waudby-Smith and Ramdas 2024).

    Each image in turn is bet on with a stake that depends on the images before it only; under the hypothesis
    the wealth is a supermartingale, so Ville's inequality makes the reciprocal of its maximum a p-value.
    ``delta`` only tunes the stakes. Sharper than :func:`bentkus` where losses are means of several questions.

    Parameters
    ----------
    losses_IG
        (I, G) in [0, 1], of I images at G thresholds.
    alpha
        Bound on the mean loss.
    delta
        Chance of being wrong.
    """
    losses_IG = losses_IG.double()
    num_images = losses_IG.shape[-2]
    count_I1 = torch.arange(1, num_images + 1, dtype=torch.float64, device=losses_IG.device)[:, None]
    mean_IG = (0.5 + losses_IG.cumsum(-2)) / (count_I1 + 1)
    variance_IG = (0.25 + (losses_IG - mean_IG).square().cumsum(-2)) / (count_I1 + 1)
    start_1G = torch.full_like(variance_IG[..., :1, :], 0.25)
    variance_before_IG = torch.cat((start_1G, variance_IG[..., :-1, :]), dim=-2)
    stake_IG = (2 * math.log(1 / delta) / (num_images * variance_before_IG)).sqrt().clamp(max=1.0)
    log_wealth_IG = torch.log1p(-stake_IG * (losses_IG - alpha)).cumsum(-2)
    return (-log_wealth_IG.amax(-2)).exp().clamp(max=1.0)


P_VALUES: dict[str, PValue] = {"betting": betting, "bentkus": bentkus}


def smallest_alpha(num_images: int, delta: float, p_value: PValue) -> float:
    """Smallest alpha that ``num_images`` images without any loss would certify; 1.0 if none.

    Parameters
    ----------
    num_images
        I.
    delta
        Chance of being wrong.
    p_value
        `bentkus` or `betting`.
    """
    clean_I1 = torch.zeros(num_images, 1, dtype=torch.float64)
    low, high = 0.0, 1.0
    for _ in range(40):
        middle = (low + high) / 2
        if float(p_value(clean_I1, middle, delta)) <= delta:
            high = middle
        else:
            low = middle
    return high


def images_needed(alpha: float, delta: float, p_value: PValue, most: int = 100_000) -> int | None:
    """Fewest images that certify ``alpha`` where none has any loss; None if more than ``most``.

    Parameters
    ----------
    alpha
        The bound.
    delta
        Chance of being wrong.
    p_value
        `bentkus` or `betting`.
    most
        Where to stop looking.
    """

    def certify(num_images: int) -> bool:
        clean_I1 = torch.zeros(num_images, 1, dtype=torch.float64)
        return float(p_value(clean_I1, alpha, delta)) <= delta

    if not certify(most):
        return None
    low, high = 0, most
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if certify(middle) else (middle, high)
    return high


def _binomial_cdf(n: int, probability: float) -> Tensor:
    """(n+1,) float64 P(X <= m)."""
    successes = torch.arange(n + 1, dtype=torch.float64)
    log_pmf = (
        math.lgamma(n + 1)
        - torch.lgamma(successes + 1)
        - torch.lgamma(n - successes + 1)
        + torch.xlogy(successes, torch.tensor(probability, dtype=torch.float64))
        + torch.xlogy(n - successes, torch.tensor(1 - probability, dtype=torch.float64))
    )
    return log_pmf.exp().cumsum(0).clamp(max=1.0)
