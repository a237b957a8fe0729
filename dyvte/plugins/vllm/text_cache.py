"""Less KV memory with a fixed exit: the layers behind it set none aside for visual tokens.

These layers become a KV cache group of their own, whose manager counts text tokens only. vLLM has registries
for kinds of caches, their managers and schedulers, but calls the interfaces of the last two not public: hence
the switch ``text_only_cache``.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterable
from typing import Any

from vllm.utils.math_utils import cdiv
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.core.single_type_kv_cache_manager import FullAttentionManager
from vllm.v1.kv_cache_interface import AttentionSpec
from vllm.v1.kv_cache_spec_registry import register_kv_cache_spec

Spans = list[tuple[int, int]]
"""Where visual tokens lie in a request: (offset, length) each."""


class TextOnlyManager(FullAttentionManager):
    """Gives a request blocks for its text tokens. Its scheduler tells it where visual tokens lie."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.visual_spans: dict[str, Spans] = {}

    def get_num_blocks_to_allocate(self, request_id: str, num_tokens: int, *args: Any, **kwargs: Any) -> int:
        """As for a request of its text alone."""
        return super().get_num_blocks_to_allocate(
            request_id, self._num_text(request_id, num_tokens), *args, **kwargs
        )

    def allocate_new_blocks(self, request_id: str, num_tokens: int, num_tokens_main_model: int) -> Any:
        """As for a request of its text alone."""
        return super().allocate_new_blocks(
            request_id,
            self._num_text(request_id, num_tokens),
            self._num_text(request_id, num_tokens_main_model),
        )

    def cache_blocks(self, *args: Any, **kwargs: Any) -> None:
        """Nothing: prefix caching is off."""

    def _num_text(self, request_id: str, num_tokens: int) -> int:
        spans = self.visual_spans.get(request_id, ())
        return num_tokens - sum(max(0, min(num_tokens - offset, length)) for offset, length in spans)


@register_kv_cache_spec(manager_class=TextOnlyManager)
@dataclasses.dataclass(frozen=True, kw_only=True)
class TextOnlySpec(AttentionSpec):
    """A layer's keys and values of text tokens."""

    def max_memory_usage_bytes(self, vllm_config: Any) -> int:
        """Of a request that is text alone."""
        return cdiv(vllm_config.model_config.max_model_len, self.block_size) * self.page_size_bytes


class _TellsSpans:
    """What a scheduler does more: the managers' own arguments do not say where visual tokens lie."""

    def add_request(self, request: Any) -> None:
        """As vLLM's."""
        # Both ends of a range are its tokens.
        spans = [
            (first, last - first + 1)
            for feature in request.mm_features
            for first, last in feature.mm_position.extract_embeds_range()
        ]
        for manager in self._managers():
            manager.visual_spans[request.request_id] = spans
        super().add_request(request)  # type: ignore[misc]

    def _free_request(self, request: Any, *args: Any, **kwargs: Any) -> Any:
        found = super()._free_request(request, *args, **kwargs)  # type: ignore[misc]
        for manager in self._managers():
            manager.visual_spans.pop(request.request_id, None)
        return found

    def _managers(self) -> list[TextOnlyManager]:
        coordinator = self.kv_cache_manager.coordinator  # type: ignore[attr-defined]
        return [one for one in coordinator.single_type_managers if isinstance(one, TextOnlyManager)]


class TextOnlyScheduler(_TellsSpans, Scheduler):
    """vLLM's scheduler."""


class AsyncTextOnlyScheduler(_TellsSpans, AsyncScheduler):
    """vLLM's asynchronous scheduler."""


def keep_text_only(layers: Iterable[Any]) -> None:
    """Let the attention of these layers ask for a cache of text tokens."""
    for layer in layers:
        attention = layer.self_attn.attn
        attention.get_kv_cache_spec = functools.partial(_text_only, attention.get_kv_cache_spec)


def _text_only(own: Any, vllm_config: Any) -> TextOnlySpec:
    full = own(vllm_config)
    return TextOnlySpec(**{f.name: getattr(full, f.name) for f in dataclasses.fields(TextOnlySpec)})
