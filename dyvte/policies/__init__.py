"""When visual tokens freeze and leave: one small class per file, registered under its command line name."""

from __future__ import annotations

from typing import cast

from dyvte.policies.base import POLICIES, Plan, Policy, Rows
from dyvte.policies.blind import BlindPolicy
from dyvte.policies.fixed import FixedPolicy
from dyvte.policies.freeze import FreezePolicy
from dyvte.policies.learned import LearnedPolicy
from dyvte.policies.never import NeverPolicy
from dyvte.policies.oracle import OraclePolicy
from dyvte.policies.random import RandomPolicy

__all__ = [
    "POLICIES",
    "BlindPolicy",
    "FixedPolicy",
    "FreezePolicy",
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
    """A policy from its command line form, such as ``fixed:16``; ``POLICIES.usages()`` are all of them.

    Parameters
    ----------
    text
        ``NAME`` or ``NAME:ARGUMENT``.

    Raises
    ------
    ConfigError
        If the name is unknown (the nearest is named) or its argument malformed.
    """
    return cast(Policy, POLICIES.parse(text))
