"""Learned gates at run time: what they read, when rows leave, what is recorded, what is refused."""

import dataclasses
import math

import pytest
import torch

import dyvte
from dyvte.backbones import fingerprint, weights_digest
from dyvte.errors import ConfigError, ExitRuntimeError, GateMismatchError
from dyvte.gates import GateConfig, GateStack, save_config
from dyvte.policies import parse_policy
from tests.helpers.batches import QUESTIONS, VISUAL_ID, batch, llava
from tests.helpers.models import tiny_llava
from tests.helpers.reference import greedy_cached, greedy_reference

LAYERS, HIDDEN = 4, 32


def make_gates(seed=0, **fields):
    gates = GateStack.init(
        GateConfig(num_layers=LAYERS, hidden_size=HIDDEN, **{"architecture": "compact", **fields}), seed
    )
    generator = torch.Generator().manual_seed(seed)
    for parameter in gates.parameters():
        torch.nn.init.normal_(parameter, generator=generator)
    return gates.requires_grad_(False)


def features_by_hand(model, inputs):
    """(B, L, 2D) from the full model's hidden states, one row and layer at a time."""
    positions = (inputs["attention_mask"].cumsum(1) - 1).clamp(min=0)
    states = model(**inputs, position_ids=positions, output_hidden_states=True).hidden_states[1:]
    rows = []
    for row, ids in enumerate(inputs["input_ids"]):
        valid = inputs["attention_mask"][row].bool()
        last_visual = (ids == VISUAL_ID).nonzero().max() if (ids == VISUAL_ID).any() else -1
        prompt = [n for n in range(len(ids)) if valid[n] and n > last_visual]
        rows.append([torch.cat([h[row, prompt[:-1]].mean(0), h[row, prompt[-1]]]) for h in states])
    return torch.stack([torch.stack(row) for row in rows])


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("architecture", ["compact", "reference"])
def test_decisions_logits_and_answers_follow_from_the_full_models_states(architecture, side):
    model, processor = llava()
    inputs = batch(processor, padding_side=side)
    features = features_by_hand(model, inputs)
    fields = {"architecture": architecture, "gate_hidden_size": 16}
    # Offsets put every gate's logits around the threshold, or all rows would leave together.
    medians = make_gates(2, **fields)(features)[[0, 1, 2, 3, 5]].median(0).values
    gates = make_gates(2, **fields, offsets=tuple((1.0 - medians).tolist()))
    logits = gates(features)
    threshold = 0.75
    cut = math.log(3) + 1e-9
    expected = []
    for row, (_, images) in enumerate(QUESTIONS):
        first = next((k for k in range(1, LAYERS) if logits[row, k - 1] > cut), LAYERS)
        expected.append(first if images else -1)
    assert len(set(expected)) >= 4, expected
    with dyvte.VisualExit(gates, threshold=threshold)(model) as run:
        got_logits, tokens, _ = greedy_cached(model, inputs, [VISUAL_ID], 4)
    assert run.exit_layers.tolist() == expected
    for row, k in enumerate(expected):
        ran = min(k, LAYERS - 1) if k > 0 else 0
        assert torch.isnan(run.gate_logits[row, ran:]).all()
        torch.testing.assert_close(run.gate_logits[row, :ran], logits[row, :ran], rtol=0, atol=1e-4)
    reference, reference_tokens = greedy_reference(model, inputs, expected, [VISUAL_ID], 4)
    torch.testing.assert_close(got_logits, reference, rtol=0, atol=1e-4)
    assert torch.equal(tokens, reference_tokens)


def test_threshold_one_never_leaves_and_zero_leaves_at_min_layer():
    model, processor = llava()
    inputs = batch(processor, QUESTIONS[:3])
    stock = model(**inputs).logits
    with dyvte.VisualExit(make_gates(), threshold=1.0)(model) as run:
        assert torch.equal(model(**inputs).logits, stock)
    assert run.exit_layers.tolist() == [LAYERS] * 3
    for min_layer in (1, 3):
        with dyvte.VisualExit(make_gates(), threshold=0.0, min_layer=min_layer)(model) as run:
            model(**inputs)
        assert run.exit_layers.tolist() == [min_layer] * 3
        assert torch.isnan(run.gate_logits[:, : min_layer - 1]).all()


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize(("fallback", "leaves_at"), [(None, 4), (0, 2), (1, 2), (3, 3)])
def test_a_gate_that_is_not_finite_sends_its_rows_to_the_fallback(fallback, leaves_at, value):
    model, processor = llava()
    inputs = batch(processor, QUESTIONS[:3])
    gates = make_gates()
    gates.gates[1].w2.bias.fill_(value)
    exits = dyvte.VisualExit(gates, threshold=0.999999, fallback=fallback)
    with exits(model) as run, pytest.warns(UserWarning, match="3 rows had a gate output") as warned:
        logits, _, _ = greedy_cached(model, inputs, [VISUAL_ID], 3)
    assert sum("not finite" in str(one.message) for one in warned) == 1  # once, not per layer, row or step
    assert run.exit_layers.tolist() == [leaves_at] * 3
    assert run.records[0].gate_fallbacks == 3
    assert torch.isnan(run.gate_logits[:, 2:]).all()
    reference, _ = greedy_reference(model, inputs, [leaves_at] * 3, [VISUAL_ID], 3)
    torch.testing.assert_close(logits, reference, rtol=0, atol=1e-4)


def test_a_single_text_token_after_the_image_is_its_own_mean():
    model, processor = llava()
    inputs = processor(text="user what <image> assistant", images=[_image()], return_tensors="pt")
    gates = make_gates()
    with (
        dyvte.VisualExit(gates, threshold=1.0)(model) as run,
        pytest.warns(UserWarning, match="single text token"),
    ):
        model(**inputs)
    last = model(**inputs, output_hidden_states=True).hidden_states[1][:, -1]
    torch.testing.assert_close(run.gate_logits[:, 0], gates.gate(1, torch.cat([last, last], 1)))
    assert torch.isfinite(run.gate_logits[:, : LAYERS - 1]).all()


@pytest.mark.parametrize("kind", ["gates", "fixed"])
def test_a_row_that_ends_with_its_image_never_leaves(kind):
    model, processor = llava()
    inputs = processor(text="user what is <image>", images=[_image()], return_tensors="pt")
    stock = model(**inputs).logits
    exits = dyvte.VisualExit.fixed(1) if kind == "fixed" else dyvte.VisualExit(make_gates(), threshold=0.0)
    with exits(model) as run, pytest.warns(UserWarning, match="no text after the image"):
        assert torch.equal(model(**inputs).logits, stock)
    assert run.exit_layers.tolist() == [LAYERS]


def test_records_one_for_each_prefill_with_an_image():
    model, processor = llava()
    with dyvte.VisualExit(make_gates(), threshold=0.5)(model) as run:
        with pytest.raises(RuntimeError, match="no prefill"):
            _ = run.exit_layers
        model.generate(**batch(processor, QUESTIONS[:2]), max_new_tokens=3)
        model.generate(**batch(processor, QUESTIONS[4:5]), max_new_tokens=3)
        model.generate(**batch(processor, QUESTIONS[3:6]), max_new_tokens=3, num_beams=2)
    assert [len(r.exit_layers_B) for r in run.records] == [2, 6]
    assert run.records[1].num_visual_B.tolist() == [16, 16, 0, 0, 32, 32]
    assert run.exit_layers[2:4].tolist() == [-1, -1]
    assert run.gate_logits.shape == (6, LAYERS)
    assert run.gate_logits.dtype == torch.float32
    assert not run.gate_logits.requires_grad


def test_gates_without_fallback_and_fixed_mode():
    model, processor = llava()
    inputs = batch(processor, QUESTIONS[:2])
    with dyvte.VisualExit(make_gates(), mode="fixed", fallback=2)(model) as run:
        model(**inputs)
    assert run.exit_layers.tolist() == [2, 2]
    assert torch.isnan(run.gate_logits).all()
    with dyvte.VisualExit()(model) as run:
        model(**inputs)
    assert run.exit_layers.tolist() == [LAYERS] * 2


def test_from_pretrained_carries_the_rule(tmp_path):
    model, processor = llava()
    inputs = batch(processor, QUESTIONS[:2])
    make_gates(threshold=0.0, min_layer=3).save_pretrained(tmp_path / "gates")
    exits = dyvte.VisualExit.from_pretrained(tmp_path / "gates")
    assert (exits.threshold, exits.min_layer, exits.fallback) == (0.0, 3, None)
    with exits(model) as run:
        model(**inputs)
    assert run.exit_layers.tolist() == [3, 3]
    save_config(GateConfig(num_layers=LAYERS, hidden_size=HIDDEN, fallback=1), tmp_path / "fixed")
    with dyvte.VisualExit.from_pretrained(tmp_path / "fixed")(model) as run:
        model(**inputs)
    assert run.exit_layers.tolist() == [1, 1]


def test_random_depends_on_sample_ids_not_on_the_batch():
    model, processor = llava()
    policy = parse_policy("random:1-3")
    with dyvte.VisualExit.from_policy(policy)(model) as run:
        run.sample_ids = ["x", "y", "z"]
        model(**batch(processor, QUESTIONS[:3]))
        run.sample_ids = ["z"]
        model(**batch(processor, QUESTIONS[2:3]))
        run.sample_ids = ["x", "y"]
        with pytest.raises(ConfigError, match=r"2 ids.*3 rows"):
            model(**batch(processor, QUESTIONS[:3]))
    assert run.records[0].exit_layers_B.tolist() == [policy.draw(i) for i in "xyz"]
    assert run.records[1].exit_layers_B.tolist() == [policy.draw("z")]


def test_gates_for_another_shape_are_refused_with_both_shapes():
    model, _ = llava()
    for config in (
        GateConfig(num_layers=5, hidden_size=HIDDEN),
        GateConfig(num_layers=LAYERS, hidden_size=16),
    ):
        with pytest.raises(GateMismatchError) as error, dyvte.VisualExit(GateStack.init(config))(model):
            pass
        for shape in (config, GateConfig(num_layers=LAYERS, hidden_size=HIDDEN)):
            assert f"{shape.num_layers} layers of hidden size {shape.hidden_size}" in str(error.value)


def test_gates_of_another_backbone_are_refused_unless_allowed():
    model, processor = llava()
    other, _ = tiny_llava(layers=LAYERS, patch=8)
    mine, theirs = {"fingerprint": fingerprint(model)}, {"id": "other", "fingerprint": fingerprint(other)}
    assert mine["fingerprint"] != theirs["fingerprint"]
    with dyvte.VisualExit(make_gates(backbone=mine))(model) as run:
        assert not run.transferred
    with (
        pytest.raises(GateMismatchError, match="allow_transfer=True"),
        dyvte.VisualExit(make_gates(backbone=theirs))(model),
    ):
        pass
    with dyvte.VisualExit(make_gates(backbone=theirs), allow_transfer=True)(model) as run:
        model(**batch(processor, QUESTIONS[:1]))
    assert run.transferred


def test_same_architecture_with_other_weights_is_another_backbone():
    model, _ = llava()
    retrained, _ = tiny_llava(layers=LAYERS, seed=1)
    backbone = {"fingerprint": fingerprint(model), "weights": weights_digest(model)}
    exits = dyvte.VisualExit(make_gates(backbone=backbone))
    with exits(model):
        pass
    with pytest.raises(GateMismatchError, match="weights"), exits(retrained):
        pass


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda: dyvte.VisualExit.fixed(-1), "exit layer -1"),
        (lambda: dyvte.VisualExit(make_gates(), threshold=2.0), "threshold 2"),
        (lambda: dyvte.VisualExit(make_gates(), min_layer=0), "min_layer 0"),
        (lambda: dyvte.VisualExit(make_gates(), fallback=5), "exit layer 5"),
        (lambda: dyvte.VisualExit("gates.bin"), "GateStack"),
    ],
)
def test_settings_that_make_no_sense_are_refused_at_once(make, text):
    with pytest.raises(ConfigError, match=text):
        make()


def test_a_fixed_layer_above_L_is_refused_on_entering():
    model, _ = llava()
    exits = dyvte.VisualExit.fixed(5)
    with pytest.raises(ConfigError, match=r"exit layer 5: expected 0\.\.4"), exits(model):
        pass


def test_gates_run_on_their_own_precision():
    model, processor = llava()
    gates = make_gates()
    with dyvte.VisualExit(gates, threshold=1.0)(model) as run:
        model(**batch(processor, QUESTIONS[:2]))
        exact = run.gate_logits
        gates.to(torch.float64)
        model(**batch(processor, QUESTIONS[:2]))
    torch.testing.assert_close(run.gate_logits[:, :3], exact[:, :3], rtol=1e-4, atol=1e-4)


def test_config_fields_survive_replace():
    config = GateConfig(num_layers=3, hidden_size=4)
    assert dataclasses.replace(config, threshold=0.9).offsets == (0.0, 0.0, 0.0)


def _image():
    from tests.helpers.models import random_image

    return random_image(3)


def test_using_output_attentions_is_refused():
    model, processor = llava("eager")
    inputs = batch(processor, QUESTIONS[:1])
    with dyvte.VisualExit.fixed(2)(model), pytest.raises(ExitRuntimeError, match="output_attentions"):
        model(**inputs, output_attentions=True)
    with dyvte.VisualExit.fixed(4)(model):
        assert model(**inputs, output_attentions=True).attentions is not None


def test_states_that_are_not_finite_take_the_fallback_for_their_row_alone():
    model, processor = llava()
    inputs = batch(processor, QUESTIONS[:3])
    inputs["pixel_values"] = inputs["pixel_values"].clone()
    inputs["pixel_values"][1] = torch.nan
    exits = dyvte.VisualExit(make_gates(), threshold=0.999999, fallback=2)
    with exits(model) as run, pytest.warns(UserWarning, match="1 rows had a gate output"):
        logits = model(**inputs).logits[:, -1]
    assert run.exit_layers.tolist() == [LAYERS, 2, LAYERS]
    assert logits[[0, 2]].isfinite().all()
