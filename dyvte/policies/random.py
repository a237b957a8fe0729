"""A layer drawn for each sample: VTW's control "random K"."""

from __future__ import annotations

import hashlib
import re

import torch

from dyvte.errors import ConfigError
from dyvte.gates import check_rule
from dyvte.policies.base import POLICIES, Plan, Policy, Rows


@POLICIES.register
class RandomPolicy(Policy):
    """Uniform in low..high, both included; a function of (seed, sample id), so batches do not matter.

    Parameters
    ----------
    low, high
        First and last exit layer that is drawn.
    seed
        Another one draws other layers for the same ids.

    Raises
    ------
    ConfigError
        The range is empty.
    """

    name = "random"
    usage = "random:LOW-HIGH[:SEED]"

    def __init__(self, low: int, high: int, seed: int = 0) -> None:
        if low > high:
            raise ConfigError(f"policy random:{low}-{high}: the range is empty")
        self.low, self.high, self.seed = low, high, seed

    @classmethod
    def parse(cls, argument: str) -> RandomPolicy:
        """Make the policy from the text after its name."""
        match = re.fullmatch(r"(\d+)-(\d+)(?::(\d+))?", argument)
        if match is None:
            raise ConfigError(f"policy random:{argument}: expected {cls.usage}")
        return cls(int(match[1]), int(match[2]), int(match[3] or 0))

    def check(self, num_layers: int, hidden_size: int) -> None:
        """Raise where a layer number or shape does not fit the backbone."""
        check_rule(num_layers, 0.5, 1, self.high, "fixed")

    def draw(self, sample_id: str) -> int:
        """The exit layer of one sample.

        Parameters
        ----------
        sample_id
            Of the row; equal ids draw alike.
        """
        digest = hashlib.sha256(f"{self.seed}\0{sample_id}".encode()).digest()
        return self.low + int.from_bytes(digest[:8], "big") % (self.high - self.low + 1)

    def start(self, rows: Rows) -> Plan:
        """The plan for one prefill."""
        return Plan(torch.tensor([self.draw(i) for i in rows.sample_ids]))
