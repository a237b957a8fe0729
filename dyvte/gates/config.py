"""`GateConfig`: everything about a stack of gates except its weights."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass, field
from typing import Any

from dyvte.errors import CheckpointError, ConfigError
from dyvte.gates.architectures import ARCHITECTURES
from dyvte.gates.features import DEFAULT_FEATURES, check_features
from dyvte.gates.rule import check_rule, is_open

CONFIG_FILE = "gate_config.json"


@dataclass(frozen=True, kw_only=True)
class GateConfig:
    """All that is needed to rebuild a stack of gates and to decide with it; `gate_config.json`.

    Attributes
    ----------
    num_layers, hidden_size
        L and D of the backbone.
    architecture
        What a gate is made of, by its name in `dyvte.gates.architectures`.
    gate_hidden_size
        h; 0 means the architecture's own.
    features
        What the gates read, in this order; see `dyvte.gates.prompt_features`.
    offsets
        L constants added to the logits; see `uniform_offsets`. Empty means zeros; `CLOSED` means that this
        gate never fires (an exit that the training's traces do not label).
    threshold, min_layer, fallback, mode
        The decision rule, see `exit_layers`. ``mode="fixed"``: every row leaves at ``fallback``.
    backbone
        id, model_type and fingerprint of the backbone the gates belong to.
    training, calibration
        Free records of how the weights and the threshold came about.
    """

    num_layers: int
    hidden_size: int
    architecture: str = "shared"
    gate_hidden_size: int = 0
    features: tuple[str, ...] = DEFAULT_FEATURES
    offsets: tuple[float, ...] = ()
    threshold: float = 0.5
    min_layer: int = 1
    fallback: int | None = None
    mode: str = "gates"
    backbone: dict[str, Any] = field(default_factory=dict)
    training: dict[str, Any] = field(default_factory=dict)
    calibration: dict[str, Any] = field(default_factory=dict)
    dyvte_version: str = ""

    def __post_init__(self) -> None:
        architecture = ARCHITECTURES.get(self.architecture)
        if self.num_layers < 1 or self.hidden_size < 1:
            raise ConfigError(
                f"num_layers {self.num_layers} and hidden_size {self.hidden_size}: expected positive integers"
            )
        check_rule(self.num_layers, self.threshold, self.min_layer, self.fallback, self.mode)
        offsets = tuple(float(x) for x in self.offsets) or (0.0,) * self.num_layers
        if len(offsets) != self.num_layers:
            raise ConfigError(f"{len(offsets)} offsets for {self.num_layers} layers: expected one for each")
        set_field = object.__setattr__
        set_field(self, "features", check_features(self.features))
        set_field(self, "offsets", offsets)
        set_field(self, "gate_hidden_size", self.gate_hidden_size or architecture.width)
        if not self.dyvte_version:
            from dyvte import __version__

            set_field(self, "dyvte_version", __version__)

    @property
    def feature_size(self) -> int:
        """F."""
        return len(self.features) * self.hidden_size

    @property
    def open_gates(self) -> tuple[int, ...]:
        """Layers of the gates that can fire."""
        return tuple(k for k in range(1, self.num_layers) if is_open(self.offsets[k - 1]))

    def to_json(self) -> str:
        """Pretty JSON text with every field."""
        return json.dumps(dataclasses.asdict(self), indent=2, sort_keys=True) + "\n"

    @classmethod
    def from_json(cls, text: str) -> GateConfig:
        """Inverse of `to_json`.

        Raises
        ------
        CheckpointError
            If the text is not JSON, lacks a required field or has one that this version does not know.
        """
        try:
            values = json.loads(text)
        except json.JSONDecodeError as error:
            raise CheckpointError(f"{CONFIG_FILE} is not valid JSON: {error}") from error
        known = {f.name for f in dataclasses.fields(cls)}
        if not isinstance(values, dict) or not {"num_layers", "hidden_size"} <= set(values):
            raise CheckpointError(f"{CONFIG_FILE} must be an object with at least num_layers and hidden_size")
        if unknown := sorted(set(values) - known):
            raise CheckpointError(
                f"{CONFIG_FILE} has unknown fields {unknown}: it may come from a newer dyvte, upgrade to read"
            )
        return cls(**values)
