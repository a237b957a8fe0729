"""When visual tokens leave: one small class per file, and the names the command line knows them by."""

from __future__ import annotations

from collections.abc import Callable

from ..errors import ConfigError
from .base import Plan, Policy, Rows
from .fixed import FixedPolicy
from .learned import LearnedPolicy
from .never import NeverPolicy
from .oracle import OraclePolicy
from .random import RandomPolicy

# Each entry: a maker that takes the text after the colon. The oracle has none: its layers come from a trace.
REGISTRY: dict[str, Callable[[str], Policy]] = {
    "never": NeverPolicy.parse,
    "fixed": FixedPolicy.parse,
    "gates": LearnedPolicy.parse,
    "random": RandomPolicy.parse,
}

__all__ = [
    "REGISTRY",
    "FixedPolicy",
    "LearnedPolicy",
    "NeverPolicy",
    "OraclePolicy",
    "Plan",
    "Policy",
    "RandomPolicy",
    "Rows",
    "parse_policy",
]


def parse_policy(text: str) -> Policy:
    """A policy from its command line form: ``never``, ``fixed:16``, ``gates:FOLDER``, ``random:8-24``.

    Raises
    ------
    ConfigError
        If the name is unknown or its argument malformed.
    """
    name, _, argument = text.partition(":")
    if name not in REGISTRY:
        raise ConfigError(
            f"policy {text!r}: expected one of never, fixed:K, gates:FOLDER, random:LOW-HIGH[:SEED]"
        )
    return REGISTRY[name](argument)
