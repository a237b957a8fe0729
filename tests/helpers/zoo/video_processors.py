"""Processors of the tiny families that take videos, torchvision's halves included.

They need torchvision: ``scripts/test_plugins.sh torchvision`` runs the tests that use them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tests.helpers.zoo.common import CLIP
from tests.helpers.zoo.processors import _CHATML, tokenizer

SIDE = CLIP["image_size"]
_CROP = {"crop_size": {"height": SIDE, "width": SIDE}}


def video_llava() -> Any:
    """Frames of 16 patches and a class token."""
    from transformers import VideoLlavaImageProcessor, VideoLlavaProcessor, VideoLlavaVideoProcessor

    size = {"size": {"shortest_edge": SIDE}, **_CROP}
    return VideoLlavaProcessor(
        image_processor=VideoLlavaImageProcessor(**size),
        video_processor=VideoLlavaVideoProcessor(**size),
        tokenizer=tokenizer("<image>", start="<a>", end="<b>", video="<video>"),
        patch_size=CLIP["patch_size"],
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=_CHATML.format(image="<image>\n"),
    )


def llava_onevision() -> Any:
    """Frames pooled to 2 x 2 tokens, a newline behind the last."""
    from transformers import (
        LlavaOnevisionImageProcessor,
        LlavaOnevisionProcessor,
        LlavaOnevisionVideoProcessor,
    )

    size = {"size": {"height": SIDE, "width": SIDE}}
    return LlavaOnevisionProcessor(
        image_processor=LlavaOnevisionImageProcessor(**size, image_grid_pinpoints=[[SIDE, SIDE]]),
        video_processor=LlavaOnevisionVideoProcessor(**size),
        tokenizer=tokenizer("<image>", start="<a>", end="<b>", video="<video>"),
        num_image_tokens=(SIDE // CLIP["patch_size"]) ** 2,
        vision_feature_select_strategy="full",
        chat_template=_CHATML.format(image="<image>\n"),
    )


def qwen2_vl() -> Any:
    """Two frames a step, as many tokens as they are large."""
    from transformers import Qwen2VLProcessor

    return _qwen(Qwen2VLProcessor)


def qwen2_5_vl() -> Any:
    """As Qwen2-VL."""
    from transformers import Qwen2_5_VLProcessor

    return _qwen(Qwen2_5_VLProcessor)


def internvl() -> Any:
    """Four tokens a tile."""
    from transformers import (
        GotOcr2ImageProcessor,
        InternVLProcessor,
        InternVLVideoProcessor,
        PreTrainedTokenizerFast,
    )

    names = {
        "start_image": "<img>",
        "end_image": "</img>",
        "context_image": "<IMG_CONTEXT>",
        "video": "<video>",
    }
    plain = tokenizer("<IMG_CONTEXT>", start="<img>", end="</img>", video="<video>", eos="<|im_end|>")
    # As the checkpoints have it: the tokenizer itself knows these by name, and keeps them in its folder.
    words = PreTrainedTokenizerFast(
        tokenizer_object=plain.backend_tokenizer,
        **{f"{name}_token": getattr(plain, f"{name}_token") for name in ("bos", "eos", "pad", "unk")},
        extra_special_tokens={f"{name}_token": token for name, token in names.items()},
        padding_side="left",
        clean_up_tokenization_spaces=False,
    )
    size = {"size": {"height": SIDE, "width": SIDE}}
    return InternVLProcessor(
        image_processor=GotOcr2ImageProcessor(**size, crop_to_patches=True, min_patches=1, max_patches=3),
        video_processor=InternVLVideoProcessor(**size),
        tokenizer=words,
        image_seq_length=4,
        chat_template=_CHATML.format(image="<IMG_CONTEXT>\n"),
    )


def _qwen(kind: Any) -> Any:
    from transformers import Qwen2VLImageProcessor, Qwen2VLVideoProcessor

    patches = {"patch_size": 4, "merge_size": 2, "temporal_patch_size": 2}
    size = {"size": {"shortest_edge": 64, "longest_edge": 1024}}
    return kind(
        image_processor=Qwen2VLImageProcessor(**patches, **size),
        video_processor=Qwen2VLVideoProcessor(**patches, **size),
        tokenizer=tokenizer(
            "<|image_pad|>",
            start="<|vision_start|>",
            end="<|vision_end|>",
            video="<|video_pad|>",
            eos="<|im_end|>",
        ),
        chat_template=_CHATML.format(image="<|vision_start|><|image_pad|><|vision_end|>"),
    )


VIDEO_PROCESSORS: dict[str, Callable[[], Any]] = {
    "video_llava": video_llava,
    "llava_onevision": llava_onevision,
    "qwen2_vl": qwen2_vl,
}
