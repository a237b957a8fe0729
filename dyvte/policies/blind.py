"""No layer sees the image: what a model answers from the question alone."""

from __future__ import annotations

import torch

from dyvte.errors import ConfigError
from dyvte.policies.base import POLICIES, Plan, Policy, Rows


@POLICIES.register
class BlindPolicy(Policy):
    """Every row's visual tokens leave before the first layer.

    The control of a benchmark: what it gives away without its images. The same as ``fixed:0``. Text keeps its
    positions, and what a prompt says around an image (tags, separators) is text and stays; with
    ``positions="rearrange"`` the prompt is the one without the image's tokens.
    """

    name = "blind"
    usage = "blind"

    @classmethod
    def parse(cls, argument: str) -> BlindPolicy:
        """Make the policy from the text after its name."""
        if argument:
            raise ConfigError(f"policy blind takes no argument, got {argument!r}")
        return cls()

    def start(self, rows: Rows) -> Plan:
        """The plan for one prefill."""
        return Plan(torch.zeros(len(rows.num_visual_B), dtype=torch.long))
