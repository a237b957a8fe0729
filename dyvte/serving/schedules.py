"""Which schedule answers a request: the server's own, or the one that the request asks for."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from torch import nn

from dyvte.backbones import Backbone, describe
from dyvte.calibration.apply import follow_path
from dyvte.errors import ConfigError, DyvteError
from dyvte.evaluation.fitting import check_fit
from dyvte.gates import GateConfig
from dyvte.policies import (
    POLICIES,
    LearnedPolicy,
    NeverPolicy,
    OraclePolicy,
    Policy,
    parse_policy,
)
from dyvte.reductions import NO_REDUCTION, parse_reductions
from dyvte.registry import unknown
from dyvte.runtime.checks import check_policy
from dyvte.serving.certificates import BY_GROUP, Certificate, Proof, Proofs
from dyvte.serving.errors import RequestError

_NAME_FILES = (LearnedPolicy.name, OraclePolicy.name)
WISHES = ("policy", "threshold", "max_risk", "budget")


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
    """A policy, its short name, and what was proved of it.

    Attributes
    ----------
    policy, text
        Policy and name.
    proof
        Of all questions; of gates that decide by group, see `proof_of`.
    proofs
        Of the gates, where they decide by group.
    """

    policy: Policy
    text: str
    proof: Proof = field(default_factory=Proof)
    proofs: Proofs | None = None

    @property
    def certificate(self) -> Certificate | None:
        """That of all questions, if there is one."""
        return self.proof.certificate

    def proof_of(self, group: int | None) -> Proof:
        """What was proved of a question's answers; ``group`` is its calibrated group, where it has one."""
        return self.proof if self.proofs is None or group is None else self.proofs.of_group(group)


class ScheduleMenu:
    """The schedules that a backbone's requests can have.

    Parameters
    ----------
    policy
        Command line form of the one that answers where a request says nothing.
    gates
        Folder of gates that requests may ask for where ``policy`` is another.
    reduction
        What is spent on visual tokens before they leave, in its command line form.

    Raises
    ------
    DyvteError
        If one of them is malformed, or cannot be used by requests.
    """

    def __init__(self, policy: str, gates: str | None = None, reduction: str = NO_REDUCTION) -> None:
        self._backbone: Backbone | None = None
        self.reductions = parse_reductions(reduction)
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
        self._given: dict[str, Policy] = {f"policy {policy}": own}
        if gates is not None:
            self._given[f"gates {gates}"] = self.gates
        self.proofs = None if self.gates is None else Proofs(self.gates.gates.config, self.reductions)
        self.own = ServedSchedule(own, policy) if self.gates is not own else self._served(own)
        self._made: dict[ScheduleWish, ServedSchedule] = {ScheduleWish(): self.own}

    def bind(self, model: nn.Module, processor: Any) -> None:
        """Hold all of it against the model that answers; it may come without weights first.

        Parameters
        ----------
        model, processor
            As `dyvte.backbones.load_backbone` gives them, or has them before it reads weights.

        Raises
        ------
        DyvteError
            If a policy, the gates or a reduction do not fit, or were made for another model.
        """
        check_fit(model, processor, self._given, self.reductions)
        self._backbone = describe(model)

    @property
    def groups(self) -> list[dict[str, Any]] | None:
        """Of gates that decide by group: each group's name, threshold and proof; None of others."""
        if self.gates is None or not self.gates.by_group:
            return None
        known = self.gates.gates.config.groups
        pairs = zip(known.names, known.thresholds, strict=True)
        return [
            {"name": name, "threshold": threshold, **asdict(self.proofs.of_group(at))}
            for at, (name, threshold) in enumerate(pairs)
        ]

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
        name, _, argument = text.partition(":")
        if argument and name in _NAME_FILES:
            raise RequestError(
                f"visual_exit.policy {text!r}: a request cannot name files of the server; expected never, "
                "fixed:K, freeze:F[:K], or gates (those that the server was started with)",
                param="visual_exit.policy",
            )
        try:
            served = {one: POLICIES.get(one).usage for one in POLICIES if one not in _NAME_FILES}
            if name not in served:  # what is known of the command line holds forms that requests have not
                forms = [*served.values(), "gates (a threshold of theirs: visual_exit.threshold)"]
                raise ConfigError(unknown("policy", name, [*served, "gates"], given=text, shown=forms))
            policy = parse_policy(text)
            check_policy(policy, self._backbone)
        except DyvteError as error:
            raise RequestError(f"visual_exit.policy: {error}", param="visual_exit.policy") from error
        return ServedSchedule(policy, text)

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
        return self._served(policy)

    def _at_risk(self, bound: float) -> ServedSchedule:
        stored = self._learned("max_risk")
        by_group = self.proofs.group_alpha
        if stored.by_group and by_group is not None and by_group <= bound:
            return self._served(stored)
        kept = [one for one in self.proofs.certificates if one.alpha <= bound]
        if not kept:
            raise RequestError(
                f"visual_exit.max_risk {bound:g}: {self.proofs.refusal(bound)}",
                param="visual_exit.max_risk",
                code="not_certified",
            )
        return self._gated(kept[-1].threshold, "max_risk", kept[-1].freeze_threshold)

    def _at_budget(self, budget: float) -> ServedSchedule:
        stored = self._learned("budget")
        if budget >= 1:
            return ServedSchedule(NeverPolicy(), NeverPolicy.name)
        record = stored.gates.config.calibration
        is_by_group = record.get("kind") == BY_GROUP
        if is_by_group and stored.by_group and record["visual_compute"] <= budget:
            return self._served(stored)
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

    def _served(self, policy: LearnedPolicy) -> ServedSchedule:
        if policy.by_group:
            return ServedSchedule(policy, LearnedPolicy.name, proofs=self.proofs)
        return ServedSchedule(policy, f"{LearnedPolicy.name}@{policy.threshold:g}", self.proofs.of(policy))


def _budgets_of(config: GateConfig) -> list[dict[str, Any]]:
    """Budgets that thresholds are known for, the smallest first."""
    known = [dict(one) for one in config.calibration.get("budgets", ())]
    compute = config.calibration.get("visual_compute")
    if compute is not None and config.calibration.get("kind") != BY_GROUP:  # there it is of all thresholds
        own = {"budget": compute, "threshold": config.threshold}
        if config.freeze_head:
            own["freeze_threshold"] = config.freeze_threshold
        known.append(own)
    return sorted(known, key=lambda one: one["budget"])
