"""`GateConfig`: everything about a stack of gates except its weights."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass, field
from typing import Any

from dyvte.errors import CheckpointError, ConfigError, GateMismatchError
from dyvte.gates.architectures import ARCHITECTURES
from dyvte.gates.features import DEFAULT_FEATURES, check_features
from dyvte.gates.groups import GroupThresholds
from dyvte.gates.offsets import is_open
from dyvte.gates.rule import check_rule

CONFIG_FILE = "gate_config.json"
INITIALISED = "initialised"
"""How new gates were drawn, in the record of a training that has not been."""
FREEZE_FIELDS = ("freeze_head", "freeze_offsets", "freeze_threshold")


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
        The decision rule, see `ScheduleRule`. ``mode="fixed"``: every row leaves at ``fallback``.
    freeze_head
        Is there a second head, which says when a row's visual tokens are no longer updated? Without it they
        are updated until they leave. The two settings below belong to it.
    freeze_offsets
        L constants added to its logits, entry j of freezing after j layers; see `uniform_freeze_offsets`.
    freeze_threshold
        Its own threshold in the rule.
    groups
        Thresholds by group, where they were calibrated so: they decide then, and ``threshold`` is what one
        threshold for all would be.
    backbone
        id, model_type and fingerprint of the backbone the gates belong to.
    training, calibration
        Free records of how the weights and the threshold came about.
    dyvte_version
        Of the package that made the gates; "" stands for the one in use.
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
    freeze_head: bool = False
    freeze_offsets: tuple[float, ...] = ()
    freeze_threshold: float = 0.5
    groups: GroupThresholds | None = None
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
        check_rule(
            self.num_layers, self.threshold, self.min_layer, self.fallback, self.mode, self.freeze_threshold
        )
        if not self.freeze_head and (self.freeze_offsets or self.freeze_threshold != 0.5):
            raise ConfigError("freeze_offsets and freeze_threshold belong to gates with freeze_head: true")
        offsets = self._one_per_layer("offsets")
        set_field = object.__setattr__
        if self.freeze_head:
            set_field(self, "freeze_offsets", self._one_per_layer("freeze_offsets"))
        if self.groups is not None:
            self.groups.check(self.num_layers, self.freeze_head)
        set_field(self, "features", check_features(self.features))
        set_field(self, "offsets", offsets)
        set_field(self, "gate_hidden_size", self.gate_hidden_size or architecture.width)
        if not self.dyvte_version:
            from dyvte import __version__

            set_field(self, "dyvte_version", __version__)

    def _one_per_layer(self, name: str) -> tuple[float, ...]:
        given = tuple(float(x) for x in getattr(self, name)) or (0.0,) * self.num_layers
        if len(given) != self.num_layers:
            raise ConfigError(f"{len(given)} {name} for {self.num_layers} layers: expected one for each")
        return given

    @property
    def feature_size(self) -> int:
        """F."""
        return len(self.features) * self.hidden_size

    @property
    def open_gates(self) -> tuple[int, ...]:
        """Layers of the gates that can fire."""
        return tuple(k for k in range(1, self.num_layers) if is_open(self.offsets[k - 1]))

    @property
    def open_freezes(self) -> tuple[int, ...]:
        """Layers after which the freeze head can fire; none without one."""
        return tuple(j for j, offset in enumerate(self.freeze_offsets) if is_open(offset))

    @property
    def rule_freeze_threshold(self) -> float | None:
        """The freeze threshold as `ScheduleRule` takes it: None without a freeze head."""
        return self.freeze_threshold if self.freeze_head else None

    @property
    def is_new(self) -> bool:
        """Are these gates that ``dyvte init`` set up and nobody has trained?"""
        return INITIALISED in self.training

    def to_json(self) -> str:
        """Pretty JSON text with every field; those of the freeze head and of groups where there are any.

        So a config without them is the text that earlier versions wrote and can read.
        """
        values = dataclasses.asdict(self)
        if self.groups is None:
            del values["groups"]
        if not self.freeze_head:
            values = {name: value for name, value in values.items() if name not in FREEZE_FIELDS}
        return json.dumps(values, indent=2, sort_keys=True) + "\n"

    def check_shape(self, num_layers: int, hidden_size: int) -> None:
        """Raise where these are no gates for a backbone of this shape.

        Parameters
        ----------
        num_layers, hidden_size
            L and D of the backbone.

        Raises
        ------
        GateMismatchError
            Naming both shapes.
        """
        if (self.num_layers, self.hidden_size) != (num_layers, hidden_size):
            raise GateMismatchError(
                f"these gates are for {self.num_layers} layers of hidden size {self.hidden_size}, "
                f"the backbone has {num_layers} layers of hidden size {hidden_size}: "
                "use the gates trained for this backbone"
            )

    @classmethod
    def from_json(cls, text: str) -> GateConfig:
        """Inverse of `to_json`.

        Parameters
        ----------
        text
            Content of a `gate_config.json`, of this version or an earlier one.

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
        if values.get("groups") is not None:
            values["groups"] = GroupThresholds.from_dict(values["groups"])
        return cls(**values)
