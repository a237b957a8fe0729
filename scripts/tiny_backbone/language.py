"""Language training: projector and decoder learn to answer, over a tower that already sees.

Every batch is a function of the step number alone, so a run that is killed and started again continues
with the same batches. Optionally, in the last part of the training, questions lose the visual tokens after
a random layer half of the time ("random exits"): that shapes an earlier region where visual tokens are no
longer needed. The checkpoint in this repository was made without it.
"""

from __future__ import annotations

import os
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch

from dyvte.data.scenes.questions import TYPES
from tiny_backbone.model import pixels_to_input
from tiny_backbone.optim import MasterOptimizer, schedule, split_parameters
from tiny_backbone.packing import GROUP, Batch, PackedAttention, install, make_batch, packed_loss


@dataclass(frozen=True, kw_only=True)
class LanguageConfig:
    """Recipe of the language stage; the defaults made the checkpoint in this repository."""

    steps: int = 2000
    scenes: int = 16
    """Scenes per process and step."""
    questions: int = 24
    describe_share: float = 0.3
    """Share of the steps during which four of the questions of a scene are row descriptions."""
    random_exit_share: float = 0.0
    """Share of the steps, at the end, with random exits; 0: natural training."""
    first_random_exit: int = 3
    muon_lr: float = 0.01
    adam_lr: float = 0.003
    seed: int = 0
    save_every: int = 200
    first_scene: int = 0


class LanguageTrainer:
    """Owns the bf16 model, its fp32 masters and the packed attention."""

    def __init__(self, model, tokenizer, config: LanguageConfig, rank: int = 0, world: int = 1):
        self.model, self.config = model.bfloat16(), config
        self.rank, self.world = rank, world
        self.vocabulary = tokenizer.get_vocab()
        self.prefix_ids = torch.tensor([[tokenizer.bos_token_id, self.vocabulary["user"]]])
        visual = model.config.image_seq_length
        self.attention = PackedAttention(self.prefix_ids.shape[1], visual)
        install(self.attention, model)
        self.num_layers = model.config.text_config.num_hidden_layers
        model.model.vision_tower.requires_grad_(False)
        trained = torch.nn.ModuleDict(
            {
                "projector": model.model.multi_modal_projector,
                "text": model.model.language_model,
                "head": model.lm_head,
            }
        )
        parts = split_parameters(trained, ("embed_tokens", "head"))
        self.optimizer = MasterOptimizer(*parts, muon_lr=config.muon_lr, adam_lr=config.adam_lr)
        self.step = 0

    def features(self, batch: Batch) -> torch.Tensor:
        """Projected visual features (B, V, D); the tower runs without gradient."""
        core = self.model.model
        with torch.no_grad():
            pixels = pixels_to_input(batch.images).bfloat16()
            hidden = core.vision_tower(pixels, output_hidden_states=True).hidden_states[-1][:, 1:]
        return core.multi_modal_projector(hidden)

    def batch_of(self, step: int) -> Batch:
        """The training batch of `step`."""
        c = self.config
        describes = 4 if step < c.describe_share * c.steps else 0
        first = c.first_scene + (step * self.world + self.rank) * c.scenes
        batch = make_batch("train", first, c.scenes, c.questions, describes, self.vocabulary, c.seed)
        if step >= (1 - c.random_exit_share) * c.steps:
            rng = np.random.default_rng([c.seed, 99, step, self.rank])
            layers = rng.integers(c.first_random_exit, self.num_layers, size=(c.scenes, c.questions))
            layers[rng.random(layers.shape) < 0.5] = self.num_layers
            batch.exits = list(torch.from_numpy(layers).split(GROUP, dim=1))
        return batch

    def train(self, until: int, folder: Path, log) -> None:
        """Train up to step `until` (at most `config.steps`), saving the state every `save_every` steps."""
        began, first = time.time(), self.step
        running = []
        while self.step < until:
            batch = self.batch_of(self.step)
            out = packed_loss(self.model, self.attention, self.features(batch), batch, self.prefix_ids)
            if not torch.isfinite(out["loss"]):
                raise RuntimeError(f"loss is not finite at step {self.step}; lower muon_lr and resume")
            out["loss"].backward()
            self.average_gradients()
            self.optimizer.step(schedule(self.step, self.config.steps))
            running.append((out["loss"].item(), out["right"].float().mean().item()))
            self.step += 1
            if self.step % 50 == 0 and self.rank == 0:
                loss, right = np.mean(running, axis=0)
                pace = (time.time() - began) / (self.step - first)
                eta = pace * (until - self.step) / 60
                log({"stage": "language", "step": self.step, "loss": loss, "right": right, "eta_min": eta})
                running = []
            if self.rank == 0 and (self.step % self.config.save_every == 0 or self.step == until):
                self.save(folder)

    def average_gradients(self) -> None:
        """Mean over the processes, in one message; every process then takes the same optimiser step."""
        if self.world == 1:
            return
        live = [p for p in self.optimizer.live if p.grad is not None]
        flat = torch.cat([p.grad.float().reshape(-1) for p in live]).div_(self.world)
        torch.distributed.all_reduce(flat)
        start = 0
        for p in live:
            p.grad = flat[start : start + p.numel()].view_as(p).to(p.dtype)
            start += p.numel()

    def save(self, folder: Path) -> None:
        """Write the whole state atomically."""
        folder.mkdir(parents=True, exist_ok=True)
        state = {"step": self.step, "config": asdict(self.config), "optimizer": self.optimizer.state_dict()}
        temporary = folder / "state.pt.tmp"
        torch.save(state, temporary)
        os.replace(temporary, folder / "state.pt")

    def resume(self, folder: Path) -> bool:
        """Load the state of an earlier run of the same recipe, if there is one."""
        path = folder / "state.pt"
        if not path.exists():
            return False
        state = torch.load(path, weights_only=True)
        changed = {k: v for k, v in asdict(self.config).items() if state["config"].get(k) != v}
        changed.pop("steps", None)
        if changed:
            raise RuntimeError(
                f"{path} was made with other settings for {sorted(changed)}; use another --work folder"
            )
        self.optimizer.load_state_dict(state["optimizer"])
        self.step = state["step"]
        return True

    @torch.no_grad()
    def measure(self, split: str, scenes: int, exit_layer: int | None = None, shuffle: bool = False) -> dict:
        """Exact-match accuracy per type on scenes of `split`, all questions leaving at `exit_layer`."""
        hits: dict[str, list[bool]] = {t: [] for t in TYPES}
        for first in range(0, scenes, 32):
            batch = make_batch(split, first, 32, self.config.questions, 0, self.vocabulary, self.config.seed)
            if exit_layer is not None:
                batch.exits = [torch.full((32, GROUP), exit_layer) for _ in batch.tokens]
            features = self.features(batch)
            if shuffle:
                features = features.roll(1, dims=0)
            right = packed_loss(self.model, self.attention, features, batch, self.prefix_ids)["right"].numpy()
            for kind in TYPES:
                hits[kind].extend(right[batch.types == kind].tolist())
        scores = {t: float(np.mean(h)) for t, h in hits.items() if h}
        return {"mean": float(np.mean(list(scores.values()))), **scores}
