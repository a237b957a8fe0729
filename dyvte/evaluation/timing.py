"""Time to first token, policies side by side.

Policies take turns on the same batches, so that whatever else the machine does hits all of them alike; the
ratio to the plain model (no exits installed) is taken turn by turn, and its median reported.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import torch

from dyvte.evaluation.asking import Asker, Batch
from dyvte.evaluation.policies import NamedPolicy
from dyvte.runtime import VisualExit


@torch.inference_mode()
def measure_prefill(
    asker: Asker, batches: Sequence[Batch], policies: Sequence[NamedPolicy], repeats: int = 5
) -> dict[str, dict[str, float]]:
    """Median milliseconds per question of the prefill (vision tower included), and ratio to the plain model.

    Returns
    -------
    dict
        ``{policy name: {"prefill_ms_per_question", "prefill_ratio"}}``; the plain model is under ``"plain"``.
    """
    runs: list[tuple[str, Any]] = [("plain", None)]
    runs += [(named.name, VisualExit.from_policy(named.policy)) for named in policies]
    seconds: dict[str, list[float]] = {name: [] for name, _ in runs}
    for batch in batches:
        for turn in range(repeats + 1):
            for name, exits in runs:
                taken = _time_once(asker, batch, exits) / len(batch.question_ids)
                if turn > 0:  # the first turn warms up
                    seconds[name].append(taken)
    return {name: _summary(taken, seconds["plain"]) for name, taken in seconds.items()}


def _summary(taken: Sequence[float], plain: Sequence[float]) -> dict[str, float]:
    return {
        "prefill_ms_per_question": 1000 * statistics.median(taken),
        "prefill_ratio": statistics.median(a / b for a, b in zip(taken, plain, strict=True)),
    }


def _time_once(asker: Asker, batch: Batch, exits: VisualExit | None) -> float:
    wait = _synchroniser(asker.device)
    with nullcontext() if exits is None else exits(asker.model) as run:
        if run is not None:
            run.sample_ids = batch.question_ids
        wait()
        start = time.perf_counter()
        asker.model(**batch.inputs, use_cache=True, logits_to_keep=1)
        wait()
        return time.perf_counter() - start


def _synchroniser(device: torch.device) -> Callable[[], None]:
    return torch.cuda.synchronize if device.type == "cuda" else lambda: None


def spread_batches(num_batches: int, wanted: int) -> list[int]:
    """Indices of ``wanted`` batches, evenly over all of them."""
    wanted = min(wanted, num_batches)
    return [(2 * i + 1) * num_batches // (2 * wanted) for i in range(wanted)]


def machine() -> Mapping[str, Any]:
    """What a timing was measured on."""
    import os
    import platform

    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {
        "processor": platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
        "gpu": gpu,
    }
