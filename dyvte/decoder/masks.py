"""Attention masks cut down to some queries and keys.

Shapes: B rows, N tokens of the padded batch, Q query slots, K key slots.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dyvte.decoder.slots import Slots
from dyvte.errors import UnsupportedBackboneError


def cut_mask(mask: Any, queries: Slots, keys: Slots, implementation: str) -> Tensor:
    """The attention mask of some queries and keys, cut out of the mask that a layer was given.

    Whatever rule the model put into the mask (windows, bidirectional images, prefix text) is kept, because
    only rows and columns are removed from it. Empty key slots are hidden; an empty query slot sees what the
    token sees that it repeats, so no query is left without a key.

    Parameters
    ----------
    mask
        (B, 1, N, N) bool or additive, (B, N) padding (flash), or None (causal, no padding).
    queries, keys
        Tokens of each row.
    implementation
        The attention implementation's name in transformers.

    Raises
    ------
    UnsupportedBackboneError
        If the mask has another form.
    """
    if "flash" in implementation:
        return _flash_mask(mask, keys, implementation)
    if mask is None:
        mask = queries.index[:, None, :, None] >= keys.index[:, None, None, :]
    elif isinstance(mask, Tensor) and mask.dim() == 4:
        mask = cut_square(mask, queries.index, keys.index)
    else:
        raise _unreadable(mask, implementation, "'sdpa' or 'eager'")
    return hide_keys(mask, keys.valid)


def sees(mask: Any, queries_BN: Tensor, keys_BN: Tensor) -> bool:
    """May any of some tokens attend to any of some later tokens (as in a prefix-LM)? Not under causal masks,
    which are those that are not 4D.

    Parameters
    ----------
    mask
        As a layer takes it.
    queries_BN, keys_BN
        (B, N) bool: the tokens.
    """
    if not isinstance(mask, Tensor) or mask.dim() != 4:
        return False
    allowed_BNN = mask[:, 0] if mask.dtype == torch.bool else mask[:, 0] >= 0
    return bool((allowed_BNN & queries_BN[:, :, None] & keys_BN[:, None, :]).any())


def cut_square(mask: Tensor, queries_BQ: Tensor, keys_BK: Tensor | None) -> Tensor:
    """(B, H, Q, K) rows and columns of a (B or 1, H, N, N) mask; keys None: all columns.

    Parameters
    ----------
    mask
        Bool or additive.
    queries_BQ, keys_BK
        Indices of the tokens that stay.
    """
    mask = mask.expand(len(queries_BQ), -1, -1, -1)
    index = queries_BQ.to(mask.device)[:, None, :, None]
    mask = mask.gather(2, index.expand(-1, mask.shape[1], -1, mask.shape[-1]))
    if keys_BK is None:
        return mask
    index = keys_BK.to(mask.device)[:, None, None, :]
    return mask.gather(3, index.expand(-1, *mask.shape[1:3], -1))


def hide_keys(mask: Tensor, seen_BK: Tensor) -> Tensor:
    """A (B, H, Q, K) mask, bool or additive, that also hides all keys but these.

    Parameters
    ----------
    mask
        The tokens' own.
    seen_BK
        (B, K) bool: the keys that stay visible.
    """
    hidden = ~seen_BK.to(mask.device)[:, None, None, :]
    if mask.dtype == torch.bool:
        return mask & ~hidden
    return mask.masked_fill(hidden, torch.finfo(mask.dtype).min)


def _flash_mask(mask: Any, keys: Slots, implementation: str) -> Tensor:
    """2D padding mask; flash attention aligns the queries to the last keys by itself.

    Always given: without one, transformers reads gaps in the position ids as borders of packed sequences.
    """
    if mask is not None and not (isinstance(mask, Tensor) and mask.dim() == 2):
        raise _unreadable(mask, implementation, "'sdpa'")
    return keys.valid.to(torch.int64)


def _unreadable(mask: Any, implementation: str, instead: str) -> UnsupportedBackboneError:
    form = f"shape {tuple(mask.shape)}" if isinstance(mask, Tensor) else f"type {type(mask).__name__}"
    return UnsupportedBackboneError(
        f"an attention mask of {form} of implementation {implementation!r} cannot be cut "
        f"to fewer tokens: load the backbone with attn_implementation={instead}"
    )
