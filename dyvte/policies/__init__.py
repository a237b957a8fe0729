"""When visual tokens leave: one small class per file, and the names the command line knows them by."""

from __future__ import annotations

from ..errors import ConfigError
from .base import Plan as Plan
from .base import Policy as Policy
from .base import Rows as Rows

# One line registers and exports a policy.
from .fixed import FixedPolicy as FixedPolicy
from .learned import LearnedPolicy as LearnedPolicy
from .never import NeverPolicy as NeverPolicy
from .oracle import OraclePolicy as OraclePolicy
from .random import RandomPolicy as RandomPolicy

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
