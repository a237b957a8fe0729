"""The one-pass teacher on other families: M-RoPE, deepstack, sliding windows, bidirectional images,
prefix-LM.

The reference takes each layer's own mask and hides the visual keys past the exit in it; one pass per exit.
"""

from __future__ import annotations

import pytest
import torch
import transformers

from dyvte.backbones import describe
from dyvte.teacher.exits import exit_logits
from tests.tiny.families import FAMILIES

IMAGE = 90
TEXT = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 100, "max_position_embeddings": 512,
    "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip
VISION = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2
}  # fmt: skip
MROPE = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2], "mrope_interleaved": True}


def rows(visual: int, around: tuple[int, ...] = ()) -> dict[str, torch.Tensor]:
    """Two left-padded rows of other lengths: prefix text, image, text."""
    made = [
        [*range(3, 3 + before), *around[:1], *[IMAGE] * visual, *around[1:], *range(20, 20 + after)]
        for before, after in ((3, 7), (5, 9))
    ]
    width = max(map(len, made))
    ids = torch.tensor([[0] * (width - len(row)) + row for row in made])
    return {"input_ids": ids, "attention_mask": (ids > 0).long()}


def noise(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1))


def qwen3_vl():
    """Deepstack: vision features are also added between the first layers."""
    inputs = rows(4, (92, 93))
    inputs |= {
        "pixel_values": noise(32, 3 * 2 * 16), "image_grid_thw": torch.tensor([[1, 4, 4]] * 2),
        "mm_token_type_ids": (inputs["input_ids"] == IMAGE).long(),
    }  # fmt: skip
    config = transformers.Qwen3VLConfig(
        text_config={**TEXT, "head_dim": 8, "rope_parameters": MROPE},
        vision_config={
            "depth": 2, "num_heads": 2, "patch_size": 4, "spatial_merge_size": 2, "temporal_patch_size": 2,
            "hidden_size": 32, "intermediate_size": 64, "out_hidden_size": 32,
            "num_position_embeddings": 16, "deepstack_visual_indexes": [0, 1],
        },
        image_token_id=IMAGE, video_token_id=91, vision_start_token_id=92, vision_end_token_id=93,
    )  # fmt: skip
    return transformers.Qwen3VLForConditionalGeneration, config, inputs


def gemma3():
    """Sliding windows shorter than the prompt, images that see themselves in both directions."""
    config = transformers.Gemma3Config(
        text_config={
            **TEXT, "head_dim": 8, "sliding_window": 6, "query_pre_attn_scalar": 8,
            "layer_types": ["sliding_attention", "full_attention"] * 2,
        },
        vision_config={**VISION, "image_size": 16, "patch_size": 4},
        image_token_id=IMAGE, mm_tokens_per_image=4, boi_token_index=91, eoi_token_index=92,
    )  # fmt: skip
    inputs = {**rows(4), "pixel_values": noise(2, 3, 16, 16)}
    inputs["token_type_ids"] = (inputs["input_ids"] == IMAGE).long()
    return transformers.Gemma3ForConditionalGeneration, config, inputs


def paligemma():
    """Prefix-LM: text before the image sees it, so it cannot be borrowed; the answer is the suffix."""
    config = transformers.PaliGemmaConfig(
        text_config={**TEXT, "model_type": "gemma", "head_dim": 8},
        vision_config={**VISION, "image_size": 8, "patch_size": 4, "model_type": "siglip_vision_model"},
        image_token_id=IMAGE, projection_dim=32,
    )  # fmt: skip
    inputs = {**rows(4), "pixel_values": noise(2, 3, 8, 8)}
    inputs["token_type_ids"] = torch.zeros_like(inputs["input_ids"])
    inputs["token_type_ids"][:, -3:] = 1
    return transformers.PaliGemmaForConditionalGeneration, config, inputs


def build(name: str, attention: str):
    """(model, inputs): a family of the runtime's tests (rows with one, no and two images), or one of
    these."""
    if name in FAMILIES:
        model, inputs, _ = FAMILIES[name](attention)
        return model, inputs
    kind, config, inputs = HERE[name]()
    config._attn_implementation = attention
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = kind(config).eval().requires_grad_(False)
        for parameter in model.parameters():
            if parameter.dim() >= 2:
                torch.nn.init.normal_(parameter, std=0.1)
    return model, inputs


HERE = {"qwen3_vl": qwen3_vl, "gemma3": gemma3, "paligemma": paligemma}
FAST = {("qwen2_vl", "eager"), ("gemma3", "sdpa"), ("paligemma", "eager"), ("llava_onevision", "sdpa")}
CASES = [
    pytest.param(name, attention, marks=() if (name, attention) in FAST else pytest.mark.full)
    for name in [*FAMILIES, *HERE]
    for attention in ("sdpa", "eager")
]


def masked_logits(model, layers, inputs, k: int, visual: torch.Tensor) -> torch.Tensor:
    """Logits when layers k+1..L see no visual key; the mask is otherwise the model's own."""

    def hide(module, args, kwargs):
        mask = kwargs["attention_mask"]
        if mask.dtype == torch.bool:
            mask = mask & ~visual[:, None, None, :]
        else:
            mask = mask.masked_fill(visual[:, None, None, :], torch.finfo(mask.dtype).min)
        return args, {**kwargs, "attention_mask": mask}

    handles = [layer.register_forward_pre_hook(hide, with_kwargs=True) for layer in layers[k:]]
    try:
        with torch.no_grad():
            return model(**inputs, use_cache=False).logits
    finally:
        for handle in handles:
            handle.remove()


@pytest.mark.parametrize(("name", "attention"), CASES)
def test_one_pass_equals_masked_passes(name: str, attention: str) -> None:
    model, inputs = build(name, attention)
    backbone = describe(model)
    answer = torch.zeros_like(inputs["input_ids"], dtype=torch.bool)
    answer[:, -3:] = True
    predict = answer.roll(-1, dims=1)
    predict[:, -1] = False
    found = exit_logits(model, inputs, predict_BN=predict, answer_BN=answer)

    valid = inputs["attention_mask"].bool()
    visual = torch.isin(inputs["input_ids"], torch.tensor(backbone.visual_token_ids))
    placed = dict(inputs)
    if not name.startswith("qwen"):  # those work their positions out themselves
        placed["position_ids"] = (valid.long().cumsum(1) - 1).clamp(min=0)
    for k in range(backbone.num_layers + 1):
        logits = masked_logits(model, backbone.layers, placed, k, visual)
        for row in range(len(predict)):
            mine = found.logits_KBAV[k, row][found.valid_BA[row]]
            torch.testing.assert_close(mine, logits[row][predict[row]], atol=1e-4, rtol=0)
    assert (found.logits_KBAV[1] - found.logits_KBAV[-1]).abs().max() > 0.1
