"""Attention metadata of a smaller batch, made by the layer's own backend.

Shape letters as in `dyvte.plugins.vllm.step`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from vllm.v1.attention.backend import CommonAttentionMetadata, subclass_attention_backend

from dyvte.plugins.vllm.step import Selection

_ATTRIBUTE = "dyvte"


@dataclass(frozen=True)
class Recorded:
    """What a layer's metadata were built from.

    Attributes
    ----------
    build
        The backend's own method.
    common
        The batch as vLLM describes it to all backends, with the block table of the layer's KV cache group.
    block_size
        Tokens in a block of that table.
    short
        Requests of at most so many rows must come first (0: in any order).
    """

    build: Callable[..., Any]
    common: CommonAttentionMetadata
    block_size: int
    short: int

    def smaller(self, selection: Selection) -> tuple[Any, Tensor]:
        """Metadata of the rows that a layer computes, and their slots in its KV cache."""
        common, device = self.common, self.common.slot_mapping.device
        starts_cpu = _int32(np.concatenate(([0], np.cumsum(selection.lengths_V))))
        seq_lens_cpu = _int32(selection.seq_lens_V)
        slots_R = self._slots(selection, device)
        table_rows_V = torch.from_numpy(selection.table_rows_V).to(device, non_blocking=True)
        batch = CommonAttentionMetadata(
            query_start_loc=starts_cpu.to(device, non_blocking=True),
            query_start_loc_cpu=starts_cpu,
            seq_lens=seq_lens_cpu.to(device, common.seq_lens.dtype, non_blocking=True),
            num_reqs=len(selection.lengths_V),
            num_actual_tokens=len(selection.rows_R),
            max_query_len=int(selection.lengths_V.max()),
            max_seq_len=int(selection.seq_lens_V.max()),
            block_table_tensor=common.block_table_tensor[table_rows_V].contiguous(),
            slot_mapping=slots_R,
            causal=True,
            seq_lens_cpu_upper_bound=seq_lens_cpu,
            is_prefilling=torch.from_numpy(selection.lengths_V > 1),
        )
        return self.build(0, batch), slots_R

    def _slots(self, selection: Selection, device: torch.device) -> Tensor:
        slots_R = self.common.slot_mapping[torch.from_numpy(selection.rows_R).to(device, non_blocking=True)]
        where = np.flatnonzero(selection.gone_R)
        if len(where):
            places = selection.places_R[where]
            blocks = np.stack((selection.table_rows_R[where], places // self.block_size))
            rows, columns = torch.from_numpy(blocks).to(device, non_blocking=True)
            offsets = torch.from_numpy(places % self.block_size).to(device, non_blocking=True)
            found = (
                self.common.block_table_tensor[rows, columns].to(slots_R.dtype) * self.block_size + offsets
            )
            slots_R[torch.from_numpy(where).to(device, non_blocking=True)] = found
        return slots_R


@functools.lru_cache
def recording(backend: Any) -> Any:
    """The backend, whose metadata remember what they were built from (`recorded`)."""
    base = backend.get_builder_cls()

    class RecordingBuilder(base):  # type: ignore[misc, valid-type]
        """The backend's builder."""

        def build(self, common_prefix_len: int, common_attn_metadata: Any, *args: Any, **kwargs: Any) -> Any:
            """As the backend does."""
            found = super().build(common_prefix_len, common_attn_metadata, *args, **kwargs)
            return self._noted(found, common_attn_metadata)

        def update_block_table(self, metadata: Any, blk_table: Tensor, slot_mapping: Tensor) -> Any:
            """As the backend does, for a group of layers with a block table of its own."""
            found = super().update_block_table(metadata, blk_table, slot_mapping)
            common = getattr(metadata, _ATTRIBUTE).common
            return self._noted(found, common.replace(block_table_tensor=blk_table, slot_mapping=slot_mapping))

        def _noted(self, metadata: Any, common: Any) -> Any:
            size, short = self.kv_cache_spec.block_size, self.reorder_batch_threshold or 0
            setattr(metadata, _ATTRIBUTE, Recorded(super().build, common, size, short))
            return metadata

    return subclass_attention_backend("Dyvte", backend, RecordingBuilder)


def recorded(metadata: Any) -> Recorded | None:
    """What a layer's metadata were built from; None where that was not seen."""
    return getattr(metadata, _ATTRIBUTE, None)


def _int32(values: np.ndarray) -> Tensor:
    return torch.from_numpy(values.astype(np.int32))
