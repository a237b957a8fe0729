"""The training loop: DeepSpeed's engine, resuming, checkpoints, metrics. What a step is, subclasses say."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from dyvte.distributed import Processes
from dyvte.errors import TrainingError
from dyvte.tracing.zero import stage_of, start_engine
from dyvte.training.checkpoints import Checkpoints, RunState, check_resumable
from dyvte.training.config import TrainConfig
from dyvte.training.schedule import SampleOrder, lr_factor, total_steps
from dyvte.training.zero import engine_config

log = logging.getLogger(__name__)
Report = Callable[[int, Mapping[str, Any]], None]


@dataclass(frozen=True)
class TrainingSize:
    """Numbers of a run that follow from its configuration, its data and its processes."""

    num_samples: int
    global_batch: int
    steps: int
    steps_per_epoch: int

    @staticmethod
    def of(cfg: TrainConfig, num_samples: int, world_size: int) -> TrainingSize:
        """From a configuration, its data and its processes.

        Parameters
        ----------
        cfg
            Of the run.
        num_samples
            To train on.
        world_size
            Number of processes.
        """
        global_batch = cfg.batch_size * cfg.accumulation * world_size
        return TrainingSize(
            num_samples=num_samples,
            global_batch=global_batch,
            steps=total_steps(num_samples, cfg.epochs, global_batch),
            steps_per_epoch=max(1, math.ceil(num_samples / global_batch)),
        )


class Training:
    """One training; :meth:`run` does it. A subclass says what a micro-step's loss is, and how it fares.

    Parameters
    ----------
    module:
        What the engine wraps, checkpoints hold and the optimiser moves: its parameters with a gradient.
    num_samples:
        Samples to train on; :meth:`drawn` says which of them a micro-step sees.
    """

    validates = False
    """Is there anything to validate on?"""
    trained = "weights"
    """What is trained, for messages."""

    def __init__(self, cfg: TrainConfig, module: nn.Module, num_samples: int, processes: Processes) -> None:
        self.cfg, self.module, self.processes = cfg, module, processes
        self.size = TrainingSize.of(cfg, num_samples, processes.world_size)
        self.order = SampleOrder(num_samples, cfg.seed)
        settings = engine_config(cfg, processes.world_size)
        self.zero_stage = stage_of(settings)
        self.engine = self._start_engine(settings)
        self.checkpoints = Checkpoints(cfg.output_dir / "checkpoints", cfg.checkpoint.keep, processes)

    def micro_step(self, step: int, micro: int) -> AbstractContextManager[tuple[Tensor, Sequence[str]]]:
        """Loss and sample ids of this process's micro-step; the backward pass runs inside the block."""
        raise NotImplementedError(f"{type(self).__name__} defines no `micro_step`")

    def before_update(self, step: int) -> None:
        """Called when the gradients of a step are complete."""

    def validate(self) -> dict[str, Any]:
        """Metrics on held-out samples; called by all processes after each epoch."""
        return {}

    def weights(self) -> dict[str, Tensor]:
        """What was trained, on the CPU, by name; called by all processes when the training is done."""
        return {name: tensor.detach().cpu().clone() for name, tensor in self.module.state_dict().items()}

    def drawn(self, step: int, micro: int) -> Tensor:
        """Indices of the samples that this process sees in a micro-step."""
        return self.order.at(self.position(step, micro), self.cfg.batch_size)

    def position(self, step: int, micro: int) -> int:
        """Where in the stream of all samples this process's micro-step begins."""
        place = (micro * self.processes.world_size + self.processes.rank) * self.cfg.batch_size
        return step * self.size.global_batch + place

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
            Takes ``(step, metrics)``; called on every process, metrics are the same on all.
        advance:
            Called after each optimiser step, for a progress bar.

        Raises
        ------
        TrainingError
            If a loss is not finite; the message names the samples, and the last checkpoint stays.
        """
        cfg, size = self.cfg, self.size
        began, seen = time.perf_counter(), 0
        for step in range(start, size.steps):
            loss = self._step(step)
            done = step + 1
            seen += size.global_batch
            if done % cfg.tracking.log_every == 0 or done == size.steps:
                rate = seen / (time.perf_counter() - began)
                metrics = {"loss": self.processes.mean(loss), "learning_rate": self._learning_rate()}
                report(done, {**metrics, "epoch": done / size.steps_per_epoch, "samples_per_second": rate})
            if self.validates and (done % size.steps_per_epoch == 0 or done == size.steps):
                report(done, self.validate())
            if done % cfg.checkpoint.every_steps == 0 or done == size.steps:
                self._check_weights(done)
                self.checkpoints.save(self.engine, self._state(done))
            advance(1)

    def close(self) -> None:
        """Let go of the engine (its buffers outlive it otherwise)."""
        self.engine.destroy()

    def _step(self, step: int) -> float:
        """One optimiser step; this process's mean loss over its micro-steps."""
        total = 0.0
        for micro in range(self.cfg.accumulation):
            with self.micro_step(step, micro) as (loss, sample_ids):
                self._check_finite(loss, step, sample_ids)
                self.engine.backward(loss)
            total += float(loss.detach())
            if self.engine.is_gradient_accumulation_boundary():
                self.before_update(step)
            self.engine.step()
        return total / self.cfg.accumulation

    def _check_finite(self, loss: Tensor, step: int, sample_ids: Sequence[str]) -> None:
        mine = bool(torch.isfinite(loss))
        if self.processes.all_true(mine):
            return
        if mine:
            raise TrainingError(f"step {step + 1}: another process met a loss that is not finite")
        raise TrainingError(
            f"step {step + 1}: the loss is {float(loss.detach())}; samples {', '.join(sample_ids)}. Training "
            f"stopped and {self._kept()}. Look at these samples, or lower the learning rate"
        )

    def _check_weights(self, step: int) -> None:
        """A step whose gradients overflowed leaves no finite weights behind: never save those."""
        shards = (getattr(parameter, "ds_tensor", parameter) for parameter in self.module.parameters())
        if not self.processes.all_true(all(bool(torch.isfinite(shard).all()) for shard in shards)):
            raise TrainingError(
                f"step {step}: the {self.trained} hold weights that are not finite; training stopped before "
                f"they were saved, and {self._kept()}. Lower the learning rate"
            )

    def _kept(self) -> str:
        found = self.checkpoints.latest()
        return f"the last good checkpoint is {found[0]}" if found else "there is no checkpoint yet"

    def _start_engine(self, settings: dict[str, Any]) -> Any:
        cfg = self.cfg.optimizer
        parameters = [parameter for parameter in self.module.parameters() if parameter.requires_grad]
        optimizer = torch.optim.AdamW(parameters, lr=cfg.learning_rate, weight_decay=cfg.weight_decay)
        factor = lr_factor(cfg.schedule, self.size.steps, cfg.warmup_ratio)
        return start_engine(
            self.cfg.deepspeed,
            settings,
            model=self.module.to(self.processes.device),
            optimizer=optimizer,
            lr_scheduler=torch.optim.lr_scheduler.LambdaLR(optimizer, factor),
            model_parameters=parameters,
        )

    def _learning_rate(self) -> float:
        return float(self.engine.get_lr()[0])

    def _state(self, step: int) -> RunState:
        return RunState(
            step=step,
            global_batch=self.size.global_batch,
            world_size=self.processes.world_size,
            zero_stage=self.zero_stage,
        )
