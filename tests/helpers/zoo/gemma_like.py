"""Families whose attention is not plainly causal: prefix-LM, images that see themselves, short windows."""

from __future__ import annotations

import torch

from tests.helpers.zoo.common import END, IMAGE, SIGLIP, START, TEXT, Built, make, noise, one_none_two

WINDOW = 8


def paligemma(attention: str) -> Built:
    """The whole prompt sees itself in both directions; what is generated is causal."""
    from transformers import PaliGemmaConfig, PaliGemmaForConditionalGeneration

    config = PaliGemmaConfig(
        text_config={"model_type": "gemma", **TEXT, "head_dim": 8},
        vision_config={**SIGLIP, "projection_dim": 32},
        image_token_id=IMAGE,
        projection_dim=32,
        hidden_size=32,
        attn_implementation=attention,
    )
    inputs = one_none_two([IMAGE] * 16)
    inputs["token_type_ids"] = torch.zeros_like(inputs["input_ids"])
    inputs["pixel_values"] = noise(3, 3, 16, 16)
    return make(PaliGemmaForConditionalGeneration, config), inputs, (IMAGE,)


def gemma3(attention: str) -> Built:
    """Each image sees itself in both directions; every second layer sees 8 tokens, fewer than the prompt."""
    from transformers import Gemma3Config, Gemma3ForConditionalGeneration

    config = Gemma3Config(
        text_config={
            **TEXT,
            "head_dim": 8,
            "query_pre_attn_scalar": 8,
            "sliding_window": WINDOW,
            "layer_types": ["sliding_attention", "full_attention"] * 2,
        },
        vision_config=SIGLIP,
        image_token_id=IMAGE,
        boi_token_index=START,
        eoi_token_index=END,
        mm_tokens_per_image=4,
        attn_implementation=attention,
    )
    inputs = one_none_two([START, *[IMAGE] * 4, END])
    inputs["token_type_ids"] = (inputs["input_ids"] == IMAGE).long()
    inputs["pixel_values"] = noise(3, 3, 16, 16)
    return make(Gemma3ForConditionalGeneration, config), inputs, (IMAGE,)


def mistral(attention: str) -> Built:
    """LLaVA over a Mistral decoder whose window is short in every layer."""
    from transformers import LlavaConfig, LlavaForConditionalGeneration

    config = LlavaConfig(
        text_config={"model_type": "mistral", **TEXT, "head_dim": 8, "sliding_window": WINDOW},
        vision_config=SIGLIP,
        image_token_id=IMAGE,
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
        attn_implementation=attention,
    )
    inputs = one_none_two([IMAGE] * 16)
    inputs["pixel_values"] = noise(3, 3, 16, 16)
    return make(LlavaForConditionalGeneration, config), inputs, (IMAGE,)


def prompt_sees_itself(ids_BN: torch.Tensor, prompt_tokens: int, index: int) -> torch.Tensor:
    """PaliGemma's rule for the reference: (B, N, N) bool, padding not yet hidden."""
    length = ids_BN.shape[1]
    allowed = torch.ones(length, length, dtype=torch.bool).tril()
    allowed[:prompt_tokens, :prompt_tokens] = True
    return allowed.expand(len(ids_BN), -1, -1)


def images_see_themselves(ids_BN: torch.Tensor, prompt_tokens: int, index: int) -> torch.Tensor:
    """Gemma3's rule: causal, or within one image; in even layers no further back than the window."""
    length = ids_BN.shape[1]
    column = torch.arange(length)
    image_BN = ids_BN == IMAGE
    starts_BN = image_BN & ~torch.nn.functional.pad(image_BN, (1, 0))[:, :-1]
    number_BN = starts_BN.cumsum(1) * image_BN
    same_BNN = (number_BN[:, :, None] == number_BN[:, None]) & image_BN[:, :, None]
    allowed_BNN = same_BNN | (column <= column[:, None])
    return allowed_BNN if index % 2 else allowed_BNN & (column > column[:, None] - WINDOW)


def short_window(ids_BN: torch.Tensor, prompt_tokens: int, index: int) -> torch.Tensor:
    """Mistral's rule: causal, no further back than the window."""
    column = torch.arange(ids_BN.shape[1])
    allowed = (column <= column[:, None]) & (column > column[:, None] - WINDOW)
    return allowed.expand(len(ids_BN), -1, -1)
