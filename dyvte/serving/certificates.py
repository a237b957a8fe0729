"""What calibration proved of the schedule that an answer had, or why nothing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from dyvte.calibration.pvalues import betting, images_needed
from dyvte.gates import UNLIKE, GateConfig
from dyvte.policies import LearnedPolicy
from dyvte.reductions import Reduction
from dyvte.reductions.identity import calibrated_with, identity

_DELTA = 0.1
"""The chance that a bound fails, as ``dyvte calibrate`` has it where nothing else is said."""
BY_GROUP = "risk by group"
"""Kind of a calibration that has thresholds by group."""
_STAYS = "the image stays in all layers"


@dataclass(frozen=True)
class Certificate:
    """A bound on the risk that calibration proved: mean loss at most ``alpha`` with probability 1 - ``delta``
    over the draw of the calibration images, for gates at these thresholds; of questions that are told to be
    of ``group``, where it is a group's."""

    alpha: float
    delta: float
    loss: str
    threshold: float
    freeze_threshold: float | None = None
    group: str | None = None


@dataclass(frozen=True)
class Proof:
    """What was proved of an answer's schedule; where nothing was, the reason.

    Both are None of a schedule without gates, of which nothing is ever proved.
    """

    certificate: Certificate | None = None
    reason: str | None = None


class Proofs:
    """What a gates checkpoint's calibration proved, as far as it holds with these reductions.

    Parameters
    ----------
    config
        Of the gates.
    reductions
        In force.
    """

    def __init__(self, config: GateConfig, reductions: Sequence[Reduction] = ()) -> None:
        self.config, self.record = config, config.calibration
        have, calibrated = identity(reductions), calibrated_with(config)
        self._voided = None
        if "kind" in self.record and have != calibrated:
            self._voided = (
                f"these gates were calibrated with reductions {calibrated}, and are used with {have}, of "
                "which nothing is certified"
            )
        self.certificates = () if self._voided else certificates_of(config)
        """Of one threshold for all questions, the strictest bound first."""

    def of(self, policy: LearnedPolicy) -> Proof:
        """Of gates that have one threshold for all questions."""
        config = self.config
        if self._voided:
            return Proof(reason=self._voided)
        if (policy.min_layer, policy.fallback) != (config.min_layer, config.fallback):
            return Proof(reason="these gates are used with another min_layer or fallback than calibrated")
        used = (policy.threshold, policy.freeze_threshold)
        for one in self.certificates:
            if (one.threshold, one.freeze_threshold) == used:
                return Proof(one)
        if self.certificates:
            return Proof(reason=f"nothing is certified at threshold {policy.threshold:g}")
        return Proof(reason=self.lacking)

    @property
    def lacking(self) -> str:
        """Why there is no certificate at all."""
        record = self.record
        if record.get("kind") == "risk":
            return (
                f"no threshold of these gates is certified at {record['alpha']:g}; "
                f"{record.get('num_images')} images could certify {record.get('smallest_alpha'):.4g} at best"
            )
        return "these gates have no certificate"

    @property
    def group_alpha(self) -> float | None:
        """The bound that holds in every certified group, and so for any mix of them; None: there is none."""
        if self._voided or not any(self._group(at).certificate for at in range(self._num_groups)):
            return None
        return float(self.record["alpha"])

    def of_group(self, group: int) -> Proof:
        """Of a question that is decided by the thresholds of its group.

        Parameters
        ----------
        group
            Its index, as `dyvte.gates.FoundGroups` has it.
        """
        if self._voided:
            return Proof(reason=self._voided)
        if group >= 0:
            return self._group(group)
        if group == UNLIKE:
            return Proof(reason=f"the question is like none of the calibrated groups: {_STAYS}")
        return Proof(reason=f"there is no text after the image to tell the question's group by: {_STAYS}")

    def refusal(self, bound: float) -> str:
        """Why nothing can be had at this bound, and what can."""
        if self._voided:
            return self._voided
        if self.group_alpha is not None:
            proofs = [self._group(at).certificate for at in range(self._num_groups)]
            named = [one for one in proofs if one is not None]
            return (
                f"these gates are certified at {self.group_alpha:g} by group (loss {named[0].loss}, delta "
                f"{named[0].delta:g}: {', '.join(str(one.group) for one in named)}); ask for no less, or "
                "calibrate them with a smaller --alpha"
            )
        if known := self.certificates:
            shown = ", ".join(f"{one.alpha:g}" for one in known)
            return (
                f"these gates are certified at {shown} (loss {known[0].loss}, delta {known[0].delta:g}); ask "
                "for no less, or calibrate them with a smaller --alpha"
            )
        if self.record.get("kind") in ("risk", BY_GROUP):
            return self.lacking if self._num_groups == 0 else self._no_group
        needed = images_needed(bound, _DELTA, betting)
        images = "more than 100000" if needed is None else f"at least {needed}"
        return (
            f"{self.lacking}; dyvte calibrate --alpha {bound:g} makes one where it is shown {images} images "
            f"and no answer changes (delta {_DELTA:g}); more images where some do"
        )

    @property
    def _num_groups(self) -> int:
        return 0 if self.config.groups is None else len(self.config.groups.names)

    @property
    def _no_group(self) -> str:
        best = [one["smallest_alpha"] for one in self.record.get("groups", ()) if "smallest_alpha" in one]
        least = f"; their images could certify {min(best):.4g} at best" if best else ""
        return f"no group of these gates is certified at {self.record['alpha']:g}{least}"

    def _group(self, group: int) -> Proof:
        groups, record = self.config.groups, self.record
        name = groups.names[group]
        known = {one.get("name"): one for one in record.get("groups", ())}
        if name not in known or record.get("kind") != BY_GROUP:
            return Proof(reason=f"there is no record of how group {name} was calibrated")
        if not known[name]["certified"]:
            best = known[name].get("smallest_alpha")
            could = "none of its questions was tested"
            if best is not None:
                could = f"{known[name]['num_images']} images could certify {best:.3g} at best"
            return Proof(reason=f"group {name} is not certified at {record['alpha']:g} ({could}): {_STAYS}")
        # With all bounds to hold together, each was tested at its part of delta.
        delta = record["delta"] / (len(groups.names) if record.get("joint") else 1)
        thresholds = groups.of(name)
        return Proof(Certificate(record["alpha"], delta, str(record.get("loss")), *thresholds, group=name))


def certificates_of(config: GateConfig) -> tuple[Certificate, ...]:
    """What calibration proved of one threshold for all questions, the strictest bound first."""
    record = config.calibration
    found = [Certificate(**one) for one in record.get("bounds", ())]
    whole: dict[str, Any] = record if record.get("kind") == "risk" else record.get("one_threshold", {})
    if whole.get("certified"):
        own = (whole["alpha"], whole["delta"], str(record.get("loss")))
        found.append(Certificate(*own, config.threshold, config.rule_freeze_threshold))
    by_alpha = {one.alpha: one for one in found}
    return tuple(by_alpha[alpha] for alpha in sorted(by_alpha))
