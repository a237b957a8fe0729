"""Tiny random models of other families, each with inputs that hold images of its own layout.

A builder returns (model, inputs, visual ids); rows: one image, no image, two images; left-padded.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

PAD, BOS, EOS, IMAGE, START, END, VIDEO = range(7)
# Row by row: lists of text lengths between images; n images stand between n + 1 texts.
ROWS = ([3, 6], [7], [2, 3, 5])
TEXT = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "initializer_range": 0.15,
    "bos_token_id": BOS,
    "eos_token_id": EOS,
    "pad_token_id": PAD,
}
CLIP = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 16,
    "patch_size": 4,
    "initializer_range": 0.15,
}
Built = tuple[Any, dict[str, torch.Tensor], tuple[int, ...]]


def _finish(model: Any) -> Any:
    model.generation_config.suppress_tokens = [IMAGE, START, END, VIDEO]
    model.generation_config.pad_token_id = PAD
    model.generation_config.eos_token_id = None
    return model.requires_grad_(False).eval()


def _make(kind: Any, config: Any) -> Any:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return _finish(kind(config))


def _ids(image_run: list[int], run_among_several: list[int] | None = None) -> dict[str, torch.Tensor]:
    """Left-padded ids and mask; a run is what one image becomes, alone or beside others."""
    generator = torch.Generator().manual_seed(1)
    rows = []
    for texts in ROWS:
        row: list[int] = []
        for n, length in enumerate(texts):
            run = image_run if len(texts) == 2 or run_among_several is None else run_among_several
            row += (run if n else []) + torch.randint(7, 64, (length,), generator=generator).tolist()
        rows.append(row)
    width = max(map(len, rows))
    ids = torch.tensor([[PAD] * (width - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
    return {"input_ids": ids, "attention_mask": mask}


def _noise(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(2))


def qwen2_vl(attention: str) -> Built:
    """M-RoPE."""
    from transformers import Qwen2VLConfig, Qwen2VLForConditionalGeneration

    rope = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 10000.0}
    config = Qwen2VLConfig(
        text_config={**TEXT, "rope_parameters": rope},
        vision_config={
            "depth": 1,
            "embed_dim": 32,
            "hidden_size": 32,
            "num_heads": 2,
            "mlp_ratio": 2,
            "patch_size": 4,
            "spatial_merge_size": 2,
            "temporal_patch_size": 2,
        },
        image_token_id=IMAGE,
        video_token_id=VIDEO,
        vision_start_token_id=START,
        vision_end_token_id=END,
        attn_implementation=attention,
    )
    # a grid of 4 x 4 patches merges to 4 tokens
    inputs = _ids([START, IMAGE, IMAGE, IMAGE, IMAGE, END])
    inputs["mm_token_type_ids"] = (inputs["input_ids"] == IMAGE).int()
    inputs["pixel_values"] = _noise(3 * 16, 3 * 2 * 4 * 4)
    inputs["image_grid_thw"] = torch.tensor([[1, 4, 4]] * 3)
    return _make(Qwen2VLForConditionalGeneration, config), inputs, (IMAGE, VIDEO)


def llava_onevision(attention: str) -> Built:
    """Images of one tile, with a newline feature."""
    from transformers import LlavaOnevisionConfig, LlavaOnevisionForConditionalGeneration

    config = LlavaOnevisionConfig(
        text_config={"model_type": "qwen2", **TEXT},
        vision_config={"model_type": "siglip_vision_model", **CLIP, "vision_use_head": False},
        image_token_id=IMAGE,
        video_token_id=VIDEO,
        image_grid_pinpoints=[[16, 16]],
        vision_feature_select_strategy="full",
        vision_aspect_ratio="anyres_max_9",
        attn_implementation=attention,
    )
    # base view 16 tokens, one tile of 4 x 4 tokens with a newline after each line; among several, base only
    inputs = _ids([IMAGE] * (16 + 4 * 5), [IMAGE] * 17)
    inputs["pixel_values"] = _noise(3, 2, 3, 16, 16)
    inputs["image_sizes"] = torch.tensor([[16, 16]] * 3)
    inputs["batch_num_images"] = torch.tensor([1, 0, 2])
    return _make(LlavaOnevisionForConditionalGeneration, config), inputs, (IMAGE, VIDEO)


def llava_next(attention: str) -> Built:
    """Tiles and newlines; the inner model gets its ids by position."""
    from transformers import LlavaNextConfig, LlavaNextForConditionalGeneration

    config = LlavaNextConfig(
        text_config={"model_type": "llama", **TEXT},
        vision_config={"model_type": "clip_vision_model", **CLIP},
        image_token_id=IMAGE,
        image_grid_pinpoints=[[16, 16]],
        vision_feature_layer=-1,
        attn_implementation=attention,
    )
    inputs = _ids([IMAGE] * (16 + 4 * 5))
    inputs["pixel_values"] = _noise(3, 2, 3, 16, 16)
    inputs["image_sizes"] = torch.tensor([[16, 16]] * 3)
    return _make(LlavaNextForConditionalGeneration, config), inputs, (IMAGE,)


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
    inputs = _ids([START, *[IMAGE] * 4, END])
    inputs["pixel_values"] = _noise(3, 3, 16, 16)
    return _make(InternVLForConditionalGeneration, config), inputs, (IMAGE,)


FAMILIES: dict[str, Callable[[str], Built]] = {
    "qwen2_vl": qwen2_vl,
    "llava_onevision": llava_onevision,
    "llava_next": llava_next,
    "internvl": internvl,
}
