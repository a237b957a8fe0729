"""Position ids behind an exit: kept as they were, or closed up over the gap (VTW, Table 6, "rearrange").

Closed up: in the layers behind a row's exit its text counts on without a gap from its first text token; new
tokens continue that count, layer by layer. A token's id is then its own less the visual tokens that left
between the row's first text token and it.

Shapes: B rows, N tokens of the padded batch, T text tokens of the longest exited row, Q new tokens.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from dyvte.backbones import Backbone, has_deepstack
from dyvte.decoder import Layout, Window
from dyvte.errors import ConfigError, ExitRuntimeError, UnsupportedBackboneError

CHOICES = ("keep", "rearrange")
# Rotary embeddings whose angles depend on the longest position of the batch, not on the token's own alone.
LENGTH_DEPENDENT = {"dynamic", "longrope"}


def check_choice(positions: str) -> None:
    """Raise ConfigError where this is no way to number tokens behind an exit."""
    if positions not in CHOICES:
        raise ConfigError(f"positions {positions!r}: expected one of {', '.join(map(repr, CHOICES))}")


def check_rearrange(backbone: Backbone, windows: Sequence[Window | None]) -> None:
    """Raise where a decoder's positions cannot be closed up layer by layer.

    Raises
    ------
    UnsupportedBackboneError
        Naming the reason: M-RoPE, deepstack, sliding windows, or positions that are not one rotary embedding.
    """
    reason = _reason(backbone, windows)
    if reason is not None:
        kind = backbone.model.config.model_type
        raise UnsupportedBackboneError(
            f"positions='rearrange' cannot serve {kind}: {reason}. Use positions='keep'"
        )


def _reason(backbone: Backbone, windows: Sequence[Window | None]) -> str | None:
    decoder = backbone.decoder
    rope = getattr(decoder.config, "rope_parameters", None) or {}
    rotary = getattr(decoder, "rotary_emb", None)
    if "mrope_section" in rope or hasattr(rotary, "mrope_section"):
        return "M-RoPE gives every token three positions, and those of the image say where later text stands"
    if has_deepstack(backbone):
        return "deepstack adds vision features at several layers, at the tokens' first positions"
    if any(windows):
        return "its sliding windows or chunks are rules about the first positions"
    if rope.get("rope_type") in LENGTH_DEPENDENT:
        return f"its '{rope['rope_type']}' rotary embedding depends on the length of the whole sequence"
    if rotary is None or list(inspect.signature(rotary.forward).parameters) != ["x", "position_ids"]:
        return "its positions do not come from one rotary embedding of position ids"
    return None


def dropped_before(layout: Layout) -> Tensor:
    """(B, N) int64: visual tokens between a row's first text token and each token, on the host."""
    visual_BN = layout.spans.visual_BN
    seen_BN = visual_BN.cumsum(1)
    first_B1 = layout.text_BN.to(torch.uint8).argmax(1, keepdim=True)
    return (seen_BN - seen_BN.gather(1, first_B1)).clamp(min=0)


def close_up(rotary: Any, hidden: Tensor, kwargs: dict[str, Any], shift: Tensor) -> dict[str, Any]:
    """Position arguments of a layer with `shift` taken off the ids, (B, Q) or (B, 1).

    Raises
    ------
    ExitRuntimeError
        If the layer was not given ids of text positions.
    """
    ids_BQ = kwargs.get("position_ids")
    if not isinstance(ids_BQ, Tensor) or ids_BQ.dim() != 2 or kwargs.get("position_embeddings") is None:
        raise ExitRuntimeError(
            "positions='rearrange' needs decoder layers that take position_ids and position_embeddings: "
            "use positions='keep'"
        )
    ids_BQ = ids_BQ - shift.to(ids_BQ.device)
    cos_sin = tuple(part.to(hidden.device) for part in rotary(hidden, ids_BQ))
    return {"position_ids": ids_BQ, "position_embeddings": cos_sin}
