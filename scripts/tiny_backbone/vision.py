"""Vision pre-training: the tower learns to say, at each patch, what the patch's cell holds.

Trained from scratch jointly with the language model the tower stays blind for a long time; a few minutes
of dense labels (content, colour, digit, direction, background) give it sight. The heads are thrown away.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from dyvte.data.scenes.render import CELL, IMAGE_SIZE, render
from dyvte.data.scenes.world import (
    ARROW,
    BACKGROUNDS,
    COLORS,
    DIGIT,
    DIRECTIONS,
    GRID,
    SHAPE,
    SHAPES,
    START,
    Scene,
    draw_scene,
)
from tiny_backbone.model import pixels_to_input
from tiny_backbone.optim import MasterOptimizer, schedule, split_parameters

HEADS = {"content": len(SHAPES) + 4, "color": len(COLORS), "digit": 10, "direction": 4, "background": 5}
_COLOR_ID = {c: i for i, c in enumerate(COLORS)}
_CONTENT_ID = {s: i + 1 for i, s in enumerate(SHAPES)} | {DIGIT: 6, START: 7, ARROW: 8}
_DIRECTION_ID = {d: i for i, d in enumerate(DIRECTIONS)}
_BACKGROUND_ID = {b: i for i, b in enumerate(BACKGROUNDS)}


def cell_labels(scene: Scene) -> np.ndarray:
    """(16, 5) labels per cell in the order of HEADS; -100 where a label does not apply."""
    labels = np.full((GRID * GRID, len(HEADS)), -100, dtype=np.int64)
    labels[:, 0] = 0
    labels[:, 4] = _BACKGROUND_ID[scene.background]
    for row, item in zip(labels, scene.cells, strict=True):
        if item is None:
            continue
        row[0] = _CONTENT_ID[item.name if item.kind == SHAPE else item.kind]
        if item.color:
            row[1] = _COLOR_ID[item.color]
        if item.kind == DIGIT:
            row[2] = int(item.name)
        if item.kind in (START, ARROW):
            row[3] = _DIRECTION_ID[item.name]
    return labels


def _batch(split: str, first: int, count: int, seed: int, patch: int) -> tuple[torch.Tensor, torch.Tensor]:
    scenes = [draw_scene(split, i, seed) for i in range(first, first + count)]
    pixels = pixels_to_input(np.stack([render(s) for s in scenes]))
    side, per_cell = IMAGE_SIZE // patch, CELL // patch
    rows = np.arange(side) // per_cell
    patch_to_cell = (rows[:, None] * GRID + rows[None, :]).reshape(-1)
    labels = np.stack([cell_labels(s)[patch_to_cell] for s in scenes])
    return pixels, torch.from_numpy(labels)


class PatchHeads(nn.Module):
    """Linear read-outs of the last hidden states at every patch; only for pre-training."""

    def __init__(self, width: int):
        super().__init__()
        self.heads = nn.ModuleDict({name: nn.Linear(width, size) for name, size in HEADS.items()})

    def forward(self, hidden: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, dict[str, float]]:
        """Summed cross-entropy of the heads and each head's accuracy."""
        total, accuracy = hidden.new_zeros((), dtype=torch.float32), {}
        for i, (name, head) in enumerate(self.heads.items()):
            wanted = labels[..., i]
            mask = wanted >= 0
            logits = head(hidden[mask]).float()
            total = total + F.cross_entropy(logits, wanted[mask])
            accuracy[name] = (logits.argmax(-1) == wanted[mask]).float().mean().item()
        return total, accuracy


def pretrain(tower: nn.Module, *, steps: int, batch: int, seed: int, first: int, log) -> dict[str, float]:
    """Train `tower` (a CLIP vision model, bf16 in place) for `steps`; returns held-out accuracies."""
    patch = tower.config.patch_size
    heads = PatchHeads(tower.config.hidden_size).bfloat16()
    both = nn.ModuleDict({"tower": tower.bfloat16(), "heads": heads})
    optimizer = MasterOptimizer(*split_parameters(both, ("embedding", "heads")), muon_lr=0.01, adam_lr=0.003)
    for step in range(steps):
        pixels, labels = _batch("train", first + step * batch, batch, seed, patch)
        hidden = tower(pixels.bfloat16(), output_hidden_states=True).hidden_states[-1][:, 1:]
        loss, accuracy = heads(hidden, labels)
        loss.backward()
        optimizer.step(schedule(step, steps))
        if step % 50 == 0 or step == steps - 1:
            log({"stage": "vision", "step": step, "steps": steps, "loss": loss.item(), **accuracy})
    with torch.no_grad():
        pixels, labels = _batch("validation", 0, 512, seed, patch)
        hidden = tower(pixels.bfloat16(), output_hidden_states=True).hidden_states[-1][:, 1:]
        _, accuracy = heads(hidden, labels)
    log({"stage": "vision", "held_out": accuracy})
    return accuracy
