"""Reductions beside what else people do to a model: adapters, other tools' hooks, autocast, later turns."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import dyvte
from dyvte.backbones import describe
from dyvte.errors import GateMismatchError, UnsupportedBackboneError
from dyvte.gates import GateConfig, GateStack
from dyvte.reductions import FastV, InactiveHeads, Neighbours, SparseFFN, VisualProfile
from dyvte.runtime.visual_work import LighterLayer, Weights
from tests.helpers.batches import batch, llava
from tests.helpers.families import FAMILIES, build
from tests.helpers.rules import (
    ACTIVE,
    CASES,
    GREEDY,
    IMPORTANCE,
    LAYERS,
    NEVER,
    fastv_rule,
    hidden_by_rule,
    less_work,
)

# peft asks for it
ADAPTS = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")


def adapted(modules, attention):
    """A model of the family with a LoRA adapter that changes what it says."""
    peft = pytest.importorskip("peft")
    model, inputs, visual_ids = FAMILIES["llava"](attention)
    config = peft.LoraConfig(r=4, target_modules=modules, init_lora_weights=False)
    torch.manual_seed(7)
    return peft.get_peft_model(model, config).eval(), inputs, visual_ids


@ADAPTS
@torch.no_grad()
def test_adapted_projections_are_right():
    modules = r".*language_model.*\.(q_proj|o_proj|v_proj)"
    model, inputs, visual_ids = adapted(modules, "sdpa")
    eager = adapted(modules, "eager")[0]
    stock = model(**inputs).logits[:, -1]
    inner = eager.get_base_model()
    with less_work(inner, "llava", visual_ids, radius=1, active_LH=ACTIVE):
        # the reference listens to the inner model
        expected = inner(**inputs, use_cache=False).logits[:, -1]
    with dyvte.VisualExit(reductions=[Neighbours(1), InactiveHeads(ACTIVE)])(model):
        got = model(**inputs).logits[:, -1]
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-4)
    assert (got - stock)[0].abs().max() > 1e-3
    with dyvte.VisualExit(reductions=[SparseFFN(0.5)])(model):
        model(**inputs)  # the FFN is as it was


@ADAPTS
def test_an_adapted_ffn_is_refused_by_name():
    model, _, _ = adapted(r".*language_model.*\.(up_proj|down_proj)", "sdpa")
    with (
        pytest.raises(UnsupportedBackboneError, match="adapted or quantised"),
        dyvte.VisualExit(reductions=[SparseFFN(0.5)])(model),
    ):
        pass


@torch.no_grad()
def test_another_tools_forward_comes_back():
    """accelerate, for one, replaces the forward of modules that it moves about."""
    model, inputs, _ = FAMILIES["llava"]("sdpa")
    exits = dyvte.VisualExit(reductions=CASES["all three"][0])
    with exits(model):
        expected = model(**inputs).logits
    hooked = {}
    for layer in model.get_decoder().layers[:2]:
        for module in (layer.mlp, layer.self_attn.q_proj):
            hooked[module] = module.forward
            module.forward = lambda *args, stock=module.forward: stock(*args)
    theirs = {module: module.__dict__["forward"] for module in hooked}
    with exits(model):
        got = model(**inputs).logits
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-5)
    for module, forward in theirs.items():
        assert module.__dict__["forward"] is forward


@torch.no_grad()
def test_sharded_weights_are_refused_or_left_whole():
    """Outside their own call, ZeRO-3 leaves empty weights behind."""
    model, inputs, _ = FAMILIES["llava"]("sdpa")
    projection = model.get_decoder().layers[1].mlp.up_proj
    projection.weight.data = torch.empty(0)
    with (
        pytest.raises(UnsupportedBackboneError, match="FFN is adapted, quantised or offloaded"),
        dyvte.VisualExit(reductions=[SparseFFN(0.5)])(model),
    ):
        model(**inputs)
    assert not any("forward" in module.__dict__ for module in model.modules())


@torch.no_grad()
def test_heads_that_do_not_divide_are_refused():
    model, inputs, _ = FAMILIES["llava"]("sdpa")
    layer = model.get_decoder().layers[0]
    lighter = LighterLayer(layer, None, CASES["heads"][0][0].start(None).visual_work(2))
    query = torch.zeros(1, 4, 5, 8)
    with pytest.raises(UnsupportedBackboneError, match="4 query heads do not divide into 3 groups"):
        lighter._attention(layer.self_attn, query, query[:, :3], query[:, :3], None)
    with pytest.raises(UnsupportedBackboneError, match="computes 2 of 4 heads"):
        lighter._attention(layer.self_attn, query[:, :2], query[:, :2], query[:, :2], None)
    layer.self_attn.q_proj = nn.Linear(32, 34)
    layer.self_attn.o_proj = nn.Linear(34, 32)
    active = torch.zeros(LAYERS, 4, dtype=torch.bool)
    with (
        pytest.raises(UnsupportedBackboneError, match="do not divide into 4 heads"),
        dyvte.VisualExit(reductions=[InactiveHeads(active)])(model),
    ):
        model(**inputs)
    assert not any("forward" in module.__dict__ for module in model.modules())


def test_a_profile_without_neurons_is_refused():
    model, _, _ = build("llava", "sdpa")
    profile = VisualProfile(rho_SLH=torch.zeros(1, LAYERS, 4), importance_LM=torch.zeros(0, 0))
    with pytest.raises(GateMismatchError, match="ranks no neurons"):
        SparseFFN(0.5, profile).check_backbone(describe(model))


@torch.no_grad()
@pytest.mark.parametrize("text", ["bfloat16", "autocast"])
def test_half_precision(text):
    model, inputs, _ = FAMILIES["llava"]("sdpa")
    exits = dyvte.VisualExit(reductions=[*CASES["all three"][0], FastV(2, 0.5)])
    with exits(model):
        expected = model(**inputs).logits[:, -1]
    if text == "bfloat16":
        inputs = {**inputs, "pixel_values": inputs["pixel_values"].bfloat16()}
        model.to(torch.bfloat16)
    with exits(model), torch.autocast("cpu", torch.bfloat16, enabled=text == "autocast"):
        got = model(**inputs).logits[:, -1]
    assert got.isfinite().all()
    # of the same direction: FastV may keep another token where two are nearly equal
    assert nn.functional.cosine_similarity(got.float(), expected).min() > 0.99


def test_gradients_flow_as_through_masks():
    model, inputs, visual_ids = FAMILIES["llava"]("sdpa")
    eager = FAMILIES["llava"]("eager")[0]
    left_out = CASES["all three"][1]
    found = []
    model.requires_grad_(True)
    eager.requires_grad_(True)
    for one, around in (
        (model, dyvte.VisualExit(reductions=CASES["all three"][0])(model)),
        (eager, less_work(eager, "llava", visual_ids, **left_out)),
    ):
        with around:
            one(**inputs, use_cache=False).logits[:, -1].square().sum().backward()
        layers = one.get_decoder().layers
        found.append([layers[1].self_attn.q_proj.weight.grad, layers[0].mlp.down_proj.weight.grad])
    for got, expected in zip(*found, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("reentrant", [False, True])
def test_recomputed_layers_are_refused_where_they_would_be_others(reentrant):
    model, inputs, _ = FAMILIES["llava"]("sdpa")
    model.requires_grad_(True).train()
    grads = []
    for checkpointing in (False, True):
        if checkpointing:
            model.activation_checkpointing_enable({"use_reentrant": reentrant})
            model.enable_input_require_grads()
        with dyvte.VisualExit(reductions=[FastV(2, 0.5)])(model):
            model.zero_grad()
            model(**inputs, use_cache=False).logits[:, -1].square().sum().backward()
        grads.append(model.get_decoder().layers[2].self_attn.q_proj.weight.grad.clone())
    torch.testing.assert_close(*grads, rtol=1e-4, atol=1e-6)
    yopo = dyvte.VisualExit(reductions=[SparseFFN(0.5)])
    with pytest.raises(UnsupportedBackboneError, match="gradient checkpointing"), yopo(model):
        model(**inputs, use_cache=False)
    with torch.no_grad(), yopo(model):
        model(**inputs, use_cache=False)


def test_parts_of_weights_are_taken_once_and_anew_when_they_change():
    weight, part = nn.Parameter(torch.randn(6, 4)), torch.tensor([0, 2, 5])
    weights = Weights()
    with torch.no_grad():
        first = weights.rows(weight, part)
        assert torch.equal(first, weight[part])
        assert weights.rows(weight, part) is first
        weight += 1
        assert torch.equal(weights.rows(weight, part), weight[part])
    weights.rows(weight, part).sum().backward()
    assert weight.grad[1].abs().sum() == 0
    assert weight.grad[2].abs().sum() > 0
    assert weights.columns(weight, slice(2)).data_ptr() == weight.data_ptr()


@torch.no_grad()
def test_a_radius_beyond_the_image_is_the_whole_image():
    model, inputs, visual_ids = build("llava", "sdpa")
    eager = build("llava", "eager")[0]
    with less_work(eager, "llava", visual_ids, radius=50):
        expected = eager(**inputs, use_cache=False).logits[:, -1]
    with dyvte.VisualExit(reductions=[Neighbours(50)])(model):
        got = model(**inputs).logits[:, -1]
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-4)


# -- decoding after FastV -----------------------------------------------------------------------------------
@torch.no_grad()
def test_a_second_turn_after_fastv_equals_the_rule():
    """The next question comes as several tokens on a cache that lacks what FastV dropped."""
    model, inputs, visual_ids = build("llava", "sdpa")
    eager = build("llava", "eager")[0]
    more_BQ = torch.randint(7, 60, (3, 5), generator=torch.Generator().manual_seed(1))
    ones = torch.ones_like(more_BQ)
    mask = torch.cat([inputs["attention_mask"], ones], 1)
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    with hidden_by_rule(eager, NEVER, visual_ids, fastv_rule(0.5), 2):
        eager(**inputs, use_cache=False)  # the rule looks at the first turn
        both = {**inputs, "input_ids": torch.cat([inputs["input_ids"], more_BQ], 1), "attention_mask": mask}
        expected = eager(**both, position_ids=positions, use_cache=False).logits[:, -5:]
    with dyvte.VisualExit(reductions=[FastV(2, 0.5)])(model):
        length = inputs["input_ids"].shape[1]
        cache = model(**inputs, position_ids=positions[:, :length]).past_key_values
        given = {"attention_mask": mask, "position_ids": positions[:, length:], "past_key_values": cache}
        got = model(input_ids=more_BQ, **given).logits
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("case", ["fastv", "all three"])
def test_prompt_lookup_says_what_greedy_decoding_says(case):
    model, processor = llava()
    inputs = {name: value[:1] for name, value in batch(processor).items()}
    reductions = [FastV(2, 0.5)] if case == "fastv" else CASES[case][0]
    options = {**GREEDY, "max_new_tokens": 12}
    with dyvte.VisualExit.fixed(3, reductions=reductions)(model):
        expected = model.generate(**inputs, **options).sequences
        found = model.generate(**inputs, **options, prompt_lookup_num_tokens=2).sequences
    assert torch.equal(found, expected)


# -- gates and reductions -----------------------------------------------------------------------------------
def gates_of(**records) -> GateStack:
    return GateStack.init(GateConfig(num_layers=LAYERS, hidden_size=32, **records), seed=0)


@torch.no_grad()
@pytest.mark.parametrize(
    ("records", "reductions", "options", "says"),
    [
        ({"training": {"trace": {"reductions": "fastv:2:0.5"}}}, [], {}, "learned from .* fastv:2:0.5"),
        ({"training": {"trace": {"reductions": "fastv:2:0.5"}}}, [FastV(2, 0.5)], {}, None),
        ({"training": {"trace": {}}}, [FastV(2, 0.5)], {}, None),  # DyVTE's Table 5
        ({"calibration": {"kind": "risk"}}, [FastV(2, 0.5)], {}, "calibrated with reductions: none"),
        ({"calibration": {"kind": "risk"}}, [FastV(2, 0.5)], {"threshold": 0.7}, None),
        ({"calibration": {"kind": "risk"}}, [], {}, None),
        (
            {"calibration": {"kind": "risk", "reductions": "ffn:0.5+fastv:2:0.5"}},
            [FastV(2, 0.5), SparseFFN(0.5)],
            {},
            None,
        ),
    ],
)
def test_gates_that_learned_with_other_reductions_are_named(recwarn, records, reductions, options, says):
    model, _, _ = build("llava", "sdpa")
    with dyvte.VisualExit(gates_of(**records), reductions=reductions, **options)(model):
        pass
    said = [str(one.message) for one in recwarn if "these gates" in str(one.message)]
    if says is None:
        assert not said
    else:
        assert len(said) == 1
        assert says.split(" .* ")[-1] in said[0]


def test_measured_settings_have_names_of_their_own():
    rho = torch.zeros(1, LAYERS, 4)
    other = VisualProfile(rho_SLH=rho, importance_LM=IMPORTANCE + 1)
    same = VisualProfile(rho_SLH=rho, importance_LM=IMPORTANCE.clone())
    mine = VisualProfile(rho_SLH=rho, importance_LM=IMPORTANCE)
    assert repr(SparseFFN(0.5, mine)) == repr(SparseFFN(0.5, same)) != repr(SparseFFN(0.5, other))
    assert repr(InactiveHeads(ACTIVE)) != repr(InactiveHeads(ACTIVE.flip(1)))


@torch.no_grad()
@pytest.mark.parametrize("how", [pytest.param("compiled", marks=pytest.mark.full), "offloaded"])
@pytest.mark.parametrize("case", ["attention", "fastv"])
def test_compiled_and_offloaded_models_are_exact(how, case):
    from accelerate import cpu_offload

    model, inputs, _ = FAMILIES["llava"]("sdpa")
    reductions = [FastV(2, 0.5)] if case == "fastv" else [Neighbours(1), InactiveHeads(ACTIVE)]
    exits = dyvte.VisualExit.fixed(3, reductions=reductions)
    with exits(model):
        expected = model(**inputs).logits[:, -1]
    if how == "compiled":
        torch._dynamo.reset()
        model = torch.compile(model, backend="eager")
    else:
        cpu_offload(model, execution_device=torch.device("cpu"))
    with exits(model):
        torch.testing.assert_close(model(**inputs).logits[:, -1], expected, rtol=0, atol=1e-5)
