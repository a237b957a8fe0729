"""The training loop: every batch is a function of seed and step, so a stopped run goes on where it stopped.

Each process takes one scene with all its questions per step, and now and then a text without an image. The
learning rate is a function of the step and of the schedule, which may be changed while a run is stopped:
`decay_from` / `decay_steps` let a usable checkpoint be cut at any time.
"""

from __future__ import annotations

import os
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch

from smol_llava.network import Network, answer_loss
from smol_llava.text import TextSet, text_loss

FIRST_KINDS = ("background", "existence", "color", "shape", "cell", "where", "read", "row", "column")
ALL_KINDS = (
    *FIRST_KINDS,
    *("count", "relation", "compare", "beside", "larger", "sum", "trail", "skip_color", "skip_where"),
    *("box", "describe"),
)
LAST_KINDS = (*(kind for kind in ALL_KINDS if kind not in ("count", "relation", "sum")), "color")
"""At the end: what was not learned is no longer asked, what is learned slowly twice as often."""
FIRST_SCENE = 50_000_000
"""Where the scenes of this training start; the first stages of both backbones and all files lie elsewhere."""


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """What makes the weights; a state remembers it and refuses another one, but for the schedule."""

    seed: int = 0
    processes: int = 2
    rank: int = 24
    scale: float = 2.0
    questions: int = 24
    """Questions of a scene; one scene per process and step."""
    first_steps: int = 500
    """Steps with the first types only."""
    last_from: int = 1060
    """From this step on the types of the end are asked."""
    verify_from: int = 1400
    """From this step on colours are asked four times as often, and more in yes/no form: a colour that the
    image has elsewhere was taken for that of the shape in one question of six."""
    verify_share: float = 0.6
    """Share of yes/no forms from then on; 0.3 before."""
    row_steps: int = 300
    """Steps in which each scene has two further row or column lists: they ground the visual tokens."""
    text_every: int = 3
    """A text without an image every so many steps."""
    text_weight: float = 1.0
    lora_lr: float = 1.2e-3
    projector_lr: float = 7e-4
    clip: float = 1.0
    projector_steps: int = 300
    projector_scenes: int = 24


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """Learning rate as a share of the recipe's: warm-up, plateau, linear decay to zero."""

    steps: int = 1700
    warmup: int = 40
    decay_share: float = 0.7
    warm_from: int = 0
    """Where the optimiser was new: 0, or the step of the checkpoint that training started from."""
    decay_from: int | None = None
    """Set by `--decay-now`: from this step on the rate falls from where it is to zero ..."""
    decay_steps: int = 0
    """... within so many steps, whatever the schedule says."""

    @property
    def end(self) -> int:
        """The step at which the rate is zero."""
        return self.steps if self.decay_from is None else self.decay_from + self.decay_steps

    def planned(self, step: int) -> float:
        """The share at `step` without an early decay."""
        start = int(self.steps * (1 - self.decay_share))
        warm = min(1.0, (step - self.warm_from + 1) / self.warmup)
        return warm * min(1.0, max(0.0, (self.steps - step) / max(1, self.steps - start)))

    def at(self, step: int) -> float:
        """The share at `step`."""
        if self.decay_from is None or step < self.decay_from:
            return self.planned(step)
        left = 1 - (step - self.decay_from) / max(1, self.decay_steps)
        return self.planned(self.decay_from) * max(0.0, left)


class Trainer:
    """Owns network, optimiser and step; one per process, all of them alike."""

    def __init__(self, network: Network, recipe: Recipe, schedule: Schedule, rank: int = 0):
        self.network, self.recipe, self.schedule = network, recipe, schedule
        self.rank, self.world, self.step = rank, recipe.processes, 0
        self.texts: TextSet | None = None
        adapters, projector = list(network.decoder.parameters()), list(network.projector.parameters())
        self.params = adapters + projector
        groups = [
            {"params": adapters, "lr": recipe.lora_lr},
            {"params": projector, "lr": recipe.projector_lr},
        ]
        self.optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95), weight_decay=0.0, foreach=True)

    def kinds(self, step: int) -> tuple[str, ...]:
        """Question types asked at `step`."""
        if step < self.recipe.row_steps:
            return (*FIRST_KINDS, "row", "column")
        if step >= self.recipe.verify_from:
            return (*LAST_KINDS, "color", "color")
        if step >= self.recipe.last_from:
            return LAST_KINDS
        return FIRST_KINDS if step < self.recipe.first_steps else ALL_KINDS

    def row(self, step: int):
        """This process's packed scene of `step`."""
        index, recipe = FIRST_SCENE + step * self.world + self.rank, self.recipe
        asking = {"verify_share": recipe.verify_share} if step >= recipe.verify_from else {}
        return self.network.packer.scene_row(
            "train", index, recipe.questions, self.kinds(step), recipe.seed, **asking
        )

    def losses(self, step: int) -> tuple[dict[str, float], dict[str, list[bool]]]:
        """Gradients of one step on this process; returns losses and which answers were right, by type."""
        network, row = self.network, self.row(step)
        logits = network.answer_logits(row, network.visual(row.image))
        loss = answer_loss(row, logits)
        loss.backward()
        found, right = {"loss": loss.item()}, defaultdict(list)
        for question, good in zip(row.questions, network.right(row, logits.detach()), strict=True):
            right[question.type].append(bool(good))
        if self.texts is not None and step % self.recipe.text_every == 0:
            number = (step // self.recipe.text_every * self.world + self.rank) % len(self.texts.ids)
            logits = network.text_logits(self.texts.ids[number, :-1])
            loss = text_loss(logits, self.texts.top[number], self.texts.log_odds[number])
            (self.recipe.text_weight * loss).backward()
            found["text_kl"] = loss.item()
        return found, right

    def update(self) -> float:
        """Average the gradients over the processes, take one optimiser step; returns the gradient's norm."""
        flat = torch.cat([p.grad.reshape(-1) for p in self.params])
        if torch.distributed.is_initialized():
            torch.distributed.all_reduce(flat)
            flat /= self.world
        norm = flat.norm().item()
        if not np.isfinite(norm):
            raise RuntimeError(f"the gradient is not finite at step {self.step}; resume with a lower rate")
        flat *= min(1.0, self.recipe.clip / (norm + 1e-6))
        start = 0
        for p in self.params:
            p.grad = flat[start : start + p.numel()].view_as(p)
            start += p.numel()
        share = self.schedule.at(self.step)
        rates = (self.recipe.lora_lr, self.recipe.projector_lr)
        for group, rate in zip(self.optimizer.param_groups, rates, strict=True):
            group["lr"] = rate * share
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return norm

    def train(
        self,
        folder: Path,
        log: Callable[[dict], None],
        should_stop: Callable[[], bool],
        *,
        report_every: int = 20,
        save_every: int = 60,
    ) -> bool:
        """Train to the schedule's end; False where it was told to stop before. The state is saved anyway."""
        meter, right, began, clock = defaultdict(list), defaultdict(list), time.time(), time.process_time()
        while self.step < self.schedule.end:
            if self._anyone(should_stop()):
                self.save(folder)
                return False
            found, answers = self.losses(self.step)
            found["norm"] = self.update()
            self.step += 1
            for name, value in found.items():
                meter[name].append(value)
            for kind, good in answers.items():
                right[kind].extend(good)
            if self.step % report_every == 0:
                wall, cpu = time.time() - began, time.process_time() - clock
                pairs = report_every * self.world * self.recipe.questions
                log(
                    {
                        "stage": "train",
                        "step": self.step,
                        "pairs": self.step * self.world * self.recipe.questions,
                        "rate": self.schedule.at(self.step),
                        "pairs_per_hour": round(3600 * pairs / wall),
                        "cpu_share": cpu / wall,
                        **{k: float(np.mean(v)) for k, v in meter.items()},
                        "right": {k: round(float(np.mean(v)), 3) for k, v in sorted(right.items())},
                    }
                )
                meter, right = defaultdict(list), defaultdict(list)
                began, clock = time.time(), time.process_time()
            if self.step % save_every == 0:
                self.save(folder)
        self.save(folder)
        return True

    def _anyone(self, stop: bool) -> bool:
        """All processes stop at the same step."""
        if not torch.distributed.is_initialized():
            return stop
        flag = torch.tensor([float(stop)])
        torch.distributed.all_reduce(flag)
        return bool(flag.item())

    def save(self, folder: Path) -> None:
        """Write the whole state atomically, and the adapter alone beside it; process 0 does."""
        if self.rank:
            return
        state = {
            "step": self.step,
            "recipe": asdict(self.recipe),
            "schedule": asdict(self.schedule),
            "params": [p.detach() for p in self.params],
            "optimizer": self.optimizer.state_dict(),
        }
        draft = folder / "state.pt.part"
        torch.save(state, draft)
        os.replace(draft, folder / "state.pt")

    def resume(self, folder: Path, *, with_schedule: bool = False) -> bool:
        """Load the state of an earlier run of the same recipe, if there is one; on request its schedule."""
        path = folder / "state.pt"
        if not path.exists():
            return False
        state = torch.load(path, weights_only=True)
        changed = sorted(k for k, v in asdict(self.recipe).items() if state["recipe"].get(k) != v)
        if changed:
            raise RuntimeError(
                f"{path} was made with other settings for {changed}; use another --work folder"
            )
        with torch.no_grad():
            for mine, saved in zip(self.params, state["params"], strict=True):
                mine.copy_(saved)
        self.optimizer.load_state_dict(state["optimizer"])
        self.step = state["step"]
        if with_schedule:
            self.schedule = Schedule(**state["schedule"])
        return True
