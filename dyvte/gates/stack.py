"""`GateStack`: one gate per decoder layer, or two: exit head and freeze head.

Shapes: B rows, L decoder layers, F gate features, h gate width; G streams, M stream features (`HeadLogits`).
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from dyvte.errors import CheckpointError, ConfigError
from dyvte.gates.architectures import ARCHITECTURES
from dyvte.gates.architectures.base import Layers
from dyvte.gates.config import GateConfig
from dyvte.gates.files import read_checkpoint, read_groups, write_checkpoint, write_groups
from dyvte.gates.groups import GroupFinder
from dyvte.gates.logits import HeadLogits
from dyvte.gates.offsets import CLOSED
from dyvte.gates.reference import reference_tensors


class GateStack(nn.Module):
    """One gate per decoder layer. Gates are separate modules, so a gate that is not used gets no gradient.

    ``gates`` is the exit head. Gate L exists only so that reference checkpoints fit; it never decides
    anything. ``freezes`` is the freeze head, None in a stack without one: its gate j = 0..L-1 reads what exit
    gate j reads, gate 0 the same features before the first layer. ``trunk`` is what all gates share, None
    where they share nothing. ``finder`` tells rows' groups, where thresholds were calibrated by group.

    Parameters
    ----------
    config
        Shapes, architecture, features and offsets.
    """

    def __init__(self, config: GateConfig) -> None:
        super().__init__()
        self.config = config
        # Made by calibration, not by training: no part of the weights.
        self.finder: GroupFinder | None = None
        size, width, num_parts = config.feature_size, config.gate_hidden_size, len(config.features)
        architecture = ARCHITECTURES.get(config.architecture)
        self.trunk = architecture.trunk(size, width, num_parts, config.num_layers)
        self.gates = nn.ModuleList(
            architecture.gate(size, width, num_parts) for _ in range(config.num_layers)
        )
        self.freezes = None
        if config.freeze_head:
            self.freezes = nn.ModuleList(
                architecture.gate(size, width, num_parts) for _ in range(config.num_layers)
            )

    @staticmethod
    def init(config: GateConfig, seed: int = 0) -> GateStack:
        """New gates: Xavier uniform weights, as in the DyVTE reference code, and zero biases.

        Parameters
        ----------
        config
            What they are made of.
        seed
            Of the weights; the global generator is left alone.
        """
        with torch.device("meta"):
            stack = GateStack(config)
        stack = stack.to_empty(device="cpu")
        generator = torch.Generator().manual_seed(seed)
        for parameter in stack.parameters():
            if parameter.dim() == 2:
                nn.init.xavier_uniform_(parameter, generator=generator)
            else:
                nn.init.zeros_(parameter)
        for name, buffer in stack.named_buffers():  # a standardisation that changes nothing yet
            nn.init.constant_(buffer, float(name.endswith("scale")))
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
        """(B,) float32: exit minus stay logit of gate k (1-based), offset included.

        Parameters
        ----------
        k
            Layers behind the features, 1..L.
        features_BF
            (B, F) what the gate reads, in any float dtype.

        Raises
        ------
        ConfigError
            There is no gate k.
        """
        if not 1 <= k <= self.config.num_layers:
            raise ConfigError(f"gate {k}: expected a layer in 1..{self.config.num_layers}")
        return self._exit(k, self._read(features_BF, k))

    def heads(self, k: int, features_BF: Tensor) -> Tensor:
        """(2, B) float32 exit and freeze logits after layer k = 0..L-1, offsets included.

        At k = 0, before the first layer, nothing can leave: `CLOSED` in the exit head's place.

        Parameters
        ----------
        k
            Layers behind the features.
        features_BF
            (B, F) what both gates read.

        Raises
        ------
        ConfigError
            The stack has no freeze head, or k does not lie in 0..L-1.
        """
        if self.freezes is None or not 0 <= k < self.config.num_layers:
            raise ConfigError(f"both heads at {k}: expected gates with a freeze head, and a layer below L")
        read = self._read(features_BF, k)
        freeze_B = self._freeze(k, read)
        return torch.stack((self._exit(k, read) if k else torch.full_like(freeze_B, CLOSED), freeze_B))

    def forward(
        self,
        features_BLF: Tensor,
        embeddings_BF: Tensor | None = None,
        frozen_BMF: Tensor | None = None,
        freeze_layers: Sequence[int] = (),
    ) -> Tensor | tuple[Tensor, Tensor]:
        """All logits on traced features.

        Parameters
        ----------
        features_BLF
            Features of the plain stream, in which visual tokens are updated to the end.
        embeddings_BF, frozen_BMF, freeze_layers
            For gates with a freeze head: features before the first layer; those of the streams that are
            frozen after each of ``freeze_layers``, from the next layer to L, one stream after another.

        Returns
        -------
        (B, L) float32 logits of the exit gates, column k-1 of gate k; with a freeze head exit_BGL and
        freeze_BL of `HeadLogits` (a tuple of tensors, as engines that wrap modules expect).

        Raises
        ------
        ConfigError
            If features have another shape, or those of the freeze head are missing.
        """
        if features_BLF.shape[1:] != (self.config.num_layers, self.config.feature_size):
            raise ConfigError(
                f"features have shape {tuple(features_BLF.shape)}, expected (B, L, F) with "
                f"L = {self.config.num_layers} and F = {self.config.feature_size}"
            )
        # A closed gate says CLOSED whatever it reads: where traces label a fifth of the exits, most of a
        # training's work would be for nothing. Gate L never decides, but its weights are part of the stack.
        num_layers, freezes = self.config.num_layers, self.config.open_freezes
        exits = [*self.config.open_gates, num_layers]
        asked = sorted({*exits, *(j for j in freezes if j)})
        read = self._read_at(features_BLF, [k - 1 for k in asked], asked)
        said = {k: self._exit(k, read[:, asked.index(k)]) for k in exits}
        closed_B = torch.full((len(features_BLF),), CLOSED, device=features_BLF.device)
        plain_BL = torch.stack([said.get(k, closed_B) for k in range(1, num_layers + 1)], 1)
        if self.freezes is None:
            return plain_BL
        if embeddings_BF is None or frozen_BMF is None or not freeze_layers:
            raise ConfigError(
                "these gates have a freeze head, but the traces hold no freeze layers: trace with a grid of "
                "freeze layers"
            )
        frozen = {j: self._freeze(j, read[:, asked.index(j)]) for j in freezes if j}
        if 0 in freezes:
            frozen[0] = self._freeze(0, self._read(embeddings_BF, 0))
        freeze_BL = torch.stack([frozen.get(j, closed_B) for j in range(num_layers)], 1)
        column, streams = 0, []
        for f in freeze_layers:
            behind = [k for k in exits if k > f]
            own = self._read_at(frozen_BMF, [column + k - f - 1 for k in behind], behind)
            said = {k: self._exit(k, own[:, i]) for i, k in enumerate(behind)}
            later = [said.get(k, closed_B) for k in range(f + 1, num_layers + 1)]
            streams.append(torch.cat((plain_BL[:, :f], torch.stack(later, 1)), 1))
            column += num_layers - f
        return torch.stack((*streams, plain_BL), 1), freeze_BL

    def _read_at(self, features_BMF: Tensor, columns: list[int], layers: list[int]) -> Tensor:
        read = features_BMF if columns == list(range(features_BMF.shape[1])) else features_BMF[:, columns]
        return self._read(read, torch.tensor(layers, device=read.device))

    def logits(
        self,
        features_BLF: Tensor,
        embeddings_BF: Tensor | None = None,
        frozen_BMF: Tensor | None = None,
        freeze_layers: Sequence[int] = (),
    ) -> Tensor | HeadLogits:
        """`forward` as what the rule and the objectives take: (B, L), or `HeadLogits`.

        Parameters
        ----------
        features_BLF, embeddings_BF, frozen_BMF, freeze_layers
            As for `forward`.
        """
        found = self(features_BLF, embeddings_BF, frozen_BMF, freeze_layers)
        return found if isinstance(found, Tensor) else HeadLogits(*found, tuple(freeze_layers))

    def fit_inputs(
        self,
        features_BLF: Tensor,
        embeddings_BF: Tensor | None = None,
        frozen_BMF: Tensor | None = None,
        freeze_layers: Sequence[int] = (),
    ) -> None:
        """Let a new stack take in what its architecture must know of the training features; often nothing.

        Call it once, before training.

        Parameters
        ----------
        features_BLF, embeddings_BF, frozen_BMF, freeze_layers
            As for `forward`: those of all training samples.
        """
        if self.trunk is None:
            return
        both = self.freezes is not None and embeddings_BF is not None and frozen_BMF is not None
        if both:
            self.trunk.fit(0, embeddings_BF)
        layers_M = [k for f in freeze_layers for k in range(f + 1, self.config.num_layers + 1)]
        for layer in range(1, self.config.num_layers + 1):
            parts = [features_BLF[:, layer - 1]]
            if both:
                columns = [column for column, k in enumerate(layers_M) if k == layer]
                parts.append(frozen_BMF[:, columns].flatten(0, 1))
            self.trunk.fit(layer, torch.cat(parts))

    def _read(self, features: Tensor, layers: Layers) -> Tensor:
        return features if self.trunk is None else self.trunk(features, layers)

    def _exit(self, k: int, read: Tensor) -> Tensor:
        return self.gates[k - 1](read) + self.config.offsets[k - 1]

    def _freeze(self, j: int, read: Tensor) -> Tensor:
        return self.freezes[j](read) + self.config.freeze_offsets[j]

    def save_pretrained(self, folder: str | os.PathLike[str]) -> None:
        """Write `gate_config.json`, `gates.safetensors` and, with groups, `groups.safetensors`.

        Each file appears whole or not at all.

        Parameters
        ----------
        folder
            Made where it does not exist.
        """
        write_groups(folder, self.finder)
        write_checkpoint(folder, self.config, self.state_dict())

    @classmethod
    def merged(cls, stacks: Sequence[GateStack]) -> GateStack:
        """One stack whose logits are the mean of several stacks': as wide as all of them together.

        Several trainings of one shape differ by their seeds alone, and their mean decides better than most of
        them.

        Parameters
        ----------
        stacks
            At least one; none of them is changed.

        Raises
        ------
        ConfigError
            If they differ in more than weights and threshold, or in what they know of the features' scale.
        """
        first = stacks[0].config
        unlike = {"training", "calibration", "threshold", "freeze_threshold", "gate_hidden_size", "groups"}
        plain = [{n: v for n, v in vars(one.config).items() if n not in unlike} for one in stacks]
        if any(one != plain[0] for one in plain):
            raise ConfigError("only gates of one backbone, architecture and rule can be merged")
        width = sum(one.config.gate_hidden_size for one in stacks)
        config = replace(first, gate_hidden_size=width, groups=None)
        with torch.device("meta"):
            whole = cls(config)
        constants = {name for name, _ in whole.named_buffers()}
        tensors = {}
        for name, tensor in stacks[0].state_dict().items():
            all_of_it = [one.state_dict()[name] for one in stacks]
            if name in constants:
                if any(not torch.equal(tensor, one) for one in all_of_it):
                    raise ConfigError(f"gates to merge were trained on other samples: their {name} differ")
                tensors[name] = tensor
            elif name.endswith("w2.weight"):
                tensors[name] = torch.cat(all_of_it, 1) / len(stacks)
            elif name.endswith("w2.bias"):
                tensors[name] = torch.stack(all_of_it).mean(0)
            else:
                tensors[name] = torch.cat(all_of_it)
        _assign(whole, tensors, "the merged stack")
        return whole

    @classmethod
    def from_pretrained(cls, folder: str | os.PathLike[str]) -> GateStack:
        """Read a folder written by `save_pretrained`, or such a repository on the hub.

        Parameters
        ----------
        folder
            Of the checkpoint, or its hub id.

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

        Parameters
        ----------
        state_dict
            Tensors by name; the layers are counted from 0 there.
        config_fields
            Further fields of `GateConfig`: backbone, features, ...

        Raises
        ------
        CheckpointError
            If no such keys exist, a layer is missing, shapes disagree, or a freeze head is asked for: the
            reference has none.
        """
        if config_fields.get("freeze_head"):
            raise CheckpointError("reference gates have one head: they cannot be read with freeze_head: true")
        sizes, tensors = reference_tensors(state_dict)
        with torch.device("meta"):
            stack = cls(GateConfig(**sizes, architecture="reference", **config_fields))
        _assign(stack, tensors, "the reference state dict")
        return stack


def load_checkpoint(folder: str | os.PathLike[str]) -> tuple[GateConfig, GateStack | None]:
    """Config and gates of a checkpoint folder or hub id; no gates where it describes a fixed exit.

    Parameters
    ----------
    folder
        Of the checkpoint, or its hub id.

    Raises
    ------
    CheckpointError
        A file is missing or damaged, or the tensors do not fit the config.
    """
    config, tensors = read_checkpoint(folder)
    if tensors is None:
        return config, None
    _check_count(config, tensors, str(folder))
    try:
        with torch.device("meta"):
            stack = GateStack(config)
    except (TypeError, ValueError, RuntimeError, OverflowError, AttributeError) as error:
        reason = str(error).partition("\n")[0]
        raise CheckpointError(f"{folder}: no gates can be made of its configuration: {reason}") from error
    _assign(stack, tensors, str(folder))
    stack.finder = read_groups(folder, config)
    return config, stack


def _check_count(config: GateConfig, tensors: Mapping[str, Tensor], source: str) -> None:
    """Raise before gates are made for many more layers than there are tensors."""
    if config.num_layers > 100 * max(1, len(tensors)):
        raise CheckpointError(
            f"{source} does not fit its config: {len(tensors)} tensors for {config.num_layers} layers"
        )


def has_freezes(names: Iterable[str]) -> bool:
    """Are these names of a stack's tensors those of two heads?"""
    return any(name.startswith("freezes.") for name in names)


def _assign(stack: GateStack, tensors: Mapping[str, Tensor], source: str) -> None:
    wanted = {name: tuple(t.shape) for name, t in stack.state_dict().items()}
    given = {name: tuple(t.shape) for name, t in tensors.items()}
    if wanted != given:
        if has_freezes(wanted) != has_freezes(given):
            raise CheckpointError(
                f"{source}: its config says freeze_head: {has_freezes(wanted)}, but its tensors are of gates "
                f"{'with' if has_freezes(given) else 'without'} a freeze head; use the config they were "
                "trained with"
            )
        name = next(n for n in sorted(wanted.keys() | given.keys()) if wanted.get(n) != given.get(n))
        raise CheckpointError(
            f"{source} does not fit its config: {name} has shape {given.get(name, 'nothing')}, "
            f"expected {wanted.get(name, 'nothing')}"
        )
    # Tensors read from a file may lie unaligned, which changes the last bits of a product: copy them.
    stack.load_state_dict({name: t.detach().clone() for name, t in tensors.items()}, assign=True)
