"""Rendered prompts and images to model inputs, with the answer's tokens marked.

Shapes: B rows, N tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from dyvte.backbones.prompts import RenderedPrompt
from dyvte.errors import DataError


def takes_videos(processor: Any) -> bool:
    """Whether a processor has its own way to show a video: a video processor and a video placeholder."""
    return (
        getattr(processor, "video_processor", None) is not None
        and getattr(processor, "video_token", None) is not None
    )


def encode(
    processor: Any,
    rendered: Sequence[RenderedPrompt],
    images: Sequence[Sequence[Any]],
    *,
    padding_side: str,
    max_length: int | None = None,
    as_videos: bool = False,
) -> tuple[dict[str, Tensor], Tensor]:
    """Tokenise a batch; each image placeholder becomes its run of visual tokens.

    Parameters
    ----------
    rendered
        One prompt for each row.
    images
        PIL images of each row, in the order of its placeholders; an empty list for a row without.
    padding_side
        "left" (generation) or "right".
    max_length
        Longest row allowed, in tokens; longer ones are an error, never cut.
    as_videos
        Each row's images are the frames of one video, whose place is the row's single image placeholder.

    Returns
    -------
    inputs, answer_mask_BN
        The model's keyword arguments, and True on answer label tokens, closing EOS included.

    Raises
    ------
    DataError
        If placeholders and images do not agree, a row is too long, or an answer has no token.
    """
    if len(rendered) != len(images):
        raise DataError(
            f"{len(rendered)} prompts but {len(images)} lists of images: expected one list for each"
        )
    for row, (prompt, row_images) in enumerate(zip(rendered, images, strict=True)):
        expected = 1 if as_videos else len(row_images)
        if (found := prompt.text.count(processor.image_token)) != expected:
            raise DataError(f"row {row}: {found} image placeholders in the prompt, {expected} images given")
    tokenizer = processor.tokenizer
    if not getattr(tokenizer, "is_fast", False):
        raise DataError("the tokenizer gives no character offsets: a fast (tokenizers) version is needed")
    texts = [prompt.text for prompt in rendered]
    if as_videos:
        texts = [text.replace(processor.image_token, processor.video_token) for text in texts]
        shown = {"videos": [list(row) for row in images]}
    else:
        shown = {"images": [image for row in images for image in row] or None}
    bos = tokenizer.bos_token
    # A chat template may write the BOS itself; a second one would change every state.
    writes_bos = bool(bos) and all(prompt.text.startswith(bos) for prompt in rendered)
    batch = processor(
        text=texts,
        **shown,
        return_tensors="pt",
        padding=True,
        padding_side=padding_side,
        add_special_tokens=not writes_bos,
        return_offsets_mapping=True,
    )
    offsets_BN2 = torch.as_tensor(batch.pop("offset_mapping"))
    inputs = {name: value for name, value in batch.items() if isinstance(value, Tensor)}
    valid_BN = inputs["attention_mask"].bool()
    lengths = valid_BN.sum(1).tolist()
    if max_length is not None and max(lengths) > max_length:
        rows = [row for row, n in enumerate(lengths) if n > max_length]
        raise DataError(f"rows {rows} have up to {max(lengths)} tokens, more than max_length {max_length}")
    return inputs, _answer_mask(rendered, offsets_BN2, valid_BN)


def _answer_mask(rendered: Sequence[RenderedPrompt], offsets_BN2: Tensor, valid_BN: Tensor) -> Tensor:
    # The answer is the text's end, so its length counted from the end survives the placeholders' expansion.
    ends_BN = offsets_BN2[..., 1].masked_fill(~valid_BN, 0)
    text_end_B = ends_BN.amax(1)
    tail_B = torch.tensor(
        [len(p.text) - p.answer_start if p.answer_start is not None else 0 for p in rendered]
    )
    has_answer_B = torch.tensor([p.answer_start is not None for p in rendered])
    mask_BN = valid_BN & (ends_BN > (text_end_B - tail_B)[:, None]) & has_answer_B[:, None]
    empty = (has_answer_B & ~mask_BN.any(1)).nonzero().flatten().tolist()
    if empty:
        raise DataError(f"rows {empty} have an answer without any token: the tokenizer dropped its text")
    return mask_BN
