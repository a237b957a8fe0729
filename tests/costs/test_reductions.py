"""What reductions leave of a visual token's price: against torch's counter, the runtime, plain counting."""

from __future__ import annotations

import itertools
import json

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import dyvte
from dyvte.backbones import BackboneConfig, describe
from dyvte.backbones.sizes import decoder_shape
from dyvte.costs.prefill import layer_flops
from dyvte.costs.reductions import tokens_left, visual_factors, window_share
from dyvte.costs.visual import visual_share
from dyvte.evaluation.runner import EvalConfig, evaluate
from dyvte.reductions import (
    FastV,
    InactiveHeads,
    Neighbourhood,
    Neighbours,
    RandomTokens,
    SparseFFN,
    parse_reductions,
)
from tests.helpers.batches import batch, llava
from tests.helpers.models import random_image, tiny_llava

LAYERS, HEADS = 4, 4
ACTIVE = torch.tensor([[1, 1, 1, 1], [1, 0, 0, 1], [0, 1, 0, 0], [0, 0, 0, 0]], dtype=torch.bool)


def accepted(model, reductions):
    backbone = describe(model)
    for one in reductions:
        one.check(LAYERS)
        one.check_backbone(backbone)
    return reductions


@torch.no_grad()
@pytest.mark.parametrize(
    "reductions",
    [
        [SparseFFN(0.5)],
        [SparseFFN(0.0)],
        [InactiveHeads(ACTIVE)],
        [InactiveHeads(ACTIVE), SparseFFN(0.25)],
        [InactiveHeads(ACTIVE), SparseFFN(0.25), RandomTokens(2, 3)],
    ],
    ids=str,
)
@pytest.mark.parametrize("exit_layer", [LAYERS, 2])
def test_what_torch_counts_less_is_what_the_factors_say(reductions, exit_layer):
    """Vision tower and head stay the same, so the difference is that of the layers."""
    model, processor = llava()
    model.set_attn_implementation("eager")
    inputs = {name: value[:1] for name, value in batch(processor).items()}
    keep = inputs["attention_mask"][0].bool()
    inputs |= {name: inputs[name][:, keep] for name in ("input_ids", "attention_mask")}
    try:
        counted = {}
        for name, exits in {
            "full": dyvte.VisualExit(),
            "less": dyvte.VisualExit.fixed(exit_layer, reductions=accepted(model, reductions)),
        }.items():
            # The counter knows plain products, not the fused attention of a CPU.
            plain = sdpa_kernel(SDPBackend.MATH)
            with plain, exits(model) as run, FlopCounterMode(display=False) as counter:
                model(**inputs)
            record = run.records[0]
            counted[name] = (counter.get_total_flops(), record.text_tokens_BL, record.visual_tokens_BL)
    finally:
        model.set_attn_implementation("sdpa")
    shape = decoder_shape(model.config)
    factors = visual_factors(reductions, shape, float(counted["full"][2][0, 0]))
    full = float(layer_flops(shape, *counted["full"][1:]).sum())
    less = float(layer_flops(shape, *counted["less"][1:], factors=factors).sum())
    assert counted["full"][0] - counted["less"][0] == pytest.approx(full - less, rel=1e-12)
    assert less < full


@torch.no_grad()
@pytest.mark.parametrize(
    "text",
    [
        *("fastv:2:0.6", "fastv:1:0.5+fastv:3:0.75", "fastv:3:0", "fastv:1:1"),
        *("pool:2", "pool:3", "pool:2+fastv:1:0.5", "divprune:0.9"),
        *("random_visual:0:0.4", "random_visual:2:0.4"),
    ],
)
def test_tokens_left_are_those_that_layers_saw(text):
    model, processor = llava()
    inputs, reductions = batch(processor), parse_reductions(text)
    for exit_layer in (2, LAYERS):
        with dyvte.VisualExit.fixed(exit_layer, reductions=reductions)(model) as run:
            model(**inputs)
        record = run.records[0]
        left_B = torch.where(record.num_visual_B > 0, exit_layer, -1)
        coming_BL = record.num_visual_B[:, None] * (torch.arange(LAYERS) < left_B[:, None])
        assert torch.equal(tokens_left(reductions, coming_BL), record.visual_tokens_BL)


@pytest.mark.parametrize("side", [1, 2, 5, 8])
@pytest.mark.parametrize("radius", [0, 1, 2, 9])
@pytest.mark.parametrize("causal", [False, True])
def test_the_share_of_pairs_in_a_window_is_counted(side, radius, causal):
    cells = list(itertools.product(range(side), repeat=2))
    pairs = 0
    for i, (y, x) in enumerate(cells):
        for j, (v, u) in enumerate(cells):
            pairs += abs(y - v) <= radius and abs(x - u) <= radius and (j <= i or not causal)
    found = window_share(Neighbourhood(radius, causal), side**2)
    assert found == pytest.approx(pairs / side**4, rel=1e-12)
    assert window_share(None, side**2) == 1.0


def test_visual_compute_adds_up_by_hand():
    """Half of the FFN, a radius of 0 and FastV on a shape whose prices are easy to write down."""
    model, _ = llava()
    shape = decoder_shape(model.config)
    reductions = accepted(model, [Neighbours(0), SparseFFN(0.5), FastV(2, 0.5)])
    width = shape.num_heads * shape.head_dim
    projections = 2 * shape.hidden_size * (width + shape.num_kv_heads * shape.head_dim)
    ffn, scores = 3 * shape.hidden_size * shape.ffn_sizes_L[0], 2 * width * 16
    price = (projections + ffn / 2 + scores / 16) / (projections + ffn + scores)
    left_BL = tokens_left(reductions, torch.full((1, LAYERS), 16))
    found = visual_share(shape, left_BL, [16], visual_factors(reductions, shape, 16))
    assert found == pytest.approx((2 * price + 2 * price / 2) / 4, rel=1e-9)


def test_an_evaluation_counts_what_reductions_make_cheaper(tmp_path):
    """scores.json of a run with YOPO's reductions, against the factors and the tokens of its own records."""
    model, processor = tiny_llava(LAYERS)
    model.save_pretrained(tmp_path / "backbone")
    processor.save_pretrained(tmp_path / "backbone")
    data = tmp_path / "data"
    (data / "images").mkdir(parents=True)
    questions = {}
    for index in range(3):
        random_image(index).save(data / "images" / f"{index}.jpg")
        text = {"question": "what color is the circle ?", "imageId": str(index), "answer": "red"}
        questions[str(index)] = {**text, "isBalanced": True, "types": {}}
    (data / "testdev_balanced_questions.json").write_text(json.dumps(questions))
    text = "neighbours:1+ffn:0.5"
    config = EvalConfig(
        model=BackboneConfig(path=str(tmp_path / "backbone")),
        benchmark="gqa",
        data=data,
        output=tmp_path / "out",
        policies=("never", "fixed:2"),
        reductions=("none", text),
        max_new_tokens=2,
        timing_batches=0,
    )
    found = {one.name: one.scores for one in evaluate(config)}
    assert len(found) == 4
    shape = decoder_shape(model.config)
    factors = visual_factors(accepted(model, parse_reductions(text)), shape, 16)
    for name, layers in (("never", LAYERS), ("fixed-2", 2)):
        plain, less = found[name], found[f"{name}+neighbours-1+ffn-0.5"]
        assert less.run.reduction == text
        price = visual_share(shape, [[16] * LAYERS], [16], factors)
        assert plain.cost.visual_compute == pytest.approx(layers / LAYERS)
        assert less.cost.visual_compute == pytest.approx(price * layers / LAYERS, rel=1e-9)
        visual_1L = [[16] * layers + [0] * (LAYERS - layers)]
        num_text = less.cost.mean_text_tokens
        for convention in ("vtw", "fastv", "pyramiddrop"):
            by_hand = layer_flops(shape, [[num_text] * LAYERS], visual_1L, convention, factors).sum()
            assert less.cost.prefill[convention].tflops == pytest.approx(float(by_hand) / 1e12, rel=1e-9)
            assert less.cost.prefill[convention].tflops < plain.cost.prefill[convention].tflops
