"""Schedules given by the caller: from a trace, or from anything else that is known beforehand."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import torch

from dyvte.errors import ConfigError
from dyvte.policies.base import POLICIES, Plan, Policy, Rows, for_rows

Layers: TypeAlias = Mapping[str, int] | Sequence[int] | torch.Tensor


@POLICIES.register
class OraclePolicy(Policy):
    """Each row's visual tokens leave, and freeze, after its given layers.

    Parameters
    ----------
    exit_layers
        One layer for each prompt of the batch, or a mapping from sample id to layer.
    freeze_layers
        Likewise, none above the sample's exit layer; None: updated until they leave.

    Raises
    ------
    ConfigError
        If a freeze layer lies above its exit layer.
    """

    name = "oracle"
    usage = "oracle:FILE.json"

    def __init__(self, exit_layers: Layers, freeze_layers: Layers | None = None) -> None:
        self.exit_layers, self.freeze_layers = exit_layers, freeze_layers
        pairs = [] if freeze_layers is None else _pairs(freeze_layers, exit_layers)
        self.may_freeze = any(f < k for f, k in pairs)
        for f, k in pairs:
            if not (0 <= f <= k or k < 0):
                raise ConfigError(f"freeze layer {f}, exit layer {k}: expected a freeze layer in 0..{k}")

    @classmethod
    def parse(cls, argument: str) -> OraclePolicy:
        """Make the policy from a JSON file ``{sample id: exit layer}`` or ``{sample id: [freeze, exit]}``."""
        try:
            given = json.loads(Path(argument).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise ConfigError(f"policy oracle:{argument}: cannot read {cls.usage}: {error}") from error
        if isinstance(given, dict) and all(type(k) is int for k in given.values()):
            return cls(given)
        if isinstance(given, dict) and all(_is_pair(pair) for pair in given.values()):
            return cls({i: k for i, (_, k) in given.items()}, {i: f for i, (f, _) in given.items()})
        raise ConfigError(
            f"policy oracle:{argument}: expected an object {{sample id: exit layer}} or {{sample id: "
            "[freeze layer, exit layer]}"
        )

    def check(self, num_layers: int, hidden_size: int) -> None:
        """Raise where a layer number does not fit the backbone."""
        # -1 is a row without an image: its entry is not used.
        if beyond := [k for k in _values(self.exit_layers) if not -1 <= k <= num_layers]:
            raise ConfigError(
                f"exit layer {beyond[0]}: expected 0..{num_layers}, the backbone has {num_layers} layers"
            )

    def start(self, rows: Rows) -> Plan:
        """The plan for one prefill."""
        freezes = self.freeze_layers
        return Plan(_of(rows, self.exit_layers), None if freezes is None else _of(rows, freezes))


def _of(rows: Rows, given: Layers) -> torch.Tensor:
    if isinstance(given, Mapping):
        if missing := [i for i in rows.sample_ids if i not in given]:
            raise ConfigError(f"the oracle has no exit layer for samples {missing[:5]}")
        return torch.tensor([int(given[i]) for i in rows.sample_ids])
    layers_B = for_rows(torch.as_tensor(given, dtype=torch.int64).cpu(), len(rows.num_visual_B))
    if layers_B is None:
        raise ConfigError(f"{len(given)} exit layers for a batch of {len(rows.num_visual_B)} rows")
    return layers_B.clone()


def _values(given: Layers) -> list[int]:
    return [int(k) for k in (given.values() if isinstance(given, Mapping) else given)]


def _pairs(freezes: Layers, exits: Layers) -> list[tuple[int, int]]:
    if len(freezes) != len(exits) or (isinstance(freezes, Mapping) and list(freezes) != list(exits)):
        raise ConfigError("freeze_layers: expected one layer for each of exit_layers, in the same order")
    return list(zip(_values(freezes), _values(exits), strict=True))


def _is_pair(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 2 and all(type(layer) is int for layer in value)
