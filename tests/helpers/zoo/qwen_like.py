"""Qwen-VL families: rotary positions of three axes (M-RoPE), and deepstack."""

from __future__ import annotations

from typing import Any

import torch

from tests.helpers.zoo.common import END, IMAGE, MROPE, START, TEXT, VIDEO, Built, make, noise, one_none_two

TOKENS = {
    "image_token_id": IMAGE,
    "video_token_id": VIDEO,
    "vision_start_token_id": START,
    "vision_end_token_id": END,
}
VISION = {
    "depth": 2,
    "hidden_size": 32,
    "num_heads": 2,
    "patch_size": 4,
    "spatial_merge_size": 2,
    "temporal_patch_size": 2,
    "initializer_range": 0.15,
}


def _inputs() -> dict[str, Any]:
    # four patches merge to one token
    small, wide = [START, *[IMAGE] * 4, END], [START, *[IMAGE] * 8, END]
    inputs = one_none_two(small, small, wide)
    inputs["mm_token_type_ids"] = (inputs["input_ids"] == IMAGE).int()
    inputs["pixel_values"] = noise(16 + 16 + 32, 3 * 2 * 4 * 4)
    inputs["image_grid_thw"] = torch.tensor([[1, 4, 4], [1, 4, 4], [1, 4, 8]])
    return inputs


def qwen2_vl(attention: str) -> Built:
    """M-RoPE."""
    from transformers import Qwen2VLConfig, Qwen2VLForConditionalGeneration

    config = Qwen2VLConfig(
        text_config={**TEXT, "rope_parameters": MROPE},
        vision_config={**VISION, "embed_dim": 32, "mlp_ratio": 2},
        **TOKENS,
        attn_implementation=attention,
    )
    return make(Qwen2VLForConditionalGeneration, config), _inputs(), (IMAGE, VIDEO)


def qwen2_5_vl(attention: str) -> Built:
    """M-RoPE; windows in the vision tower."""
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    config = Qwen2_5_VLConfig(
        text_config={**TEXT, "rope_parameters": MROPE},
        vision_config={
            **VISION,
            "intermediate_size": 64,
            "out_hidden_size": 32,
            "window_size": 8,
            "fullatt_block_indexes": [1],
        },
        **TOKENS,
        attn_implementation=attention,
    )
    return make(Qwen2_5_VLForConditionalGeneration, config), _inputs(), (IMAGE, VIDEO)


def qwen3_vl(attention: str) -> Built:
    """Interleaved M-RoPE, and deepstack: vision features are added again behind the first two layers."""
    from transformers import Qwen3VLConfig, Qwen3VLForConditionalGeneration

    config = Qwen3VLConfig(
        text_config={**TEXT, "head_dim": 8, "rope_parameters": {**MROPE, "mrope_interleaved": True}},
        vision_config={
            **VISION,
            "intermediate_size": 64,
            "out_hidden_size": 32,
            "num_position_embeddings": 16,
            "deepstack_visual_indexes": [0, 1],
        },
        **TOKENS,
        attn_implementation=attention,
    )
    return make(Qwen3VLForConditionalGeneration, config), _inputs(), (IMAGE, VIDEO)
