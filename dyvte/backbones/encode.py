"""Rendered prompts and images to model inputs, with the answer's tokens marked.

Shapes: B rows, N tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from dyvte.backbones.prompts import RenderedPrompt
from dyvte.errors import ConfigError, DataError


def takes_videos(processor: Any) -> bool:
    """Whether a processor has its own way to show a video: a video processor and a video placeholder.

    Parameters
    ----------
    processor
        Of a transformers model.
    """
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
    processor
        The model's own: tokenizer and image processor in one.
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
    ConfigError
        If the tokenizer has no pad token, or is none of the fast ones.
    """
    if len(rendered) != len(images):
        raise DataError(
            f"{len(rendered)} prompts but {len(images)} lists of images: expected one list for each"
        )
    for row, (prompt, row_images) in enumerate(zip(rendered, images, strict=True)):
        expected = 1 if as_videos else len(row_images)
        if (found := prompt.text.count(processor.image_token)) != expected:
            raise DataError(f"row {row}: {found} image placeholders in the prompt, {expected} images given")
    tokenizer = _usable_tokenizer(processor)
    texts = [prompt.text for prompt in rendered]
    if as_videos:
        texts = [text.replace(processor.image_token, processor.video_token) for text in texts]
        shown = {"videos": [list(row) for row in images]}
    else:
        shown = {"images": [image for row in images for image in row] or None}
    has_answers = any(prompt.answer_start is not None for prompt in rendered)
    batch = processor(
        text=texts,
        **shown,
        return_tensors="pt",
        padding=True,
        padding_side=padding_side,
        add_special_tokens=not _writes_bos(tokenizer, texts),
        # To make a tensor of them takes long: they are asked for where something is read from them.
        return_offsets_mapping=has_answers,
    )
    inputs = {name: value for name, value in batch.items() if isinstance(value, Tensor)}
    if has_answers:
        inputs["offset_mapping"] = torch.as_tensor(batch["offset_mapping"])
    inputs = _without_closing(inputs, tokenizer, texts)
    offsets_BN2 = inputs.pop("offset_mapping", None)
    valid_BN = inputs["attention_mask"].bool()
    lengths = valid_BN.sum(1).tolist()
    if max_length is not None and max(lengths) > max_length:
        rows = [row for row, n in enumerate(lengths) if n > max_length]
        raise DataError(f"rows {rows} have up to {max(lengths)} tokens, more than max_length {max_length}")
    if offsets_BN2 is None:
        return inputs, torch.zeros_like(valid_BN)
    return inputs, _answer_mask(rendered, offsets_BN2, valid_BN)


def check_prompt(processor: Any, rendered: RenderedPrompt) -> None:
    """Tokenise a prompt's text alone.

    Parameters
    ----------
    processor
        Whose tokenizer it is.
    rendered
        Of a template.

    Raises
    ------
    DataError
        If its answer has no token. The tokenizer's own errors are passed on.
    """
    tokenizer = _usable_tokenizer(processor)
    batch = tokenizer([rendered.text], add_special_tokens=False, return_offsets_mapping=True)
    offsets_BN2 = torch.tensor(batch["offset_mapping"]).reshape(1, -1, 2)
    _answer_mask([rendered], offsets_BN2, torch.ones(offsets_BN2.shape[:2], dtype=torch.bool))


def closing_tokens(tokenizer: Any) -> int:
    """Number of special tokens that a tokenizer adds behind a text (an EOS, a separator)."""
    bare = tokenizer("a", add_special_tokens=False)["input_ids"]
    whole = tokenizer("a", add_special_tokens=True)["input_ids"]
    for before in range(len(whole) - len(bare) + 1):
        if whole[before : before + len(bare)] == bare:
            return len(whole) - before - len(bare)
    return 0


def _usable_tokenizer(processor: Any) -> Any:
    tokenizer = processor.tokenizer
    if not getattr(tokenizer, "is_fast", False):
        raise ConfigError("the tokenizer gives no character offsets: a fast (tokenizers) version is needed")
    if tokenizer.pad_token is None:
        raise ConfigError(
            "the tokenizer has no pad token, so no batch can be made: name one as pad_token in "
            "tokenizer_config.json beside the model (in Python: processor.tokenizer.pad_token), its "
            "eos_token if there is no other (what is padded is masked)"
        )
    return tokenizer


def _writes_bos(tokenizer: Any, texts: Sequence[str]) -> bool:
    """A chat template may write the BOS itself; a second one would change every state."""
    bos = tokenizer.bos_token
    return bool(bos) and all(text.startswith(bos) for text in texts)


def _without_closing(inputs: dict[str, Tensor], tokenizer: Any, texts: Sequence[str]) -> dict[str, Tensor]:
    """A batch without what the tokenizer added behind the texts: an answer goes on where its prompt ends, and
    the template closes it."""
    count = 0 if _writes_bos(tokenizer, texts) else closing_tokens(tokenizer)
    if not count:
        return inputs
    valid_BN = inputs["attention_mask"].bool()
    seen_BN = valid_BN.cumsum(1)
    kept_BN = valid_BN & (seen_BN <= seen_BN[:, -1:] - count)
    columns_N = kept_BN.any(0)
    cut = {
        name: value[:, columns_N]
        for name, value in inputs.items()
        if value.shape[:2] == valid_BN.shape and not value.is_floating_point()
    }
    kept_BN = kept_BN[:, columns_N]
    cut["attention_mask"] = kept_BN.to(inputs["attention_mask"].dtype)
    cut["input_ids"] = cut["input_ids"].masked_fill(~kept_BN, tokenizer.pad_token_id)
    return {**inputs, **cut}


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
