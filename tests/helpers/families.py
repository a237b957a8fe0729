"""Tiny random models of the families, each with a random vision tower and images of its own layout.

A builder takes the attention implementation and returns (model, inputs, visual ids); rows: one image, no
image, two images; left-padded. One entry per family.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import torch

from tests.helpers.zoo import gemma_like, llava_like, qwen_like
from tests.helpers.zoo.common import Built

FAMILIES: dict[str, Callable[[str], Built]] = {
    "llava": llava_like.llava,
    "llava_next": llava_like.llava_next,
    "llava_onevision": llava_like.llava_onevision,
    "video_llava": llava_like.video_llava,
    "internvl": llava_like.internvl,
    "idefics3": llava_like.idefics3,
    "smolvlm": llava_like.smolvlm,
    "mistral3": llava_like.mistral3,
    "qwen2_vl": qwen_like.qwen2_vl,
    "qwen2_5_vl": qwen_like.qwen2_5_vl,
    "qwen3_vl": qwen_like.qwen3_vl,
    "paligemma": gemma_like.paligemma,
    "gemma3": gemma_like.gemma3,
    "llava over mistral": gemma_like.mistral,
}
# Who sees whom where that is not simply causal: (ids_BN, prompt length, layer index) -> (B, N, N) bool.
ATTENTION: dict[str, Callable[[torch.Tensor, int, int], torch.Tensor]] = {
    "paligemma": gemma_like.prompt_sees_itself,
    "gemma3": gemma_like.images_see_themselves,
    "llava over mistral": gemma_like.short_window,
}


@cache
def build(family: str, attention: str) -> Built:
    """One tiny model of a family for a whole test run; nobody may change it."""
    return FAMILIES[family](attention)


def one_row(family: str, inputs: dict[str, torch.Tensor], row: int) -> dict[str, torch.Tensor]:
    """One row of a family's batch without its padding, with its own images only."""
    valid_N = inputs["attention_mask"][row].bool()
    alone, images = {}, {}
    for name, value in inputs.items():
        if value.shape == inputs["input_ids"].shape:
            alone[name] = value[row : row + 1, valid_N]
        else:
            images[name] = value
    if row == 1:
        return alone
    mine = slice(0, 1) if row == 0 else slice(1, 3)
    for name, value in images.items():
        if family in ("idefics3", "smolvlm") or name in ("batch_num_images", "pixel_values_videos"):
            images[name] = value[row : row + 1]  # one entry per row
        elif family == "internvl":
            images[name] = value[:1] if row == 0 else value[1:]  # one entry per tile
        elif "image_grid_thw" in images and name == "pixel_values":
            patches = inputs["image_grid_thw"].prod(1).tolist()
            images[name] = value.split(patches)[0] if row == 0 else value[patches[0] :]
        else:
            images[name] = value[mine]
    if family == "video_llava":
        images["pixel_values_videos"] = None if row == 0 else inputs["pixel_values_videos"]
    return alone | {name: value for name, value in images.items() if value is not None}
