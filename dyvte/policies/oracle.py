"""Exit layers given by the caller: from a trace, or from anything else that is known beforehand."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from dyvte.errors import ConfigError
from dyvte.policies.base import POLICIES, Plan, Policy, Rows, for_rows


@POLICIES.register
class OraclePolicy(Policy):
    """Each row leaves after its given layer.

    Parameters
    ----------
    exit_layers
        One layer for each prompt of the batch, or a mapping from sample id to layer.
    """

    name = "oracle"
    usage = "oracle:FILE.json"

    def __init__(self, exit_layers: Mapping[str, int] | Sequence[int] | torch.Tensor) -> None:
        self.exit_layers = exit_layers

    @classmethod
    def parse(cls, argument: str) -> OraclePolicy:
        """Make the policy from a JSON file ``{sample id: exit layer}``."""
        try:
            given = json.loads(Path(argument).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise ConfigError(f"policy oracle:{argument}: cannot read {cls.usage}: {error}") from error
        if not isinstance(given, dict) or any(type(k) is not int for k in given.values()):
            raise ConfigError(f"policy oracle:{argument}: expected an object {{sample id: exit layer}}")
        return cls(given)

    def check(self, num_layers: int, hidden_size: int) -> None:
        """Raise where a layer number does not fit the backbone."""
        given = self.exit_layers.values() if isinstance(self.exit_layers, Mapping) else self.exit_layers
        for k in given:
            # -1 is a row without an image: its entry is not used.
            if not -1 <= int(k) <= num_layers:
                raise ConfigError(
                    f"exit layer {int(k)}: expected 0..{num_layers}, the backbone has {num_layers} layers"
                )

    def start(self, rows: Rows) -> Plan:
        """The plan for one prefill."""
        given = self.exit_layers
        if isinstance(given, Mapping):
            if missing := [i for i in rows.sample_ids if i not in given]:
                raise ConfigError(f"the oracle has no exit layer for samples {missing[:5]}")
            return Plan(torch.tensor([int(given[i]) for i in rows.sample_ids]))
        exits_B = for_rows(torch.as_tensor(given, dtype=torch.int64).cpu(), len(rows.num_visual_B))
        if exits_B is None:
            raise ConfigError(f"{len(given)} exit layers for a batch of {len(rows.num_visual_B)} rows")
        return Plan(exits_B.clone())
