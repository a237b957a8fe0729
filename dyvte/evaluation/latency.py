"""Time to first token and per token, policies side by side.

Policies take turns on the same batches, so that whatever else the machine does hits all of them alike; the
ratio to the plain model (no exits installed) is taken turn by turn, and its median reported.
"""

from __future__ import annotations

import os
import platform
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch

from dyvte.backbones import generate_greedily
from dyvte.evaluation.generation import Batch, Pipeline
from dyvte.evaluation.scores import GenerationTimes, Machine
from dyvte.evaluation.settings import NamedPolicy
from dyvte.runtime import ImageStore, VisualExit

PLAIN = "plain"
"""The model without anything installed."""


@dataclass(frozen=True, kw_only=True)
class PrefillTimes:
    """Median time of the prefill per question; the ratio is to the plain model, turn by turn."""

    prefill_ms_per_question: float
    prefill_ratio: float


@torch.inference_mode()
def measure_prefill(
    pipeline: Pipeline, batches: Sequence[Batch], policies: Sequence[NamedPolicy], repeats: int = 5
) -> dict[str, PrefillTimes]:
    """Time of the prefill, vision tower included.

    Parameters
    ----------
    pipeline : the backbone.
    batches : encoded questions.
    policies : what is timed beside the plain model.
    repeats : turns on each batch; one more warms up.

    Returns
    -------
    dict
        By policy name; the plain model is :data:`PLAIN`.
    """

    def prefill(batch: Batch) -> dict[str, float]:
        wait = _synchroniser(pipeline.device)
        wait()
        start = time.perf_counter()
        pipeline.model(**batch.inputs, use_cache=True, logits_to_keep=1)
        wait()
        return {"prefill": (time.perf_counter() - start) / len(batch.question_ids)}

    taken = _take_turns(pipeline, batches, policies, repeats, prefill)
    return {
        name: PrefillTimes(
            prefill_ms_per_question=1000 * statistics.median(own["prefill"]),
            prefill_ratio=_ratio(own["prefill"], taken[PLAIN]["prefill"]),
        )
        for name, own in taken.items()
    }


@torch.inference_mode()
def measure_generation(
    pipeline: Pipeline,
    batches: Sequence[Batch],
    policies: Sequence[NamedPolicy],
    repeats: int = 5,
    new_tokens: int = 8,
    new_store: Callable[[], ImageStore | None] | None = None,
) -> dict[str, GenerationTimes]:
    """Time to first token and time per further token of ``generate``, for whole batches.

    Every row generates ``new_tokens`` tokens, whatever it says. The time to the first token holds the vision
    tower, the prefill and the choice of the token; a batch's rows all wait for it.

    Parameters
    ----------
    pipeline : the backbone.
    batches : encoded questions.
    policies : what is timed beside the plain model.
    repeats : turns on each batch; one more warms up.
    new_tokens : of every row.
    new_store : makes a store of images for each turn of each batch; None: every question computes its own.

    Returns
    -------
    dict
        By policy name; the plain model is :data:`PLAIN`.
    """

    def generate(batch: Batch) -> dict[str, float]:
        clock = _TokenClock(_synchroniser(pipeline.device))
        generate_greedily(
            pipeline.model, batch.inputs, new_tokens, min_new_tokens=new_tokens, stopping_criteria=[clock]
        )
        first, last = clock.times[1] - clock.times[0], clock.times[-1] - clock.times[1]
        steps = len(clock.times) - 2
        return {"first": first, **({"next": last / steps} if steps else {})}

    taken = _take_turns(pipeline, batches, policies, repeats, generate, new_store)
    result = {}
    for name, own in taken.items():
        plain = taken[PLAIN]
        result[name] = GenerationTimes(
            time_to_first_token_ms=1000 * statistics.median(own["first"]),
            first_token_ratio=_ratio(own["first"], plain["first"]),
            time_per_token_ms=1000 * statistics.median(own["next"]) if own.get("next") else None,
            per_token_ratio=_ratio(own["next"], plain["next"]) if own.get("next") else None,
        )
    return result


class _TokenClock:
    """A stopping criterion that never stops: notes when each token is there."""

    def __init__(self, wait: Callable[[], None]) -> None:
        self.wait = wait
        self.wait()
        self.times = [time.perf_counter()]

    def __call__(self, input_ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
        self.wait()
        self.times.append(time.perf_counter())
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)


def _take_turns(
    pipeline: Pipeline,
    batches: Sequence[Batch],
    policies: Sequence[NamedPolicy],
    repeats: int,
    measure: Callable[[Batch], dict[str, float]],
    new_store: Callable[[], ImageStore | None] | None = None,
) -> dict[str, dict[str, list[float]]]:
    """What ``measure`` says of every batch, in ``repeats`` turns, under every policy and the plain model."""
    runs: list[tuple[str, VisualExit | None]] = [(PLAIN, None)]
    runs += [(named.name, named.exits()) for named in policies]
    taken: dict[str, dict[str, list[float]]] = {name: defaultdict(list) for name, _ in runs}
    for batch in batches:
        for turn in range(repeats + 1):
            for name, exits in runs:
                store = None if new_store is None else new_store()
                with nullcontext() if exits is None else exits(pipeline.model, images=store) as run:
                    if run is not None:
                        run.sample_ids = batch.question_ids
                    measured = measure(batch)
                if turn == 0:
                    continue  # the first turn warms up
                for key, value in measured.items():
                    taken[name][key].append(value)
    return taken


def _ratio(taken: Sequence[float], plain: Sequence[float]) -> float:
    """Median of the ratios turn by turn."""
    return statistics.median(a / b for a, b in zip(taken, plain, strict=True))


def _synchroniser(device: torch.device) -> Callable[[], None]:
    return torch.cuda.synchronize if device.type == "cuda" else lambda: None


def even_batches(num_batches: int, wanted: int) -> list[int]:
    """Indices of ``wanted`` batches, evenly over all of them.

    Parameters
    ----------
    num_batches
        How many there are.
    wanted
        How many to choose.
    """
    wanted = min(wanted, num_batches)
    return [(2 * i + 1) * num_batches // (2 * wanted) for i in range(wanted)]


def machine() -> Machine:
    """What is measured on here."""
    return Machine(
        processor=platform.processor() or platform.machine(),
        cores=os.cpu_count(),
        torch_threads=torch.get_num_threads(),
        gpu=torch.cuda.get_device_name() if torch.cuda.is_available() else None,
    )
