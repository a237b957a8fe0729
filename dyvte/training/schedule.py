"""Which samples a step sees, which layer it draws, which learning rate it has: functions of seed and step
alone.

Nothing here keeps state, so a resumed run goes on exactly where the killed one stood.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch


class SampleOrder:
    """An endless stream of sample indices: one seeded permutation of all samples after the other."""

    def __init__(self, num_samples: int, seed: int) -> None:
        if num_samples < 1:
            raise ValueError("there is no sample to train on")
        self.num_samples, self.seed = num_samples, seed
        self._epoch, self._order = -1, torch.empty(0, dtype=torch.long)

    def at(self, start: int, count: int) -> torch.Tensor:
        """Indices at positions ``start`` .. ``start + count - 1`` of the stream."""
        found = []
        while count > 0:
            epoch, offset = divmod(start, self.num_samples)
            part = self._permutation(epoch)[offset : offset + count]
            found.append(part)
            start, count = start + len(part), count - len(part)
        return torch.cat(found)

    def _permutation(self, epoch: int) -> torch.Tensor:
        if epoch != self._epoch:
            self._order = torch.randperm(self.num_samples, generator=_generator(self.seed, 1, epoch))
            self._epoch = epoch
        return self._order


def drawn_layer(seed: int, micro_step: int, num_layers: int) -> int:
    """A layer of 1..L-1, the same on all ranks.

    Parameters
    ----------
    seed
        Of the run.
    micro_step
        From 0.
    num_layers
        L.
    """
    return 1 + int(torch.randint(num_layers - 1, (), generator=_generator(seed, 2, micro_step)))


def drawn_exits(
    seed: int, step: int, count: int, *, first: int, last: int, full: int, full_share: float
) -> torch.Tensor:
    """(count,) exit layers of a step's rows: ``full`` for about ``full_share`` of them, else one of
    ``first`` .. ``last``, all alike.

    Parameters
    ----------
    seed
        Of the run.
    step
        From 0.
    count
        Rows of all processes.
    first, last
        Exit layers, ends included.
    full
        L.
    full_share
        In [0, 1].
    """
    generator = _generator(seed, 4, step)
    exits = torch.randint(first, last + 1, (count,), generator=generator)
    return exits.masked_fill(torch.rand(count, generator=generator) < full_share, full)


def total_steps(num_samples: int, epochs: float, global_batch: int) -> int:
    """Optimiser steps until every sample was seen ``epochs`` times (the last step may go beyond).

    Parameters
    ----------
    num_samples
        To train on.
    epochs
        May be a fraction.
    global_batch
        Samples of a step.
    """
    return max(1, math.ceil(num_samples * epochs / global_batch))


def lr_factor(schedule: str, steps: int, warmup_ratio: float) -> Callable[[int], float]:
    """Multiplier of the peak learning rate at each step; warm-up and cosine are those of transformers.

    Parameters
    ----------
    schedule
        "constant", "linear" or "cosine".
    steps
        In all.
    warmup_ratio
        Share of the steps.
    """
    warmup = math.ceil(steps * warmup_ratio)

    def factor(step: int) -> float:
        if step < warmup:
            return step / max(1, warmup)
        progress = min(1.0, (step - warmup) / max(1, steps - warmup))
        if schedule == "cosine":
            return 0.5 * (1 + math.cos(math.pi * progress))
        return 1 - progress if schedule == "linear" else 1.0

    return factor


def held_out(image_ids: tuple[str, ...], fraction: float, seed: int) -> torch.Tensor:
    """(B,) bool: samples of the held-out images, ``fraction`` of all images.

    Parameters
    ----------
    image_ids
        Of every sample.
    fraction
        Of the images.
    seed
        Of the draw.
    """
    images = sorted(set(image_ids))
    count = round(fraction * len(images))
    if count >= len(images):
        count = len(images) - 1
    order = torch.randperm(len(images), generator=_generator(seed, 3, 0))[:count].tolist()
    chosen = {images[index] for index in order}
    return torch.tensor([image in chosen for image in image_ids], dtype=torch.bool)


def seed_of(seed: int, purpose: int, index: int) -> int:
    """A seed for one purpose at one place of a run.

    Parameters
    ----------
    seed
        Of the run.
    purpose
        A number of its own for each.
    index
        Step or sample.
    """
    # Mixed with odd constants, so that neighbouring seeds, purposes and indices share no stream.
    return (seed * 0x9E3779B97F4A7C15 + purpose * 0xBF58476D1CE4E5B9 + index * 0x94D049BB133111EB) % 2**63


def _generator(seed: int, purpose: int, index: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed_of(seed, purpose, index))
