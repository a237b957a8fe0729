"""Policies and reductions of an evaluation: read from the command line, named for folders, identified.

A policy says when visual tokens leave, a reduction what is spent on them before.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from dyvte.errors import ConfigError
from dyvte.policies import FixedPolicy, LearnedPolicy, OraclePolicy, Policy, parse_policy
from dyvte.reductions import NO_REDUCTION, Reduction, parse_reductions
from dyvte.runtime import VisualExit


@dataclass(frozen=True)
class NamedPolicy:
    """A policy, a label that is safe as a folder name, what identifies it across runs, and its reductions."""

    name: str
    policy: Policy
    identity: Mapping[str, Any]
    reductions: tuple[Reduction, ...] = ()
    options: Mapping[str, Any] = field(default_factory=dict)
    """Further arguments of `VisualExit`: positions, allow_transfer."""
    setting: str = ""
    """The setting that names it and its value, for messages; empty: it was made by none."""

    @property
    def reduction(self) -> str:
        """The reductions in their command line form; ``none`` without."""
        return "+".join(map(repr, self.reductions)) or NO_REDUCTION

    def exits(self) -> VisualExit:
        """What runs it."""
        return VisualExit.from_policy(self.policy, reductions=self.reductions, **self.options)


def parse_policies(texts: Sequence[str], seed: int = 0) -> list[NamedPolicy]:
    """Policies from their command line forms, see `dyvte.policies.POLICIES`.

    Parameters
    ----------
    texts
        One for each.
    seed
        Of random policies without their own.

    Raises
    ------
    ConfigError
        Unknown or malformed, or the same policy twice.
    """
    named: list[NamedPolicy] = []
    for text in texts:
        if text in texts[: len(named)]:
            raise ConfigError(f"policy {text!r} is given twice")
        one = parse_named(text, seed)
        taken = {other.name for other in named}
        name, number = one.name, 2
        while name in taken:
            name, number = f"{one.name}-{number}", number + 1
        named.append(replace(one, name=name, setting=f"policy {text}"))
    return named


def with_reductions(policies: Sequence[NamedPolicy], texts: Sequence[str]) -> list[NamedPolicy]:
    """Every policy with every reduction (``none``, ``fastv:2:0.5``, ``fastv:2:0.5+random_tokens:4``).

    Parameters
    ----------
    policies
        Without any.
    texts
        One for each, several joined by "+".

    Raises
    ------
    ConfigError
        Unknown or malformed, or the same reduction twice.
    """
    parsed = [parse_reductions(text) for text in texts]
    labels = ["+".join(map(repr, reductions)) or NO_REDUCTION for reductions in parsed]
    twice = [label for n, label in enumerate(labels) if label in labels[:n]]
    if twice:
        raise ConfigError(f"reduction {twice[0]!r} is given twice")
    return [_reduced(named, reductions) for reductions in parsed for named in policies]


def _reduced(named: NamedPolicy, reductions: tuple[Reduction, ...]) -> NamedPolicy:
    name = "+".join([named.name, *(_slug(repr(reduction)) for reduction in reductions)])
    return replace(named, name=name, reductions=reductions)


def with_options(named: NamedPolicy, suffix: str, **options: Any) -> NamedPolicy:
    """The policy under another name, run with these arguments of `VisualExit`.

    Parameters
    ----------
    named
        The policy.
    suffix
        Of its new name.
    **options
        Arguments of `VisualExit`.
    """
    identity = {**named.identity, **options}
    return replace(named, name=f"{named.name}-{suffix}", identity=identity, options=options)


def _slug(text: str) -> str:
    """The text as part of a folder name."""
    return re.sub(r"[^\w.-]+", "-", text)


def parse_named(text: str, seed: int = 0) -> NamedPolicy:
    """One policy from its command-line form; ``seed`` is for a random policy without its own.

    Parameters
    ----------
    text
        Such as "fixed:16".
    seed
        Of what is drawn.
    """
    kind, _, argument = text.partition(":")
    if kind == "gates":
        return _gates(argument)
    if kind == "random" and argument.count(":") == 0:
        text = f"{text}:{seed}"
    policy = parse_policy(text)
    name = re.sub(r"[^\w.-]+", "-", text)
    if isinstance(policy, OraclePolicy):
        return given_exits(name, policy.exit_layers, policy.freeze_layers)
    return NamedPolicy(name, policy, {"policy": text})


def given_exits(
    name: str, exit_layers: Mapping[str, int], freeze_layers: Mapping[str, int] | None = None
) -> NamedPolicy:
    """Exit layers, and freeze layers if any, known beforehand, by question id.

    Parameters
    ----------
    name
        Of the run.
    exit_layers, freeze_layers
        By question id.
    """
    identity = {"policy": "given", "exit_layers_sha256": _layers_digest(exit_layers)}
    if freeze_layers is not None:
        identity["freeze_layers_sha256"] = _layers_digest(freeze_layers)
    return NamedPolicy(name, OraclePolicy(exit_layers, freeze_layers), identity)


def learned(name: str, policy: LearnedPolicy) -> NamedPolicy:
    """Gates in memory; identified by their weights and decision rule.

    Parameters
    ----------
    name
        Of the run.
    policy
        The gates and their rule.
    """
    digest = hashlib.sha256()
    for key, tensor in sorted(policy.gates.state_dict().items()):
        digest.update(key.encode())
        digest.update(tensor.detach().cpu().float().numpy().tobytes())
    digest.update(repr(policy.gates.config.offsets).encode())
    if policy.may_freeze:
        digest.update(repr(policy.gates.config.freeze_offsets).encode())
    identity = {
        "policy": "gates",
        "gates_sha256": digest.hexdigest(),
        "threshold": policy.threshold,
        "min_layer": policy.min_layer,
        "fallback": policy.fallback,
    }
    if policy.may_freeze:
        identity["freeze_threshold"] = policy.freeze_threshold
    if policy.by_group and policy.gates.finder is not None:
        identity["groups"] = repr(policy.gates.config.groups)
        identity["groups_sha256"] = policy.gates.finder.digest()
    return NamedPolicy(name, policy, identity)


def _gates(argument: str) -> NamedPolicy:
    policy = parse_policy(f"gates:{argument}")
    path, at, threshold = argument.rpartition("@") if "@" in argument else (argument, "", "")
    name = "gates-" + _slug("-".join(Path(path).absolute().parts[-2:]))
    if isinstance(policy, FixedPolicy):
        return NamedPolicy(name, policy, {"policy": f"fixed:{policy.exit_layer}"})
    return learned(f"{name}-{_slug(threshold)}" if at else name, policy)


def _layers_digest(layers: Mapping[str, int]) -> str:
    content = ",".join(f"{question_id}={layer}" for question_id, layer in sorted(layers.items()))
    return hashlib.sha256(content.encode()).hexdigest()
