"""When visual tokens leave: one small class per file, and the names the command line knows them by."""

from __future__ import annotations

from dyvte.errors import ConfigError
from dyvte.policies.base import Plan as Plan
from dyvte.policies.base import Policy as Policy
from dyvte.policies.base import Rows as Rows

# One line registers and exports a policy.
from dyvte.policies.fixed import FixedPolicy as FixedPolicy
from dyvte.policies.learned import LearnedPolicy as LearnedPolicy
from dyvte.policies.never import NeverPolicy as NeverPolicy
from dyvte.policies.oracle import OraclePolicy as OraclePolicy
from dyvte.policies.random import RandomPolicy as RandomPolicy

REGISTRY: dict[str, type[Policy]] = {policy.name: policy for policy in Policy.__subclasses__()}
USAGE = " | ".join(policy.usage for policy in REGISTRY.values())


def parse_policy(text: str) -> Policy:
    """A policy from its command line form, such as ``fixed:16``; see `USAGE` for all of them.

    Raises
    ------
    ConfigError
        If the name is unknown or its argument malformed.
    """
    name, _, argument = text.partition(":")
    if name not in REGISTRY:
        raise ConfigError(f"policy {text!r}: expected one of {USAGE}")
    return REGISTRY[name].parse(argument)
