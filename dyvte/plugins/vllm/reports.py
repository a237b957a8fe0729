"""What a user gets to see of the decisions: records, a line of the log, counters. It imports no vLLM."""

from __future__ import annotations

import logging
import multiprocessing
import os
from collections import deque
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from dyvte.plugins.vllm.book import Prompt
from dyvte.plugins.vllm.names import LOGGER

KEPT = 4096
"""Records that an engine keeps, the last ones."""

COUNTERS = ("dyvte:prompts_total", "dyvte:visual_token_layers_total")
"""As they are called under ``/metrics``."""

_SHARED_COUNTERS = "PROMETHEUS_MULTIPROC_DIR"


@dataclass(frozen=True)
class Schedule:
    """What was decided for one prompt with visual tokens.

    Attributes
    ----------
    tag
        What the user gave as ``dyvte_id`` in the request's ``extra_args``.
    num_tokens, num_visual
        Of the prompt.
    freeze_layer, exit_layer
        Layers that update the visual tokens, and in which text can read them.
    num_layers
        L.
    """

    tag: str | None
    num_tokens: int
    num_visual: int
    freeze_layer: int
    exit_layer: int
    num_layers: int

    @property
    def visual_compute(self) -> float:
        """Layers that update the visual tokens, as a share of all; what frozen ones cost is not in it."""
        return self.freeze_layer / self.num_layers


class Reports:
    """Records of one engine's prompts.

    Parameters
    ----------
    num_layers
        L.
    log
        One line for each prompt?
    """

    def __init__(self, num_layers: int, log: bool) -> None:
        self.num_layers, self.log = num_layers, log
        self.schedules: deque[Schedule] = deque(maxlen=KEPT)
        if counts_out_of_sight():
            logging.getLogger(LOGGER).info(
                "dyvte: this engine counts in a process of its own, and its counters (%s) do not appear "
                "under /metrics: set %s to an empty folder before the start",
                ", ".join(COUNTERS),
                _SHARED_COUNTERS,
            )

    def add(self, prompt: Prompt) -> None:
        """Take down a prompt that is decided and computed."""
        one = Schedule(
            tag=prompt.tag,
            num_tokens=prompt.num_tokens,
            num_visual=prompt.num_visual,
            freeze_layer=prompt.freeze_layer or 0,
            exit_layer=prompt.exit_layer or 0,
            num_layers=self.num_layers,
        )
        self.schedules.append(one)
        if self.log:
            logging.getLogger(LOGGER).info(
                "prompt%s of %d tokens, %d visual: updated in %s, read up to layer %d of %d",
                "" if one.tag is None else f" {one.tag}",
                one.num_tokens,
                one.num_visual,
                f"layers 1..{one.freeze_layer}" if one.freeze_layer else "no layer",
                one.exit_layer,
                one.num_layers,
            )
        count(one)


def counts_out_of_sight() -> bool:
    """Is this a process whose counters nobody can see? A server's engine runs in a child of the server, and
    the Prometheus client library gathers over processes only in a folder that the user names."""
    return multiprocessing.parent_process() is not None and _SHARED_COUNTERS not in os.environ


def count(one: Schedule) -> None:
    """Add a prompt to the counters, where the Prometheus client library is there."""
    found = _counters()
    if found is None:
        return
    prompts, layers = found
    prompts.labels(freeze_layer=str(one.freeze_layer), exit_layer=str(one.exit_layer)).inc()
    spent = {
        "updated": one.freeze_layer,
        "frozen": one.exit_layer - one.freeze_layer,
        "gone": one.num_layers - one.exit_layer,
    }
    for state, number in spent.items():
        layers.labels(state=state).inc(one.num_visual * number)


@lru_cache(maxsize=1)
def _counters() -> tuple[Any, Any] | None:
    """Of this process: the client library has one registry, where each name stands once."""
    try:
        from prometheus_client import Counter
    except ImportError:
        return None
    names = [name.removesuffix("_total") for name in COUNTERS]
    prompts = Counter(
        names[0], "Prompts with visual tokens, by their layers.", ["freeze_layer", "exit_layer"]
    )
    layers = Counter(
        names[1],
        "Visual tokens times layers, by what the layers did with them.",
        ["state"],
    )
    return prompts, layers
