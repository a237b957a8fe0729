"""Which schedule answers a request: the server's own, or the one that the request asks for."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from dyvte.backbones import Backbone
from dyvte.calibration.apply import follow_path
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

WISHES = ("policy", "threshold", "max_risk", "budget")


@dataclass(frozen=True)
class Certificate:
    """A bound on the risk that calibration proved: mean loss at most ``alpha`` with probability 1 - ``delta``
    over the draw of the calibration images."""

    alpha: float
    delta: float
    loss: str


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
    def certificate(self) -> Certificate | None:
        """What calibration proved of the gates at their stored threshold."""
        return None if self.gates is None else certificate_of(self.gates.gates.config)

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

    def _gated(self, threshold: float | None, what: str) -> ServedSchedule:
        stored = self._learned(what)
        if threshold is None or threshold == stored.threshold:
            policy = stored
        else:
            freeze = follow_path(stored.gates.config, threshold)
            policy = LearnedPolicy(stored.gates, threshold, stored.min_layer, stored.fallback, freeze)
        return ServedSchedule(policy, _gates_text(policy.threshold), self._certificate(policy))

    def _at_risk(self, bound: float) -> ServedSchedule:
        stored = self._learned("max_risk")
        found = certificate_of(stored.gates.config)
        if found is None or found.alpha > bound:
            raise RequestError(
                f"visual_exit.max_risk {bound:g}: {_not_certified(stored.gates.config)}",
                param="visual_exit.max_risk",
                code="not_certified",
            )
        return self._gated(stored.gates.config.threshold, "max_risk")

    def _at_budget(self, budget: float) -> ServedSchedule:
        stored = self._learned("budget")
        config = stored.gates.config
        compute = config.calibration.get("visual_compute")
        if budget >= 1:
            return ServedSchedule(NeverPolicy(), NeverPolicy.name)
        if compute is None or compute > budget:
            known = (
                "these gates are not calibrated"
                if compute is None
                else f"these gates are calibrated to {compute:.4f}"
            )
            raise RequestError(
                f"visual_exit.budget {budget:g}: {known}; use dyvte calibrate --budget {budget:g}, or a "
                "threshold",
                param="visual_exit.budget",
                code="not_calibrated",
            )
        return self._gated(config.threshold, "budget")

    def _certificate(self, policy: Policy) -> Certificate | None:
        """What was proved of a policy: nothing, unless it is the gates as they were calibrated."""
        if self.gates is None or not isinstance(policy, LearnedPolicy):
            return None
        config = policy.gates.config
        stored = (config.threshold, config.min_layer, config.fallback, config.rule_freeze_threshold)
        used = (policy.threshold, policy.min_layer, policy.fallback, policy.freeze_threshold)
        return certificate_of(config) if used == stored else None


def certificate_of(config: GateConfig) -> Certificate | None:
    """What calibration proved of gates at their stored threshold; None if nothing."""
    record = config.calibration
    if record.get("kind") != "risk" or not record.get("certified"):
        return None
    return Certificate(record["alpha"], record["delta"], str(record.get("loss")))


def _not_certified(config: GateConfig) -> str:
    record: dict[str, Any] = config.calibration
    if record.get("kind") != "risk":
        return "these gates have no certificate (dyvte calibrate --alpha makes one)"
    if record.get("certified"):
        return (
            f"these gates are certified at {record['alpha']:g} (loss {record.get('loss')}, delta "
            f"{record['delta']:g}); ask for no less, or calibrate them with a smaller --alpha"
        )
    return (
        f"no threshold of these gates is certified at {record['alpha']:g}; {record.get('num_images')} images "
        f"could certify {record.get('smallest_alpha'):.4g} at best"
    )


def _gates_text(threshold: float) -> str:
    return f"gates@{threshold:g}"
