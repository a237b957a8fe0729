"""YOPO's reductions: equal to the stock model with masks, zeroed heads and zeroed neurons.

The reference computes everything and hides it afterwards, in the eager model's own masks and by hooks on its
projections, at full length and without a cache; grids are written down by hand.
"""

from __future__ import annotations

import pytest
import torch

import dyvte
from dyvte.calibration import measure_profile
from dyvte.errors import CheckpointError, ConfigError, GateMismatchError, UnsupportedBackboneError
from dyvte.reductions import (
    InactiveHeads,
    Neighbours,
    SparseFFN,
    VisualProfile,
    parse_reductions,
)
from dyvte.reductions.heads import active_heads, active_heads_for_mean
from tests.helpers.batches import VISUAL_ID, batch, llava
from tests.helpers.families import FAMILIES, build
from tests.helpers.rules import (
    ACTIVE,
    CASES,
    GREEDY,
    GRIDS,
    HEADS,
    LAYERS,
    NEVER,
    PROFILE,
    hidden_by_rule,
    less_work,
)

FAST = {"llava": CASES, "llava_next": ["all three"], "qwen2_5_vl": ["all three", "radius 1"]}


def check(family, attention, case):
    model, inputs, visual_ids = build(family, attention)
    eager = build(family, "eager")[0]
    reductions, left_out = CASES[case]
    # the innermost hook sees the mask first: keys are hidden after the windows opened some
    with less_work(eager, family, visual_ids, **left_out), hidden_by_rule(eager, NEVER, visual_ids):
        expected = eager.generate(**inputs, **GREEDY, use_cache=False)
    stock = eager(**inputs).logits[:, -1]
    with dyvte.VisualExit(reductions=reductions)(model):
        got = model.generate(**inputs, **GREEDY)
    for step, (a, b) in enumerate(zip(got.logits, expected.logits, strict=True)):
        assert (a - b).abs().max() < 1e-4, step
    assert torch.equal(got.sequences, expected.sequences)
    # or this proves nothing; on a grid of 2 x 2 all are neighbours
    change_B = (got.logits[0] - stock).abs().amax(1)
    sees_all = left_out == {"radius": 1, "causal": True} and GRIDS[family][0] == [(2, 2)]
    assert change_B[0] > 1e-3 or sees_all
    assert change_B[1] < 1e-4


@pytest.mark.parametrize(
    ("family", "case"), [(family, case) for family, cases in FAST.items() for case in cases]
)
def test_less_work_equals_masks(family, case):
    check(family, "sdpa", case)


@pytest.mark.full
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("family", GRIDS)
def test_less_work_equals_masks_in_every_family(family, attention, case):
    check(family, attention, case)


@torch.no_grad()
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_does_not_matter(side):
    model, processor = llava()
    exits = dyvte.VisualExit(reductions=[Neighbours(1), InactiveHeads(ACTIVE), SparseFFN(0.5)])
    inputs = batch(processor, padding_side=side)
    positions = (inputs["attention_mask"].cumsum(1) - 1).clamp(min=0)
    with exits(model):
        together = model(**inputs, position_ids=positions).logits
    for row in (0, 1, 3):
        keep = inputs["attention_mask"][row].bool()
        alone = {
            "input_ids": inputs["input_ids"][row : row + 1, keep],
            "attention_mask": inputs["attention_mask"][row : row + 1, keep],
            "pixel_values": inputs["pixel_values"][row : row + 1],
        }
        with exits(model):
            logits = model(**alone).logits
        text = alone["input_ids"][0] != VISUAL_ID
        torch.testing.assert_close(logits[0, text], together[row, keep][text], rtol=0, atol=1e-4)


@torch.no_grad()
def test_text_is_never_affected_and_nothing_stays():
    model, inputs, visual_ids = build("llava", "sdpa")
    layer = model.get_decoder().layers[1]
    config = layer.self_attn.config
    stock = model(**inputs).logits
    with dyvte.VisualExit(reductions=CASES["all three"][0])(model):
        less = model(**inputs).logits
    # the row without an image, and text before the first image of the others
    assert torch.equal(less[1, -7:], stock[1, -7:]) or (less[1, -7:] - stock[1, -7:]).abs().max() < 1e-5
    first = (inputs["input_ids"][0] == visual_ids[0]).nonzero()[0, 0]
    valid = inputs["attention_mask"][0].nonzero()[0, 0]
    assert (less[0, valid:first] - stock[0, valid:first]).abs().max() < 1e-4
    assert layer.self_attn.config is config
    for module in layer.modules():
        assert "forward" not in module.__dict__
        assert not module._forward_pre_hooks
        assert not module._forward_hooks
    assert torch.equal(model(**inputs).logits, stock)
    # all that there is to save is computed: the stock model up to rounding
    everything = [Neighbours(9), InactiveHeads(torch.ones(LAYERS, HEADS, dtype=torch.bool)), SparseFFN(1.0)]
    with dyvte.VisualExit(reductions=everything[1:])(model):
        assert torch.equal(model(**inputs).logits, stock)


# -- which heads --------------------------------------------------------------------------------------------
def test_heads_are_chosen_by_the_published_rule():
    rho_SLH = torch.rand(100, 5, 8, generator=torch.Generator().manual_seed(0)) ** 3
    active = active_heads(rho_SLH, 0.1)
    for layer in range(5):
        for head in range(8):
            votes = sum(float(one) > 0.1 for one in rho_SLH[:, layer, head])
            assert bool(active[layer, head]) == (layer < 2 or votes > 40)
    for kept in (3.8, 4.0, 6.5):
        some = active_heads_for_mean(rho_SLH, kept)
        assert int(some.sum()) == int(kept * 5)
        # it is the rule's answer at some threshold
        inactive = ~some[2:]
        critical = rho_SLH.sort(0, descending=True).values[40, 2:]
        assert critical[some[2:]].min() >= critical[inactive].max()
    with pytest.raises(ConfigError, match=r"at least 3\.2"):
        active_heads_for_mean(rho_SLH, 3.0)


@torch.no_grad()
def test_the_profile_is_what_the_eager_model_shows():
    for family in ("llava", "qwen2_5_vl"):
        model, inputs, visual_ids = build(family, "sdpa")
        eager = build(family, "eager")[0]
        profile = measure_profile(model, [inputs])
        assert model.get_decoder().config._attn_implementation == "sdpa"
        seen: dict[int, torch.Tensor] = {}
        handles = [
            layer.mlp.down_proj.register_forward_pre_hook(
                lambda module, args, index=index, seen=seen: seen.update({index: args[0]})
            )
            for index, layer in enumerate(eager.get_decoder().layers)
        ]
        attentions = eager(**inputs, output_attentions=True).attentions
        for handle in handles:
            handle.remove()
        visual_BN = torch.isin(inputs["input_ids"], torch.tensor(list(visual_ids)))
        valid_BN = inputs["attention_mask"].bool()
        assert len(profile.rho_SLH) == 2
        for index in range(LAYERS):
            for sample, row in enumerate((0, 2)):
                for head in range(HEADS):
                    weights = attentions[index][row, head][valid_BN[row]]
                    to_visual = weights[:, visual_BN[row]].sum()
                    rho = to_visual / weights[:, valid_BN[row] & ~visual_BN[row]].sum()
                    torch.testing.assert_close(profile.rho_SLH[sample, index, head], rho, rtol=1e-4, atol=0)
            down = eager.get_decoder().layers[index].mlp.down_proj.weight
            for neuron in (0, 17, 63):
                added = seen[index][visual_BN][:, neuron, None] * down[:, neuron]
                expected = added.norm(dim=1).mean()
                found = profile.importance_LM[index, neuron]
                torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-7)


def test_a_profile_survives_the_disk(tmp_path):
    PROFILE.save_pretrained(tmp_path)
    again = VisualProfile.from_pretrained(tmp_path)
    assert torch.equal(again.importance_LM, PROFILE.importance_LM)
    assert torch.equal(again.rho_SLH, PROFILE.rho_SLH)
    (tmp_path / "visual_profile.safetensors").write_bytes(b"torn")
    with pytest.raises(CheckpointError, match="no visual profile"):
        VisualProfile.from_pretrained(tmp_path)


# -- bad input ----------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("family", "reduction", "reason"),
    [
        ("video_llava", Neighbours(1), "grid"),
        ("llava_onevision", Neighbours(1), "grid"),
        ("paligemma", Neighbours(1), "rule of their own"),
        ("gemma3", InactiveHeads(torch.eye(4, dtype=torch.bool)), "rule of their own"),
        ("llava over mistral", Neighbours(1), "window"),
    ],
)
def test_what_cannot_be_served_is_refused_by_name(family, reduction, reason):
    model, inputs, _ = build(family, "sdpa")
    with (
        pytest.raises(UnsupportedBackboneError, match=reason),
        dyvte.VisualExit(reductions=[reduction])(model),
    ):
        model(**inputs)
    assert not any("forward" in module.__dict__ for module in model.modules())


def test_foreign_and_conflicting_settings_are_refused(tmp_path):
    model, inputs, _ = build("llava", "sdpa")

    def enter(*reductions):
        with dyvte.VisualExit(reductions=reductions)(model):
            pass

    with pytest.raises(GateMismatchError, match="heads"):
        enter(InactiveHeads(torch.ones(3, 4, dtype=torch.bool)))
    foreign = VisualProfile(
        rho_SLH=torch.zeros(1, 4, 4),
        importance_LM=torch.zeros(4, 64),
        about={"backbone": {"fingerprint": "another"}},
    )
    foreign.save_pretrained(tmp_path / "profile")
    with pytest.raises(GateMismatchError, match="another backbone"):
        enter(*parse_reductions(f"ffn:0.5:{tmp_path / 'profile'}"))
    with pytest.raises(GateMismatchError, match="another backbone"):
        enter(*parse_reductions(f"heads:{tmp_path / 'profile'}:3"))
    with pytest.raises(CheckpointError, match="no visual profile"):
        parse_reductions(f"heads:{tmp_path}:3")
    for text in ("neighbours:-1", "heads:x", "ffn:2", "ffn:a"):
        with pytest.raises(ConfigError):
            parse_reductions(text)
    twice = dyvte.VisualExit(reductions=[SparseFFN(0.5), SparseFFN(0.3)])
    with pytest.raises(ConfigError, match="two reductions"), twice(model):
        model(**inputs)


def test_experts_are_not_cut():
    model, _, _ = FAMILIES["llava"]("sdpa")
    layer = model.get_decoder().layers[2]
    layer.mlp = torch.nn.Sequential(layer.mlp)
    with (
        pytest.raises(UnsupportedBackboneError, match="layer 3 has no plain gated FFN"),
        dyvte.VisualExit(reductions=[SparseFFN(0.5)])(model),
    ):
        pass
