"""`GateStack`: one gate per decoder layer.

Shapes: B rows, L decoder layers, F gate features, h gate width.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from dyvte.errors import CheckpointError, ConfigError
from dyvte.gates.architectures import ARCHITECTURES
from dyvte.gates.config import GateConfig
from dyvte.gates.files import read_checkpoint, write_checkpoint

_REFERENCE_KEY = re.compile(r"(?:^|\.)visual_gates_router\.(\d+)\.(w[12])\.weight$")


class GateStack(nn.Module):
    """One gate per decoder layer. Gates are separate modules, so a gate that is not used gets no gradient.

    Gate L exists only so that reference checkpoints fit; it never decides anything. ``trunk`` is what all
    gates share, None where they share nothing.
    """

    def __init__(self, config: GateConfig) -> None:
        super().__init__()
        self.config = config
        size, width, num_parts = config.feature_size, config.gate_hidden_size, len(config.features)
        architecture = ARCHITECTURES.get(config.architecture)
        self.trunk = architecture.trunk(size, width, num_parts)
        self.gates = nn.ModuleList(
            architecture.gate(size, width, num_parts) for _ in range(config.num_layers)
        )

    @staticmethod
    def init(config: GateConfig, seed: int = 0) -> GateStack:
        """New gates: Xavier uniform weights, as in the DyVTE reference code, and zero biases."""
        with torch.device("meta"):
            stack = GateStack(config)
        stack = stack.to_empty(device="cpu")
        generator = torch.Generator().manual_seed(seed)
        for parameter in stack.parameters():
            if parameter.dim() == 2:
                nn.init.xavier_uniform_(parameter, generator=generator)
            else:
                nn.init.zeros_(parameter)
        return stack

    @property
    def device(self) -> torch.device:
        """Where the gates' weights lie."""
        return next(self.parameters()).device

    @property
    def num_deciding_parameters(self) -> int:
        """Parameters that take part in decisions: all but gate L's."""
        unused = sum(parameter.numel() for parameter in self.gates[-1].parameters())
        return sum(parameter.numel() for parameter in self.parameters()) - unused

    def gate(self, k: int, features_BF: Tensor) -> Tensor:
        """(B,) float32: exit minus stay logit of gate k (1-based), offset included."""
        if not 1 <= k <= self.config.num_layers:
            raise ConfigError(f"gate {k}: expected a layer in 1..{self.config.num_layers}")
        read = features_BF if self.trunk is None else self.trunk(features_BF)
        return self.gates[k - 1](read) + self.config.offsets[k - 1]

    def forward(self, features_BLF: Tensor) -> Tensor:
        """(B, L) float32 logits of all gates; column k-1 belongs to gate k."""
        if features_BLF.shape[1:] != (self.config.num_layers, self.config.feature_size):
            raise ConfigError(
                f"features have shape {tuple(features_BLF.shape)}, expected (B, L, F) with "
                f"L = {self.config.num_layers} and F = {self.config.feature_size}"
            )
        read = features_BLF if self.trunk is None else self.trunk(features_BLF)
        logits = [gate(read[:, i]) + self.config.offsets[i] for i, gate in enumerate(self.gates)]
        return torch.stack(logits, 1)

    def save_pretrained(self, folder: str | os.PathLike[str]) -> None:
        """Write `gate_config.json` and `gates.safetensors`; each file appears whole or not at all."""
        write_checkpoint(folder, self.config, self.state_dict())

    @classmethod
    def from_pretrained(cls, folder: str | os.PathLike[str]) -> GateStack:
        """Read a folder written by `save_pretrained`, or such a repository on the hub.

        Raises
        ------
        CheckpointError
            If a file is missing, or the tensors do not fit the config.
        """
        config, stack = load_checkpoint(folder)
        if stack is None:
            raise CheckpointError(
                f"{folder} has no gates: it describes a fixed exit after layer {config.fallback}, "
                "not gates. Use VisualExit.from_pretrained, or train gates."
            )
        return stack

    @classmethod
    def from_reference(cls, state_dict: Mapping[str, Tensor], **config_fields: Any) -> GateStack:
        """Gates trained by the DyVTE reference code (`model.visual_gates_router.{i}.w{1,2}.weight`).

        Other keys are ignored, so a whole checkpoint may be given. Offsets are zero and the threshold 0.5:
        the reference's own decision ``logit[1] > logit[0]``.

        Raises
        ------
        CheckpointError
            If no such keys exist, a layer is missing, or shapes disagree.
        """
        found: dict[tuple[int, str], Tensor] = {}
        for name, tensor in state_dict.items():
            if match := _REFERENCE_KEY.search(name):
                found[int(match[1]), match[2]] = tensor
        if not found:
            raise CheckpointError(
                "no key like 'model.visual_gates_router.0.w1.weight' in this state dict: "
                "it holds no reference gates"
            )
        num_layers = max(i for i, _ in found) + 1
        missing = [f"{i}.{w}" for i in range(num_layers) for w in ("w1", "w2") if (i, w) not in found]
        if missing:
            raise CheckpointError(
                f"reference gates are incomplete: {missing[:8]} missing of {num_layers} layers"
            )
        width, feature_size = found[0, "w1"].shape
        config = GateConfig(
            num_layers=num_layers,
            hidden_size=feature_size // 2,
            architecture="reference",
            gate_hidden_size=width,
            **config_fields,
        )
        with torch.device("meta"):
            stack = cls(config)
        tensors = {f"gates.{i}.{w}.weight": t for (i, w), t in found.items()}
        _assign(stack, tensors, "the reference state dict")
        return stack


def load_checkpoint(folder: str | os.PathLike[str]) -> tuple[GateConfig, GateStack | None]:
    """Config and gates of a checkpoint folder or hub id; no gates where it describes a fixed exit."""
    config, tensors = read_checkpoint(folder)
    if tensors is None:
        return config, None
    with torch.device("meta"):
        stack = GateStack(config)
    _assign(stack, tensors, str(folder))
    return config, stack


def _assign(stack: GateStack, tensors: Mapping[str, Tensor], source: str) -> None:
    wanted = {name: tuple(t.shape) for name, t in stack.state_dict().items()}
    given = {name: tuple(t.shape) for name, t in tensors.items()}
    if wanted != given:
        name = next(n for n in sorted(wanted.keys() | given.keys()) if wanted.get(n) != given.get(n))
        raise CheckpointError(
            f"{source} does not fit its config: {name} has shape {given.get(name, 'nothing')}, "
            f"expected {wanted.get(name, 'nothing')}"
        )
    # Tensors read from a file may lie unaligned, which changes the last bits of a product: copy them.
    stack.load_state_dict({name: t.detach().clone() for name, t in tensors.items()}, assign=True)
