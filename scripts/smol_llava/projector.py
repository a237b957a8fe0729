"""Stage 0: the projector is regressed onto embeddings of the words that name what each patch shows.

Each cell of a scene is four patches. Its upper left patch is to look like the word of its colour, the upper
right one and the lower left one like the word of its content, the lower right one like the background's; row
and column words are added. So visual tokens start out WORD-LIKE: nothing later keeps them so, but whoever
studies these visual tokens has to know it.
"""

from __future__ import annotations

import numpy as np
import torch

from dyvte.data.scenes.render import render
from dyvte.data.scenes.world import DIGIT, GRID, SHAPE, START, Scene, draw_scene

_ORDINALS = (" first", " second", " third", " fourth")
_NUMBERS = (" one", " two", " three", " four")
_PLACE_SHARE = 0.5


class WordTargets:
    """What the projector is to give for a scene, from the decoder's input embeddings."""

    def __init__(self, packer, embedding: torch.Tensor):
        self.packer, self.embedding = packer, embedding
        self.known: dict[str, torch.Tensor] = {}
        self.rows = [_PLACE_SHARE * self.word(w) for w in _ORDINALS]
        self.columns = [_PLACE_SHARE * self.word(w) for w in _NUMBERS]

    def word(self, text: str) -> torch.Tensor:
        """Mean embedding of the tokens of a word."""
        if text not in self.known:
            self.known[text] = self.embedding[self.packer.ids(text)].mean(0)
        return self.known[text]

    def of(self, scene: Scene) -> torch.Tensor:
        """(V, D) targets of a scene, V = 64 patches in reading order."""
        side = 2 * GRID
        grid = torch.empty(side, side, self.embedding.shape[1])
        ground = self.word(f" {scene.background}")
        for index, item in enumerate(scene.cells):
            row, col = divmod(index, GRID)
            color = name = self.word(" nothing")
            if item is not None and item.kind in (SHAPE, DIGIT):
                color = self.word(f" {item.color}")
                name = self.word(item.name if item.kind == DIGIT else f" {item.name}")
            elif item is not None:
                color, name = (
                    self.word(" orange" if item.kind == START else " arrow"),
                    self.word(f" {item.name}"),
                )
            cell = grid[2 * row : 2 * row + 2, 2 * col : 2 * col + 2]
            cell[0, 0] = color + self.rows[row]
            cell[0, 1] = name + self.columns[col]
            cell[1, 0] = name + self.rows[row] + self.columns[col]
            cell[1, 1] = ground
        return grid.flatten(0, 1)


def fit_projector(network, *, steps: int, scenes: int, seed: int, first: int, log, lr: float = 3e-3) -> float:
    """Regress the projector for `steps` batches of `scenes`; returns the last error (share of variance)."""
    targets = WordTargets(network.packer, network.decoder.embedding)
    variance = network.decoder.embedding.var()
    optimizer = torch.optim.AdamW(network.projector.parameters(), lr=lr, betas=(0.9, 0.98), weight_decay=0.0)
    for step in range(steps):
        batch = [draw_scene("train", first + step * scenes + i, seed) for i in range(scenes)]
        features = network.tower_features(np.stack([render(s) for s in batch]))
        wanted = torch.stack([targets.of(s) for s in batch])
        loss = (network.projector(features) - wanted).square().mean() / variance
        optimizer.zero_grad()
        loss.backward()
        optimizer.param_groups[0]["lr"] = lr * min(1.0, (step + 1) / 20) * (1 - step / steps)
        optimizer.step()
        if step % 50 == 0 or step == steps - 1:
            log({"stage": "projector", "step": step, "loss": loss.item()})
    return loss.item()
