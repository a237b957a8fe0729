"""Which rows of a prefill may read stored images, and why others may not.

Shapes: B rows, N tokens of the padded batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from dyvte.decoder import Layout, Slots
from dyvte.decoder.content import Content, contents_of
from dyvte.decoder.masks import sees
from dyvte.gates import reads_visual
from dyvte.policies import Plan
from dyvte.reductions import Reduction
from dyvte.runtime.image_store import ImageStore, Segment
from dyvte.runtime.positions import LENGTH_DEPENDENT
from dyvte.runtime.shared_groups import Borrowed, Lane
from dyvte.runtime.shared_rows import SharedRow, SharedRows
from dyvte.runtime.stack import Stack
from dyvte.spans import up_to_image


def reason_of_model(stack: Stack, reductions: Sequence[Reduction]) -> str | None:
    """Why no row of a block may share; None where rows may."""
    name = stack.backbone.model.config.model_type
    rope = getattr(stack.config, "rope_parameters", None) or {}
    if reductions:
        return "reductions: what they leave of an image depends on the question"
    if stack.rearranges:
        return "positions='rearrange'"
    if rope.get("rope_type") in LENGTH_DEPENDENT:
        return (
            f"{name}: its '{rope['rope_type']}' rotary embedding depends on the length of the whole sequence"
        )
    if "flash" in str(stack.config._attn_implementation) and any(stack.windows):
        return "flash attention counts a sliding window in keys"
    return None


def reason_of_pass(model: nn.Module, asked_for: Sequence[str]) -> str | None:
    """Why no row of a pass may share: gradients, or outputs that only whole rows have."""
    if torch.is_grad_enabled() and any(one.requires_grad for one in model.parameters()):
        return "gradients are on (use torch.no_grad)"
    if model.training:
        return "the model is in training mode"
    return f"{asked_for[0]} was asked for" if asked_for else None


def find_shared(
    stack: Stack,
    layout: Layout,
    plan: Plan,
    store: ImageStore,
    hidden_BND: Tensor,
    kwargs: dict[str, Any],
    *,
    plain: bool,
    may_freeze: bool,
) -> tuple[SharedRows | None, str | None]:
    """The rows that read stored images, and why other rows with an image do not.

    Parameters
    ----------
    stack, layout, plan
        The decoder, the batch, and what becomes of its visual tokens.
    store
        Where images are kept.
    hidden_BND, kwargs
        What the first layer was called with.
    plain
        The decoder makes an ordinary causal mask itself.
    may_freeze
        May gates freeze rows where they like?
    """
    name, spans = stack.backbone.model.config.model_type, layout.spans
    image_BN = up_to_image(spans) & ~spans.prefix_BN
    own_BN = spans.valid_BN & ~up_to_image(spans)
    mask = kwargs.get("attention_mask")
    if reads_visual(plan.features) and any(plan.asks(k) for k in range(stack.backbone.num_layers)):
        return None, "gates that read visual tokens"
    if not plain and sees(mask, image_BN.to(hidden_BND.device), own_BN.to(hidden_BND.device)):
        return None, f"{name}: its image tokens see the text behind them"
    shares_B, reason = layout.has_image_B & (layout.num_prompt_B > 0), None
    if (whole_B := shares_B & ~_is_gapless(spans.valid_BN)).any():
        shares_B, reason = shares_B & ~whole_B, "padding inside a row"
    if "flash" in str(stack.config._attn_implementation):
        between_B = shares_B & (image_BN & ~spans.visual_BN).any(1)
        if between_B.any():
            reason = "flash attention cannot leave out the text between visual tokens"
            shares_B = shares_B & ~between_B
    if not _has_room(stack, layout, plan, store, shares_B, hidden_BND):
        return None, "the image store is too small for one image"
    if not shares_B.any():
        return None, reason
    beside = {key: value for key, value in kwargs.items() if key != "attention_mask"}
    prefix_BN, image_BN = spans.prefix_BN & shares_B[:, None], image_BN & shares_B[:, None]
    prefixes = contents_of(Slots.of(prefix_BN), hidden_BND, beside) if prefix_BN.any() else None
    images = contents_of(Slots.of(image_BN), hidden_BND, beside)
    lanes: dict[int, Lane] = {}

    def borrowed(row: int, content: Content, before: Segment | None, mask_BN: Tensor) -> Borrowed:
        first = int(mask_BN[row].to(torch.uint8).argmax())
        is_visual_S = spans.visual_BN[row, first : first + len(content)]
        segment = store.segment(content, is_visual_S, before)
        return Borrowed(lanes.setdefault(id(segment), Lane(segment, row, first)), first)

    rows = []
    for row in shares_B.nonzero().flatten().tolist():
        before = None
        if prefixes is not None and len(prefixes[row]):
            before = borrowed(row, prefixes[row], None, prefix_BN)
        segment = None if before is None else before.lane.segment
        rows.append(SharedRow(row, before, borrowed(row, images[row], segment, image_BN)))
    wanted = _wanted(plan, shares_B, stack, may_freeze)
    return SharedRows(stack, layout, rows, wanted, store), reason


def _wanted(plan: Plan, shares_B: Tensor, stack: Stack, may_freeze: bool) -> set[int]:
    """Indices of layers before which rows freeze, or may."""
    num_layers = stack.backbone.num_layers
    if may_freeze and any(plan.asks(k) for k in range(num_layers)):
        return set(range(num_layers))
    freezes_B = shares_B & (plan.freeze_layers_B < plan.exit_layers_B.clamp(max=num_layers))
    return set(plan.freeze_layers_B[freezes_B].tolist())


def _has_room(
    stack: Stack, layout: Layout, plan: Plan, store: ImageStore, shares_B: Tensor, hidden_BND: Tensor
) -> bool:
    """Does the largest image fit into the store, as deep as its rows may need it?"""
    if not shares_B.any():
        return True
    config, hidden_size = stack.config, hidden_BND.shape[2]
    heads = getattr(config, "num_attention_heads", 1)
    head_dim = getattr(config, "head_dim", None) or hidden_size // heads
    width = 2 * head_dim * (getattr(config, "num_key_value_heads", None) or heads)
    tokens_B = layout.num_visual_B * (2 * hidden_size + plan.exit_layers_B * width)
    return store.has_room_for(int(tokens_B[shares_B].max()) * hidden_BND.element_size())


def _is_gapless(valid_BN: Tensor) -> Tensor:
    """(B,) bool: a row's padding stands at its ends alone."""
    starts_B = (valid_BN[:, 1:] & ~valid_BN[:, :-1]).sum(1) + valid_BN[:, 0]
    return starts_B <= 1
