"""How gates learn from traces: the step of their training. The backbone is not there any more.

Shape letters: B samples, L decoder layers, F gate features.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from dyvte.distributed import Processes, import_deepspeed
from dyvte.gates import GateStack, HeadLogits
from dyvte.teacher.trace import Trace
from dyvte.training.config import TrainConfig
from dyvte.training.loop import Training
from dyvte.training.metrics import validation_metrics
from dyvte.training.schedule import drawn_layer


class _Gates(nn.Module):
    """What the engine wraps: all gates, or one of them alone."""

    def __init__(self, stack: GateStack) -> None:
        super().__init__()
        self.stack = stack

    def forward(
        self, features_BLF: Tensor, layer: int | None = None, **streams: Any
    ) -> Tensor | tuple[Tensor, Tensor]:
        if layer is None:
            return self.stack(features_BLF, **streams)
        return self.stack.gate(layer, features_BLF[:, layer - 1])


class GateTraining(Training):
    """One training of one stack of gates; :meth:`run` does it."""

    trained = "gates"

    def __init__(
        self, cfg: TrainConfig, gates: GateStack, train: Trace, validation: Trace | None, processes: Processes
    ) -> None:
        self.train, self.validation = train, validation
        self.validates = validation is not None
        self.num_layers = train.num_layers
        self.gates = gates.float()
        # Nothing is left to leave after the last layer: its gate is never asked. Nor are freeze gates at
        # layers whose stream was not traced.
        self.gates.gates[-1].requires_grad_(False)
        for j, gate in enumerate(self.gates.freezes or ()):
            gate.requires_grad_(j in train.freezes)
        super().__init__(cfg, _Gates(self.gates), len(train), processes)
        self.objective = cfg.objective.prepared(train)

    def weights(self) -> dict[str, Tensor]:
        """The gates' weights on the CPU, whatever the ZeRO stage."""
        if self.zero_stage < 3:
            return {name: tensor.detach().cpu().clone() for name, tensor in self.gates.state_dict().items()}
        deepspeed = import_deepspeed()
        with deepspeed.zero.GatheredParameters(list(self.gates.parameters())):
            return {name: tensor.detach().cpu().clone() for name, tensor in self.gates.state_dict().items()}

    @contextmanager
    def micro_step(self, step: int, micro: int) -> Iterator[tuple[Tensor, Sequence[str]]]:
        """The objective on one batch of traces."""
        batch = self.train.rows(self.drawn(step, micro)).to(self.processes.device)
        layer = self._layer(step, micro) if self.cfg.objective.one_layer_per_step else None
        logits = self.logits(batch, layer)
        loss = self.objective(logits, batch, layer=layer) if layer else self.objective(logits, batch)
        yield loss, batch.sample_ids

    def before_update(self, step: int) -> None:
        """With one layer per step, gates that were not drawn have no gradient."""
        if self.cfg.objective.one_layer_per_step:
            drawn = {self._layer(step, micro) for micro in range(self.cfg.accumulation)}
            self._forget_gradients_except(drawn)

    def validate(self) -> dict[str, Any]:
        """Decisions on the held-out samples."""
        parts = torch.arange(len(self.validation)).split(512)
        with torch.no_grad():
            found = [
                self.logits(self.validation.rows(part).to(self.processes.device)).cpu() for part in parts
            ]
        logits = HeadLogits.cat(found) if isinstance(found[0], HeadLogits) else torch.cat(found)
        metrics = validation_metrics(logits, self.validation, self.gates.config.threshold)
        objective = self.objective(logits, self.validation)
        return {"validation/objective": float(objective), **metrics}

    def logits(self, batch: Trace, layer: int | None = None) -> Tensor | HeadLogits:
        """Of all gates on a batch on the engine's device; with ``layer`` (B,) of that gate alone."""
        if not self.gates.config.freeze_head:
            return self.engine(batch.features, layer)
        return HeadLogits(*self.engine(**batch.gate_inputs()), batch.freezes)

    def _layer(self, step: int, micro: int) -> int:
        layers = [k for k in self.train.exits if 1 <= k < self.num_layers]
        return layers[drawn_layer(self.cfg.seed, step * self.cfg.accumulation + micro, len(layers) + 1) - 1]

    def _forget_gradients_except(self, layers: set[int]) -> None:
        # DeepSpeed fills missing gradients with zeros, and a zero gradient still moves Adam.
        for k, gate in enumerate(self.gates.gates, start=1):
            if k not in layers:
                for parameter in gate.parameters():
                    parameter.grad = None
