"""What reductions do, as one line; gates and thresholds made with others than are used are noticed."""

from __future__ import annotations

import warnings
from collections.abc import Sequence

from dyvte.gates import GateConfig
from dyvte.reductions.base import Reduction

NO_REDUCTION = "none"


def identity(reductions: Sequence[Reduction]) -> str:
    """All that reductions do, in one line that can be compared; ``none`` without any.

    Parameters
    ----------
    reductions
        In any order: the line is the same.
    """
    return "+".join(sorted(map(repr, reductions))) or NO_REDUCTION


def warn_of_others(config: GateConfig, reductions: Sequence[Reduction], *, as_calibrated: bool) -> None:
    """Warn where gates read another model than they learned from, or a calibration's promise does not hold.

    Gates that learned without reductions are often used with one (DyVTE's Table 5): that is said only of a
    calibrated threshold.

    Parameters
    ----------
    config
        Of the gates; its records say which reductions they learned and were calibrated with.
    reductions
        In force now.
    as_calibrated
        The threshold in force is the stored one.
    """
    have = identity(reductions)
    learned = _same_order(config.training.get("trace", {}).get("reductions", NO_REDUCTION))
    if learned not in (NO_REDUCTION, have):
        warnings.warn(
            f"these gates learned from a backbone reduced by {learned}, and are used with {have}: they read "
            "other states than they know; use them as they learned, or train gates for these reductions",
            stacklevel=3,
        )
        return
    if not as_calibrated or "kind" not in config.calibration:
        return
    calibrated = calibrated_with(config)
    if calibrated != have:
        warnings.warn(
            f"the threshold of these gates was calibrated with reductions: {calibrated}, and is used with "
            f"{have}: its {config.calibration['kind']} may be another; calibrate on traces with the same "
            "reductions (dyvte trace --reduction), or choose a threshold with dyvte search-plan",
            stacklevel=3,
        )


def calibrated_with(config: GateConfig) -> str:
    """The reductions that gates were calibrated with, as `identity` has them.

    Parameters
    ----------
    config
        Of the gates.
    """
    return _same_order(config.calibration.get("reductions", NO_REDUCTION))


def _same_order(text: str) -> str:
    return "+".join(sorted(text.split("+")))
