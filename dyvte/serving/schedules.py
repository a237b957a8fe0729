"""Which schedule answers a request: the server's own, or the one that the request asks for."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from dyvte.backbones import Backbone
from dyvte.calibration.apply import follow_path
from dyvte.calibration.pvalues import betting, images_needed
from dyvte.errors import ConfigError, DyvteError
from dyvte.gates import GateConfig
from dyvte.policies import (
    POLICIES,
    LearnedPolicy,
    NeverPolicy,
    OraclePolicy,
    Policy,
    parse_policy,
)
from dyvte.runtime.frozen import check_can_freeze
from dyvte.serving.errors import RequestError

_DELTA = 0.1
"""The chance that a bound fails, as ``dyvte calibrate`` has it where nothing else is said."""

WISHES = ("policy", "threshold", "max_risk", "budget")


@dataclass(frozen=True)
class Certificate:
    """A bound on the risk that calibration proved: mean loss at most ``alpha`` with probability 1 - ``delta``
    over the draw of the calibration images, for gates at these thresholds."""

    alpha: float
    delta: float
    loss: str
    threshold: float
    freeze_threshold: float | None = None


@dataclass(frozen=True)
class ScheduleWish:
    """What a request says of its schedule; at most one of the four, and a threshold also with gates.

    Attributes
    ----------
    policy
        ``never``, ``fixed:K``, ``freeze:F[:K]``, ``random:...`` or ``gates``.
    threshold
        Of the server's gates, 0..1.
    max_risk
        Largest certified alpha.
    budget
        Largest mean visual compute on the calibration samples, as a share of the full model's.
    """

    policy: str | None = None
    threshold: float | None = None
    max_risk: float | None = None
    budget: float | None = None

    def __post_init__(self) -> None:
        given = [name for name in WISHES if getattr(self, name) is not None]
        if len(given) > 1 and not (given == ["policy", "threshold"] and self.policy == "gates"):
            raise RequestError(
                f"visual_exit: {' and '.join(given)} are given; expected one of {', '.join(WISHES)} "
                "(or a threshold with policy gates)",
                param="visual_exit",
            )


@dataclass(frozen=True)
class ServedSchedule:
    """A policy, its short name, and what was proved of it."""

    policy: Policy
    text: str
    certificate: Certificate | None = None


class ScheduleMenu:
    """The schedules that a backbone's requests can have.

    Parameters
    ----------
    policy
        Command line form of the one that answers where a request says nothing.
    gates
        Folder of gates that requests may ask for where ``policy`` is another.
    backbone
        The model that answers.

    Raises
    ------
    DyvteError
        If a policy or the gates do not fit the backbone, or cannot be used by requests.
    """

    def __init__(self, policy: str, gates: str | None, backbone: Backbone) -> None:
        self.backbone = backbone
        own = parse_policy(policy)
        if isinstance(own, OraclePolicy):
            raise ConfigError(
                f"policy {policy}: it names samples beforehand, and a question that is asked has no such id; "
                f"use one of {', '.join(usage for usage in POLICIES.usages() if usage != OraclePolicy.usage)}"
            )
        self.gates: LearnedPolicy | None = own if isinstance(own, LearnedPolicy) else None
        if gates is not None and self.gates is not None:
            raise ConfigError(f"gates {gates}: the policy {policy} has gates already; give one of both")
        if gates is not None:
            named = parse_policy(f"gates:{gates}")
            if not isinstance(named, LearnedPolicy):
                raise ConfigError(f"{gates} describes a fixed exit, and holds no gates: use it as --policy")
            self.gates = named
        for one in (own, self.gates):
            if one is not None:
                self._check(one)
        text = policy if self.gates is not own else _gates_text(self.gates.threshold)
        self.own = ServedSchedule(own, text, self._certificate(own))
        self._made: dict[ScheduleWish, ServedSchedule] = {ScheduleWish(): self.own}

    @property
    def certificates(self) -> tuple[Certificate, ...]:
        """What calibration proved of the gates, the strictest bound first."""
        return () if self.gates is None else certificates_of(self.gates.gates.config)

    def choose(self, wish: ScheduleWish) -> ServedSchedule:
        """The schedule that a request asks for; equal wishes get one and the same.

        Raises
        ------
        RequestError
            If it does not fit the backbone, needs gates or a certificate that are not there, or names files.
        """
        if wish not in self._made:
            if len(self._made) >= 1024:  # thresholds are numbers: there is no end to them
                self._made = {ScheduleWish(): self.own}
            self._made[wish] = self._make(wish)
        return self._made[wish]

    def _make(self, wish: ScheduleWish) -> ServedSchedule:
        if wish.max_risk is not None:
            return self._at_risk(wish.max_risk)
        if wish.budget is not None:
            return self._at_budget(wish.budget)
        if wish.threshold is not None or wish.policy == "gates":
            return self._gated(wish.threshold, "policy" if wish.threshold is None else "threshold")
        text = str(wish.policy)
        if text.partition(":")[0] in (LearnedPolicy.name, OraclePolicy.name):
            raise RequestError(
                f"visual_exit.policy {text!r}: a request cannot name files of the server; expected never, "
                "fixed:K, freeze:F[:K], or gates (those that the server was started with)",
                param="visual_exit.policy",
            )
        try:
            policy = parse_policy(text)
            self._check(policy)
        except DyvteError as error:
            raise RequestError(f"visual_exit.policy: {error}", param="visual_exit.policy") from error
        return ServedSchedule(policy, text)

    def _check(self, policy: Policy) -> None:
        policy.check(self.backbone.num_layers, self.backbone.hidden_size)
        if policy.may_freeze:
            check_can_freeze(self.backbone)

    def _learned(self, what: str) -> LearnedPolicy:
        if self.gates is None:
            raise RequestError(
                f"visual_exit.{what}: this server has no gates; it was started with policy {self.own.text} "
                "(--policy gates:FOLDER, or --gates FOLDER)",
                param=f"visual_exit.{what}",
                code="no_gates",
            )
        return self.gates

    def _gated(self, threshold: float | None, what: str, freeze: float | None = None) -> ServedSchedule:
        stored = self._learned(what)
        policy = stored
        if threshold is not None and (stored.by_group or threshold != stored.threshold):
            if freeze is None:
                freeze = follow_path(stored.gates.config, threshold)
            policy = LearnedPolicy(stored.gates, threshold, stored.min_layer, stored.fallback, freeze)
        return ServedSchedule(policy, _gates_text(policy.threshold), self._certificate(policy))

    def _at_risk(self, bound: float) -> ServedSchedule:
        stored = self._learned("max_risk")
        kept = [one for one in self.certificates if one.alpha <= bound]
        if not kept:
            raise RequestError(
                f"visual_exit.max_risk {bound:g}: {_not_certified(stored.gates.config, bound)}",
                param="visual_exit.max_risk",
                code="not_certified",
            )
        return self._gated(kept[-1].threshold, "max_risk", kept[-1].freeze_threshold)

    def _at_budget(self, budget: float) -> ServedSchedule:
        stored = self._learned("budget")
        if budget >= 1:
            return ServedSchedule(NeverPolicy(), NeverPolicy.name)
        known = _budgets_of(stored.gates.config)
        kept = [one for one in known if one["budget"] <= budget]
        if not kept:
            least = f"calibrated to {known[0]['budget']:.4g} or more" if known else "not calibrated"
            raise RequestError(
                f"visual_exit.budget {budget:g}: these gates are {least}; ask for more, give a threshold, or "
                f"use dyvte calibrate --budget {budget:g}",
                param="visual_exit.budget",
                code="not_calibrated",
            )
        return self._gated(kept[-1]["threshold"], "budget", kept[-1].get("freeze_threshold"))

    def _certificate(self, policy: Policy) -> Certificate | None:
        """What was proved of a policy: nothing, unless it is the gates as they were calibrated."""
        if self.gates is None or not isinstance(policy, LearnedPolicy) or policy.by_group:
            return None
        config = policy.gates.config
        if (policy.min_layer, policy.fallback) != (config.min_layer, config.fallback):
            return None
        used = (policy.threshold, policy.freeze_threshold)
        found = [one for one in self.certificates if (one.threshold, one.freeze_threshold) == used]
        return found[0] if found else None


def certificates_of(config: GateConfig) -> tuple[Certificate, ...]:
    """What calibration proved of gates, the strictest bound first."""
    record = config.calibration
    found = [Certificate(**one) for one in record.get("bounds", ())]
    if record.get("kind") == "risk" and record.get("certified"):
        own = (record["alpha"], record["delta"], str(record.get("loss")))
        found.append(Certificate(*own, config.threshold, config.rule_freeze_threshold))
    by_alpha = {one.alpha: one for one in found}
    return tuple(by_alpha[alpha] for alpha in sorted(by_alpha))


def _budgets_of(config: GateConfig) -> list[dict[str, Any]]:
    """Budgets that thresholds are known for, the smallest first."""
    known = [dict(one) for one in config.calibration.get("budgets", ())]
    if (compute := config.calibration.get("visual_compute")) is not None:
        own = {"budget": compute, "threshold": config.threshold}
        if config.freeze_head:
            own["freeze_threshold"] = config.freeze_threshold
        known.append(own)
    return sorted(known, key=lambda one: one["budget"])


def _not_certified(config: GateConfig, bound: float) -> str:
    record: dict[str, Any] = config.calibration
    if known := certificates_of(config):
        shown = ", ".join(f"{one.alpha:g}" for one in known)
        return (
            f"these gates are certified at {shown} (loss {known[0].loss}, delta {known[0].delta:g}); ask for "
            "no less, or calibrate them with a smaller --alpha"
        )
    if record.get("kind") != "risk":
        needed = images_needed(bound, _DELTA, betting)
        images = "more than 100000" if needed is None else f"at least {needed}"
        return (
            f"these gates have no certificate; dyvte calibrate --alpha {bound:g} makes one where it is shown "
            f"{images} images and no answer changes (delta {_DELTA:g}); more images where some do"
        )
    return (
        f"no threshold of these gates is certified at {record['alpha']:g}; {record.get('num_images')} images "
        f"could certify {record.get('smallest_alpha'):.4g} at best"
    )


def _gates_text(threshold: float) -> str:
    return f"gates@{threshold:g}"
