"""The training loop: gates learn from traces in a DeepSpeed engine. The backbone is not there any more.

Shape letters: B samples, L decoder layers, F gate features.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from dyvte.errors import TrainingError
from dyvte.gates import GateStack
from dyvte.objectives import get_objective, safe_labels
from dyvte.objectives.safe_label import class_balance
from dyvte.teacher.trace import Trace
from dyvte.training.checkpoints import Checkpoints, RunState, check_resumable
from dyvte.training.config import TrainConfig
from dyvte.training.figures import validation_figures
from dyvte.training.processes import Processes, import_deepspeed
from dyvte.training.schedule import SampleOrder, drawn_layer, lr_factor, total_steps
from dyvte.training.zero import engine_config, stage_of

log = logging.getLogger(__name__)
Report = Callable[[int, Mapping[str, Any]], None]


@dataclass(frozen=True)
class Plan:
    """Numbers of a run that follow from its configuration, its data and its processes."""

    num_samples: int
    global_batch: int
    steps: int
    steps_per_epoch: int

    @staticmethod
    def of(cfg: TrainConfig, num_samples: int, world_size: int) -> Plan:
        """Work them out."""
        global_batch = cfg.batch_size * cfg.accumulation * world_size
        return Plan(
            num_samples=num_samples,
            global_batch=global_batch,
            steps=total_steps(num_samples, cfg.epochs, global_batch),
            steps_per_epoch=max(1, math.ceil(num_samples / global_batch)),
        )


class _Gates(nn.Module):
    """What the engine wraps: all gates, or one of them alone."""

    def __init__(self, stack: GateStack) -> None:
        super().__init__()
        self.stack = stack

    def forward(self, features_BLF: Tensor, layer: int | None = None) -> Tensor:
        if layer is None:
            return self.stack(features_BLF)
        return self.stack.gate(layer, features_BLF[:, layer - 1])


class GateTraining:
    """One training of one stack of gates; :meth:`run` does it."""

    def __init__(
        self, cfg: TrainConfig, gates: GateStack, train: Trace, validation: Trace | None, who: Processes
    ) -> None:
        self.cfg, self.train, self.validation, self.who = cfg, train, validation, who
        self.plan = Plan.of(cfg, len(train), who.world_size)
        self.num_layers = train.num_layers
        self.gates = gates.float()
        # Nothing is left to leave after the last layer: its gate is never asked.
        self.gates.gates[-1].requires_grad_(False)
        self.order = SampleOrder(len(train), cfg.seed)
        self.objective = self._objective()
        settings = engine_config(cfg, who.world_size)
        self.zero_stage = stage_of(settings)
        self.engine = self._start_engine(settings)
        self.checkpoints = Checkpoints(cfg.output_dir / "checkpoints", cfg.checkpoint.keep, who)

    def resume(self) -> int:
        """Load the newest whole checkpoint; the step to go on from, 0 if there is none."""
        found = self.checkpoints.agreed()
        if found is None:
            return 0
        path, state = found
        check_resumable(state, self._state(state.step))
        self.checkpoints.load(self.engine, path)
        return state.step

    def run(self, start: int, report: Report, advance: Callable[[int], None]) -> None:
        """Train from step ``start`` to the end.

        Parameters
        ----------
        report:
            Takes ``(step, figures)``; called on every process, figures are the same on all.
        advance:
            Called after each optimiser step, for a progress bar.

        Raises
        ------
        TrainingError
            If a loss is not finite; the message names the samples, and the last checkpoint stays.
        """
        cfg, plan = self.cfg, self.plan
        began, seen = time.perf_counter(), 0
        for step in range(start, plan.steps):
            loss = self._step(step)
            done = step + 1
            seen += plan.global_batch
            if done % cfg.tracking.log_every == 0 or done == plan.steps:
                rate = seen / (time.perf_counter() - began)
                figures = {"loss": self.who.mean(loss), "learning_rate": self._learning_rate()}
                report(done, {**figures, "epoch": done / plan.steps_per_epoch, "samples_per_second": rate})
            if self.validation is not None and (done % plan.steps_per_epoch == 0 or done == plan.steps):
                report(done, self._validate())
            if done % cfg.checkpoint.every_steps == 0 or done == plan.steps:
                self._check_weights(done)
                self.checkpoints.save(self.engine, self._state(done))
            advance(1)

    def gathered(self) -> dict[str, Tensor]:
        """The gates' weights on the CPU, whatever the ZeRO stage; all processes must call this."""
        if self.zero_stage < 3:
            return {name: tensor.detach().cpu().clone() for name, tensor in self.gates.state_dict().items()}
        deepspeed = import_deepspeed()
        with deepspeed.zero.GatheredParameters(list(self.gates.parameters())):
            return {name: tensor.detach().cpu().clone() for name, tensor in self.gates.state_dict().items()}

    def close(self) -> None:
        """Let go of the engine (its buffers outlive it otherwise)."""
        self.engine.destroy()

    def _step(self, step: int) -> float:
        """One optimiser step; this process's mean loss over its micro-steps."""
        cfg, total = self.cfg, 0.0
        drawn = set()
        for micro in range(cfg.accumulation):
            layer = None
            if cfg.objective.one_layer_per_step:
                layer = drawn_layer(cfg.seed, step * cfg.accumulation + micro, self.num_layers)
                drawn.add(layer)
            batch = self._batch(step, micro)
            logits = self.engine(batch.features, layer)
            loss = self.objective(logits, batch, layer=layer) if layer else self.objective(logits, batch)
            self._check_finite(loss, step, batch.sample_ids)
            self.engine.backward(loss)
            total += float(loss.detach())
            if layer is not None and self.engine.is_gradient_accumulation_boundary():
                self._forget_gradients_except(drawn)
            self.engine.step()
        return total / cfg.accumulation

    def _batch(self, step: int, micro: int) -> Trace:
        cfg = self.cfg
        position = step * self.plan.global_batch
        position += (micro * self.who.world_size + self.who.rank) * cfg.batch_size
        return self.train.rows(self.order.at(position, cfg.batch_size)).to(self.who.device)

    def _check_finite(self, loss: Tensor, step: int, sample_ids: Sequence[str]) -> None:
        mine = bool(torch.isfinite(loss))
        if self.who.all_true(mine):
            return
        if mine:
            raise TrainingError(f"step {step + 1}: another process met a loss that is not finite")
        raise TrainingError(
            f"step {step + 1}: the loss is {float(loss.detach())}; samples {', '.join(sample_ids)}. Training "
            f"stopped and {self._kept()}. Look at these samples' traces, or lower the learning rate"
        )

    def _check_weights(self, step: int) -> None:
        """A step whose gradients overflowed leaves no finite weights behind: never save those."""
        shards = (getattr(parameter, "ds_tensor", parameter) for parameter in self.gates.parameters())
        if not self.who.all_true(all(bool(torch.isfinite(shard).all()) for shard in shards)):
            raise TrainingError(
                f"step {step}: the gates hold weights that are not finite; training stopped before they were "
                f"saved, and {self._kept()}. Lower the learning rate"
            )

    def _kept(self) -> str:
        found = self.checkpoints.latest()
        return f"the last good checkpoint is {found[0]}" if found else "there is no checkpoint yet"

    def _forget_gradients_except(self, layers: set[int]) -> None:
        # DeepSpeed fills missing gradients with zeros, and a zero gradient still moves Adam.
        for k, gate in enumerate(self.gates.gates, start=1):
            if k not in layers:
                for parameter in gate.parameters():
                    parameter.grad = None

    def _validate(self) -> dict[str, Any]:
        with torch.no_grad():
            parts = [
                self.engine(self.validation.features[start : start + 512].to(self.who.device)).cpu()
                for start in range(0, len(self.validation), 512)
            ]
        logits_BL = torch.cat(parts)
        figures = validation_figures(logits_BL, self.validation, self.gates.config.threshold)
        objective = self.objective(logits_BL, self.validation)
        return {"validation/objective": float(objective), **figures}

    def _objective(self) -> Callable[..., Tensor]:
        settings = self.cfg.objective
        function = get_objective(settings.name)
        if settings.name == "expected_risk":
            return partial(function, lam=settings.lam, span=settings.span)
        if settings.name == "safe_label":
            labels_BL = safe_labels(self.train, settings.epsilon)
            balance = class_balance(labels_BL) if settings.balance else None
            return partial(function, epsilon=settings.epsilon, balance_2L=balance)
        return function

    def _start_engine(self, settings: dict[str, Any]) -> Any:
        deepspeed = import_deepspeed()
        cfg = self.cfg.optimizer
        parameters = [parameter for parameter in self.gates.parameters() if parameter.requires_grad]
        optimizer = torch.optim.AdamW(parameters, lr=cfg.learning_rate, weight_decay=cfg.weight_decay)
        factor = lr_factor(cfg.schedule, self.plan.steps, cfg.warmup_ratio)
        engine, *_ = deepspeed.initialize(
            model=_Gates(self.gates).to(self.who.device),
            optimizer=optimizer,
            lr_scheduler=torch.optim.lr_scheduler.LambdaLR(optimizer, factor),
            model_parameters=parameters,
            config=settings,
        )
        return engine

    def _learning_rate(self) -> float:
        return float(self.engine.get_lr()[0])

    def _state(self, step: int) -> RunState:
        return RunState(
            step=step,
            global_batch=self.plan.global_batch,
            world_size=self.who.world_size,
            zero_stage=self.zero_stage,
        )
