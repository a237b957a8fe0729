"""Tiny random models of the families, each with a random vision tower and images of its own layout.

A builder takes the attention implementation and returns (model, inputs, visual ids); rows: one image, no
image, two images; left-padded. One entry per family.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from .zoo import gemma_like, llava_like, qwen_like
from .zoo.common import Built

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
