"""LLaVA-shaped families: features of a CLIP-like tower replace placeholders; an ordinary causal decoder."""

from __future__ import annotations

import torch

from tests.helpers.zoo.common import (
    CLIP,
    END,
    IMAGE,
    SIGLIP,
    START,
    TEXT,
    VIDEO,
    Built,
    ids_of,
    make,
    noise,
    one_none_two,
)


def llava_onevision(attention: str) -> Built:
    """Images of one tile, with a newline feature."""
    from transformers import LlavaOnevisionConfig, LlavaOnevisionForConditionalGeneration

    config = LlavaOnevisionConfig(
        text_config={"model_type": "qwen2", **TEXT},
        vision_config=SIGLIP,
        image_token_id=IMAGE,
        video_token_id=VIDEO,
        image_grid_pinpoints=[[16, 16]],
        vision_feature_select_strategy="full",
        vision_aspect_ratio="anyres_max_9",
        attn_implementation=attention,
    )
    # base view 16 tokens, one tile of 4 x 4 tokens with a newline after each line; among several, base only
    inputs = one_none_two([IMAGE] * (16 + 4 * 5), [IMAGE] * 17)
    inputs["pixel_values"] = noise(3, 2, 3, 16, 16)
    inputs["image_sizes"] = torch.tensor([[16, 16]] * 3)
    inputs["batch_num_images"] = torch.tensor([1, 0, 2])
    return make(LlavaOnevisionForConditionalGeneration, config), inputs, (IMAGE, VIDEO)


def llava_next(attention: str) -> Built:
    """Tiles and newlines; the inner model gets its ids by position."""
    from transformers import LlavaNextConfig, LlavaNextForConditionalGeneration

    config = LlavaNextConfig(
        text_config={"model_type": "llama", **TEXT},
        vision_config={"model_type": "clip_vision_model", **CLIP},
        image_token_id=IMAGE,
        image_grid_pinpoints=[[16, 16], [16, 32]],
        vision_feature_layer=-1,
        attn_implementation=attention,
    )
    # base view 16 tokens, then one or two tiles side by side with a newline after each line
    square, wide = [IMAGE] * (16 + 4 * 5), [IMAGE] * (16 + 4 * 9)
    inputs = one_none_two(square, square, wide)
    inputs["pixel_values"] = noise(3, 3, 3, 16, 16)
    inputs["image_sizes"] = torch.tensor([[16, 16], [16, 16], [16, 32]])
    return make(LlavaNextForConditionalGeneration, config), inputs, (IMAGE,)


def internvl(attention: str) -> Built:
    """Pixel shuffle, qwen2 decoder."""
    from transformers import InternVLConfig, InternVLForConditionalGeneration

    config = InternVLConfig(
        text_config={"model_type": "qwen2", **TEXT},
        vision_config={
            "hidden_size": 16,
            "intermediate_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "image_size": [16, 16],
            "patch_size": [4, 4],
            "initializer_range": 0.15,
        },
        image_token_id=IMAGE,
        downsample_ratio=0.5,
        image_seq_length=4,
        attn_implementation=attention,
    )
    # the last image is large: three tiles
    tile = [START, *[IMAGE] * 4, END]
    inputs = one_none_two(tile, tile, [START, *[IMAGE] * 12, END])
    inputs["pixel_values"] = noise(1 + 1 + 3, 3, 16, 16)
    return make(InternVLForConditionalGeneration, config), inputs, (IMAGE,)


def video_llava(attention: str) -> Built:
    """Images and videos in one batch, each with its own placeholder."""
    from transformers import VideoLlavaConfig, VideoLlavaForConditionalGeneration

    config = VideoLlavaConfig(
        text_config={"model_type": "llama", **TEXT},
        vision_config={"model_type": "clip_vision_model", **CLIP},
        image_token_id=IMAGE,
        video_token_id=VIDEO,
        vision_feature_layer=-1,
        attn_implementation=attention,
    )
    # images without their class token; videos with it in each of their two frames
    image, video = [IMAGE] * 16, [VIDEO] * 2 * 17
    inputs = ids_of([[3, image, 6], [7], [2, image, 3, video, 5]])
    inputs["pixel_values_images"] = noise(2, 3, 16, 16)
    inputs["pixel_values_videos"] = noise(1, 2, 3, 16, 16)
    return make(VideoLlavaForConditionalGeneration, config), inputs, (IMAGE, VIDEO)


def _pictures_in_tiles() -> dict[str, torch.Tensor]:
    """The last image is split: two tiles, each behind a tag that is text, and the whole."""
    whole, tag = [START, *[IMAGE] * 4, END], VIDEO
    inputs = one_none_two(whole, whole, 2 * [START, tag, *[IMAGE] * 4] + whole)
    # each row is padded to the largest number of tiles; an image of zeros is padding
    pixels = noise(3, 4, 3, 16, 16)
    pixels[0, 1:] = pixels[1] = 0
    return {**inputs, "pixel_values": pixels}


def idefics3(attention: str) -> Built:
    """Pixel shuffle; images padded per row."""
    from transformers import Idefics3Config, Idefics3ForConditionalGeneration

    config = Idefics3Config(
        text_config={"model_type": "llama", **TEXT},
        vision_config=CLIP,
        image_token_id=IMAGE,
        scale_factor=2,
        pad_token_id=0,
        attn_implementation=attention,
    )
    return make(Idefics3ForConditionalGeneration, config), _pictures_in_tiles(), (IMAGE,)


def smolvlm(attention: str) -> Built:
    """Idefics3's successor."""
    from transformers import SmolVLMConfig, SmolVLMForConditionalGeneration

    config = SmolVLMConfig(
        text_config={"model_type": "llama", **TEXT},
        vision_config=CLIP,
        image_token_id=IMAGE,
        scale_factor=2,
        pad_token_id=0,
        attn_implementation=attention,
    )
    return make(SmolVLMForConditionalGeneration, config), _pictures_in_tiles(), (IMAGE,)


def mistral3(attention: str) -> Built:
    """Pixtral tower: images of different size, row breaks that are text."""
    from transformers import Mistral3Config, Mistral3ForConditionalGeneration

    config = Mistral3Config(
        text_config={"model_type": "mistral", **TEXT, "head_dim": 8, "sliding_window": None},
        vision_config={"model_type": "pixtral", **CLIP, "head_dim": 8},
        image_token_id=IMAGE,
        spatial_merge_size=2,
        attn_implementation=attention,
    )
    # 4 x 4 and 4 x 2 patches merge to 2 x 2 and 2 x 1 tokens
    large = [IMAGE, IMAGE, START, IMAGE, IMAGE, END]
    small = [IMAGE, START, IMAGE, END]
    inputs = ids_of([[3, large, 6], [7], [2, small, 3, large, 5]])
    inputs["pixel_values"] = noise(3, 3, 16, 16)
    inputs["image_sizes"] = torch.tensor([[16, 16], [16, 8], [16, 16]])
    return make(Mistral3ForConditionalGeneration, config), inputs, (IMAGE,)


def llava(attention: str) -> Built:
    """LLaVA-1.5."""
    from transformers import LlavaConfig, LlavaForConditionalGeneration

    config = LlavaConfig(
        text_config={"model_type": "llama", **TEXT},
        vision_config={"model_type": "clip_vision_model", **CLIP},
        image_token_id=IMAGE,
        vision_feature_layer=-1,
        attn_implementation=attention,
    )
    inputs = one_none_two([IMAGE] * 16)
    inputs["pixel_values"] = noise(3, 3, 16, 16)
    return make(LlavaForConditionalGeneration, config), inputs, (IMAGE,)
