"""Text that reads stored images: all rows that read one image go through it together, and no row copies it.

Attention over two sets of keys is the mean of the attention over each, weighted by the sums of their
exponentials. So the queries of all rows that read the same tokens are taken through these as if they were
further queries of one row, each row's own tokens are read apart, and the parts are put together. Where that
is not known to be all of a layer's attention, keys and values are copied for each row as usual.

Shapes: R rows, T own tokens of a group, W keys that it borrows, H heads, G heads of keys, V borrowed tokens,
d head size.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from dyvte.decoder.attention import attention_of, use_attention
from dyvte.decoder.caches import KeysValues

_FLASH = getattr(torch.ops.aten, "_scaled_dot_product_flash_attention_for_cpu", None)
# What a layer may tell its attention that changes nothing here: the mask holds it, or nobody asks.
_HARMLESS = {
    *("dropout", "is_causal", "sliding_window", "position_ids", "cache_position", "position_embeddings"),
    *("use_cache", "output_attentions", "output_hidden_states", "return_dict", "logits_to_keep"),
}


@dataclass(frozen=True)
class Read:
    """Rows that borrow the same tokens, the first of their columns, and how many there are."""

    rows: slice
    start: int
    count: int


def may_read_apart(implementation: str, device: torch.device) -> bool:
    """Is the attention one that says its sums (torch's own on a CPU), and not forbidden by `sdpa_kernel`?

    Parameters
    ----------
    implementation
        Its name in transformers.
    device
        Where it runs.
    """
    told = _FLASH is not None and device.type == "cpu" and implementation == "sdpa"
    return told and torch.backends.cuda.flash_sdp_enabled() and not torch.is_grad_enabled()


def own_mask(mask: Tensor, reads: Sequence[Read], real_RT: Tensor) -> Tensor | None:
    """(R, 1, T, T) additive mask of the own tokens alone; None where a borrowed token is hidden from a query.

    Parameters
    ----------
    mask
        (R, 1, T, W + T) bool or additive, of all keys.
    reads
        What is borrowed.
    real_RT
        (R, T) bool: queries that are no padding.
    """
    if mask.dim() != 4 or mask.shape[1] != 1:
        return None
    seen = mask if mask.dtype == torch.bool else mask == 0
    skipped = ~real_RT.to(mask.device)[:, None, :, None]
    for read in reads:
        columns = seen[read.rows, :, :, read.start : read.start + read.count]
        if not bool((columns | skipped[read.rows]).all()):
            return None
    own = mask[..., mask.shape[3] - mask.shape[2] :]
    if own.dtype == torch.bool:
        own = torch.zeros(own.shape).masked_fill(~own, -math.inf)
    # A query of padding reads whatever there is: what comes out is finite, and dropped.
    return own.masked_fill(skipped, 0.0)


@contextmanager
def reading_apart(
    layer: nn.Module,
    reads: Sequence[Read],
    known: Sequence[KeysValues],
    own: Tensor,
    copied: Callable[[Tensor, Tensor], KeysValues],
) -> Iterator[None]:
    """Inside, the layer's attention reads borrowed tokens without copies of them.

    Parameters
    ----------
    layer
        A decoder layer with `dyvte.decoder.attention.attention_of`.
    reads, known
        What is borrowed, and keys and values (1, G, V, d) of each.
    own
        From `own_mask`.
    copied
        All keys and values of all rows, from the own ones: for what cannot be read apart.
    """

    def attend(
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        scaling: float | None = None,
        **options: Any,
    ) -> tuple[Tensor, None]:
        odd = {name for name, given in options.items() if given is not None} - _HARMLESS
        if odd or key.shape[-1] != value.shape[-1] or options.get("dropout"):
            from transformers import AttentionInterface

            plain = AttentionInterface()["sdpa"]
            keys, values = copied(key, value)
            return plain(module, query, keys, values, attention_mask, scaling=scaling, **options)
        heads = query.shape[1] // key.shape[1]
        repeated = (key, value) if heads == 1 else tuple(x.repeat_interleave(heads, 1) for x in (key, value))
        states, sums = _flash(query, *repeated, own.to(query.dtype), scaling)
        for read, one in zip(reads, known, strict=True):
            theirs, their_sums = _through(query[read.rows], one, heads, scaling)
            before = sums[read.rows]
            share = torch.sigmoid(their_sums - before)[..., None].to(states.dtype)
            states[read.rows] = torch.lerp(states[read.rows], theirs, share)
            sums[read.rows] = torch.logaddexp(before, their_sums)
        return states.transpose(1, 2).contiguous(), None

    undo = use_attention(attention_of(layer), attend)
    try:
        yield
    finally:
        undo()


def _through(query: Tensor, known: KeysValues, heads: int, scaling: float | None) -> tuple[Tensor, Tensor]:
    """(R, H, T, d) what all rows read of the same tokens, and (R, H, T) log of the exponentials' sums."""
    rows, _, tokens, size = query.shape
    keys, values = known
    groups = keys.shape[1]
    # (1, G, heads x R x T, d): the heads that share keys, the rows and their tokens are queries alike.
    split = query.view(rows, groups, heads, tokens, size).permute(1, 2, 0, 3, 4)
    states, sums = _flash(split.reshape(1, groups, -1, size), keys, values, None, scaling)
    states = states.reshape(groups, heads, rows, tokens, size).permute(2, 0, 1, 3, 4)
    sums = sums.reshape(groups, heads, rows, tokens).permute(2, 0, 1, 3)
    return states.flatten(1, 2), sums.flatten(1, 2)


def _flash(
    query: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None, scaling: float | None
) -> tuple[Tensor, Tensor]:
    return _FLASH(query, keys.to(query), values.to(query), 0.0, False, attn_mask=mask, scale=scaling)
