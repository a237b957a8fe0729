"""The keeper of the engine's book of requests: a logits processor that changes no logits.

Logits processors are the interface by which vLLM tells the process that runs the model, before each forward
pass, which prompt each row of the batch belongs to. Entry point ``vllm.logits_processors``; where an engine
does not use dyvte it does nothing.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor
from vllm.v1.sample.logits_processor import BatchUpdate, LogitsProcessor, MoveDirectionality

from dyvte.plugins.vllm.options import options_of


class BookKeeper(LogitsProcessor):
    """Writes down who comes, goes and moves."""

    def __init__(self, vllm_config: Any, device: Any, is_pin_memory: bool) -> None:
        options = options_of(vllm_config)
        self.book = None if options is None else options.book

    def is_argmax_invariant(self) -> bool:
        """It changes nothing."""
        return True

    def apply(self, logits: Tensor) -> Tensor:
        """The logits."""
        return logits

    def update_state(self, batch_update: BatchUpdate | None) -> None:
        """Follow the batch."""
        if self.book is None or batch_update is None:
            return
        self.book.update(
            batch_update.removed,
            [(row, tokens or (), _tag(params)) for row, params, tokens, _ in batch_update.added],
            [(one, other, way is MoveDirectionality.SWAP) for one, other, way in batch_update.moved],
        )


def _tag(params: Any) -> str | None:
    given = (getattr(params, "extra_args", None) or {}).get("dyvte_id")
    return None if given is None else str(given)
