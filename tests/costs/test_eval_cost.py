"""The cost model against torch's own FLOP counter on a model that really runs."""

from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import dyvte
from dyvte.backbones import get_template
from dyvte.backbones.sizes import decoder_shape
from dyvte.costs.prefill import layer_flops, score_row_flops
from dyvte.costs.reductions import selection_flops
from dyvte.evaluation.generation import Pipeline, answer, encode_questions
from dyvte.evaluation.run_log import unpack_layers
from dyvte.evaluation.settings import parse_policies, with_reductions
from dyvte.reductions import parse_reductions
from dyvte.tasks.base import Question
from tests.helpers.families import FAMILIES, build, one_row
from tests.helpers.models import random_image, tiny_llava

LAYERS = 4


@pytest.fixture(scope="module")
def pipeline():
    model, processor = tiny_llava(LAYERS, attn_implementation="eager")
    return Pipeline(model, processor, get_template("chat", processor), max_new_tokens=1)


@pytest.fixture(scope="module")
def batch(pipeline, tmp_path_factory):
    path = tmp_path_factory.mktemp("images") / "0.png"
    random_image(0).save(path)
    text = "what color is the circle ?"
    question = Question(id="a", image=path, text=text, answer="red", image_id="0", kind="")
    return encode_questions(pipeline, [question], [text])


def _measure(pipeline, batch, policy: str, reduction: str):
    """Counted FLOPs of the whole forward, and the answer that says what each layer processed."""
    named = with_reductions(parse_policies([policy]), [reduction])[0]
    with FlopCounterMode(display=False) as counter, torch.inference_mode(False):
        given = answer(pipeline, batch, named.exits())
    return counter.get_total_flops(), given[0]


@pytest.mark.parametrize(
    ("policy", "reduction"),
    [
        ("fixed:2", "none"),
        ("fixed:0", "none"),
        ("never", "fastv:1:0.5"),
        ("fixed:3", "fastv:2:0.25"),
        ("never", "random_tokens:2:1"),
        ("never", "pool:2"),
        ("fixed:2", "divprune:0.5"),
        ("blind", "none"),
    ],
)
def test_what_is_saved_is_what_torch_counts_less(pipeline, batch, policy, reduction):
    """Vision tower, head and rotary angles stay the same, so the difference is that of the layers."""
    full_flops, full = _measure(pipeline, batch, "never", "none")
    flops, given = _measure(pipeline, batch, policy, reduction)
    shape = decoder_shape(pipeline.model.config)
    layers = [(unpack_layers(one.text_tokens), unpack_layers(one.visual_tokens)) for one in (full, given)]
    costs = [float(layer_flops(shape, [text_L], [visual_L]).sum()) for text_L, visual_L in layers]
    tokens_L = [sum(pair) for pair in zip(*layers[1], strict=True)]
    score_row = score_row_flops(shape, [tokens_L], [given.score_layers])[0]
    chosen = selection_flops(parse_reductions(reduction), 16, shape.hidden_size)
    assert full_flops - flops == costs[0] - costs[1] - score_row - chosen
    assert (chosen > 0) == ("divprune" in reduction)
    assert (score_row > 0) == ("fastv" in reduction)
    assert costs[1] < costs[0]


QUICK = {"qwen2_5_vl", "llava over mistral"}


def _saved(model, inputs, exit_layer: int) -> tuple[float, float]:
    """FLOPs that torch counts less with an exit than without, and those that the cost model says."""
    counted, stated = [], []
    num_layers = decoder_shape(model.config).num_layers
    for k in (num_layers, exit_layer):
        with (
            FlopCounterMode(display=False) as counter,
            dyvte.VisualExit.fixed(k)(model) as run,
            torch.no_grad(),
        ):
            model(**inputs, logits_to_keep=1)
        counted.append(counter.get_total_flops())
        record = run.records[0]
        per_layer = layer_flops(decoder_shape(model.config), record.text_tokens_BL, record.visual_tokens_BL)
        stated.append(float(per_layer.sum()))
    return counted[0] - counted[1], stated[0] - stated[1]


@pytest.mark.parametrize(
    "family",
    [name if name in QUICK else pytest.param(name, marks=pytest.mark.full) for name in FAMILIES],
)
def test_every_family_saves_what_the_cost_model_says(family):
    model, inputs, _ = build(family, "eager")
    counted, stated = _saved(model, one_row(family, inputs, 0), 1)
    assert counted == stated > 0


def test_of_experts_the_active_ones_are_counted():
    """A LLaVA over Mixtral: 2 of 8 experts a token, and a router, which the published formulas omit."""
    from transformers import LlavaConfig, LlavaForConditionalGeneration, MixtralConfig

    small, processor = tiny_llava(LAYERS)
    text = MixtralConfig(
        **{
            name: getattr(small.config.text_config, name)
            for name in ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers")
        },
        num_attention_heads=4,
        num_key_value_heads=2,
        num_local_experts=8,
        num_experts_per_tok=2,
    )
    sizes = {name: getattr(small.config, name) for name in ("vision_config", "image_token_id")}
    config = LlavaConfig(text_config=text, vision_feature_layer=-1, image_seq_length=16, **sizes)
    config._attn_implementation = "eager"
    config._experts_implementation = "eager"
    model = LlavaForConditionalGeneration(config).eval().requires_grad_(False)
    inputs = processor(text="<image> what color ?", images=random_image(0), return_tensors="pt")
    counted, stated = _saved(model, inputs, 1)
    router = 2 * 16 * 32 * 8 * (LAYERS - 1)
    assert decoder_shape(config).ffn_sizes_L == (2 * 64,) * LAYERS
    assert counted == stated + router
