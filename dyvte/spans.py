"""Where the image and the text sit in a batch of token ids: the only place that decides it.

Shapes: B rows, N tokens (padding included).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Spans:
    """Token masks of a batch, each (B, N) bool.

    Attributes
    ----------
    valid_BN
        Tokens that are not padding.
    visual_BN
        Placeholders that the model overwrites with vision features. All other tokens are text.
    prefix_BN
        Text before the first visual token; empty in a row without an image.
    prompt_BN
        Text after the last visual token and before the answer: what the gates read. In a row without an
        image, all text before the answer.
    answer_BN
        Answer label tokens, closing EOS included.
    """

    valid_BN: Tensor
    visual_BN: Tensor
    prefix_BN: Tensor
    prompt_BN: Tensor
    answer_BN: Tensor


def visual_mask(input_ids_BN: Tensor, visual_token_ids: Iterable[int]) -> Tensor:
    """(B, N) bool: the id is one of ``visual_token_ids``. No copy to the host.

    Parameters
    ----------
    input_ids_BN
        (B, N) token ids.
    visual_token_ids
        Of the placeholders.
    """
    mask_BN = torch.zeros_like(input_ids_BN, dtype=torch.bool)
    for token_id in visual_token_ids:
        mask_BN |= input_ids_BN == int(token_id)
    return mask_BN


def find_spans(
    input_ids_BN: Tensor,
    visual_token_ids: Iterable[int],
    attention_mask_BN: Tensor | None = None,
    answer_mask_BN: Tensor | None = None,
) -> Spans:
    """Split a batch into visual, prefix, prompt and answer tokens.

    Parameters
    ----------
    input_ids_BN
        Token ids after the processor expanded the image placeholders.
    visual_token_ids
        Ids of the placeholders (`Backbone.visual_token_ids`).
    attention_mask_BN
        1 for real tokens; left or right padding. None: no padding.
    answer_mask_BN
        True on answer label tokens. None: the batch holds prompts only.

    Raises
    ------
    ValueError
        If a mask does not have the shape of the ids.
    """
    if input_ids_BN.dim() != 2:
        raise ValueError(f"input_ids must be (batch, tokens), got shape {tuple(input_ids_BN.shape)}")
    valid_BN = _like(input_ids_BN, attention_mask_BN, "attention_mask", fill=True)
    answer_BN = _like(input_ids_BN, answer_mask_BN, "answer_mask", fill=False) & valid_BN
    visual_BN = visual_mask(input_ids_BN, visual_token_ids) & valid_BN

    # Running counts instead of positions: they need no special case for rows without images or answers.
    seen_visual_BN = visual_BN.cumsum(1)
    visual_left_BN = seen_visual_BN[:, -1:] - seen_visual_BN
    seen_answer_BN = answer_BN.cumsum(1)
    text_BN = valid_BN & ~visual_BN
    has_image_B1 = visual_BN.any(1, keepdim=True)
    prefix_BN = text_BN & (seen_visual_BN == 0) & has_image_B1
    prompt_BN = text_BN & (visual_left_BN == 0) & (seen_answer_BN == 0)
    return Spans(valid_BN, visual_BN, prefix_BN, prompt_BN, answer_BN)


def up_to_image(spans: Spans) -> Tensor:
    """(B, N) bool: tokens up to each row's last visual one; none in a row without an image."""
    seen_BN = spans.visual_BN.cumsum(1)
    behind_BN = (seen_BN == seen_BN[:, -1:]) & ~spans.visual_BN
    return spans.valid_BN & ~behind_BN


def text_between(spans: Spans) -> bool:
    """Does any row have text between its visual tokens?"""
    return bool((up_to_image(spans) & ~spans.visual_BN & ~spans.prefix_BN).any())


def _like(input_ids_BN: Tensor, mask_BN: Tensor | None, name: str, *, fill: bool) -> Tensor:
    if mask_BN is None:
        return torch.full_like(input_ids_BN, fill, dtype=torch.bool)
    if mask_BN.shape != input_ids_BN.shape:
        raise ValueError(
            f"{name} has shape {tuple(mask_BN.shape)}, "
            f"expected that of input_ids, {tuple(input_ids_BN.shape)}"
        )
    return mask_BN.to(device=input_ids_BN.device, dtype=torch.bool)
