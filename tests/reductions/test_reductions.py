"""Reductions are exact: equal to the published rule, played by masks on the stock model.

The rules are those of `tests.helpers.rules`; the matrix of policies, reductions and families holds every
reduction to its rule (`tests/runtime/test_matrix.py`), what is here is particular to some.
"""

from __future__ import annotations

import pytest
import torch

import dyvte
from dyvte.errors import ConfigError, UnsupportedBackboneError
from dyvte.gates import GateConfig, GateStack
from dyvte.policies import OraclePolicy
from dyvte.reductions import FastV, RandomTokens, parse_reductions
from dyvte.spans import find_spans
from tests.helpers.batches import QUESTIONS, VISUAL_ID, batch, llava
from tests.helpers.families import FAMILIES, build
from tests.helpers.reference import greedy_cached
from tests.helpers.rules import GREEDY, LAYERS, NEVER, draws, fastv_rule, hidden_by_rule


def check(family, attention, layer, ratio, exits):
    model, inputs, visual_ids = build(family, attention)
    eager = build(family, "eager")[0]
    with hidden_by_rule(eager, exits, visual_ids, fastv_rule(ratio), layer) as held:
        expected = eager.generate(**inputs, **GREEDY, use_cache=False)
    exits_of = dyvte.VisualExit.from_policy(OraclePolicy(exits), reductions=[FastV(layer, ratio)])
    with exits_of(model) as run:
        got = model.generate(**inputs, **GREEDY)
    assert torch.equal(got.sequences, expected.sequences)
    for step, (a, b) in enumerate(zip(got.logits, expected.logits, strict=True)):
        assert (a - b).abs().max() < 1e-4, step
    # what the rule left is what the layers saw
    visual_BN = torch.isin(inputs["input_ids"], torch.tensor(list(visual_ids)))
    left_B = (visual_BN & ~held["dropped"]).sum(1)
    for index in range(LAYERS):
        now_B = visual_BN.sum(1) if index < layer else left_B
        now_B = torch.where(torch.tensor(exits) > index, now_B, 0)
        assert run.records[0].visual_tokens_BL[:, index].tolist() == now_B.tolist()
    assert held["dropped"][0].any()
    assert held["dropped"][2].any()


# the normal tier has FastV on every family in the matrix
CASES = [("sdpa", 1, 0.5, NEVER), ("sdpa", 2, 0.75, [3, -1, 1]), ("eager", 2, 0.5, [4, -1, 3])]
CASES += [
    (attention, layer, ratio, exits)
    for attention in ("sdpa", "eager")
    for layer in (1, 2, 3)
    for ratio in (0.3, 0.9)
    for exits in (NEVER, [3, -1, 0], [2, -1, 4], [1, -1, 3])
]


@pytest.mark.full
@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_fastv_equals_the_rule_in_every_combination(family, case):
    check(family, *case)


@torch.no_grad()
@pytest.mark.parametrize("side", ["left", "right"])
def test_fastv_in_a_mixed_batch_equals_its_rows_alone(side):
    model, processor = llava()
    exits = [4, 2, 4, 1, -1, 3]
    reductions = [FastV(2, 0.6)]
    with dyvte.VisualExit.from_policy(OraclePolicy(exits), reductions=reductions)(model) as run:
        together, tokens, _ = greedy_cached(model, batch(processor, padding_side=side), [VISUAL_ID], 4)
    for row in (0, 1, 2, 3):
        alone = batch(processor, QUESTIONS[row : row + 1])
        alone["pixel_values"] = batch(processor)["pixel_values"][row : row + 1]
        with dyvte.VisualExit.from_policy(OraclePolicy(exits[row : row + 1]), reductions=reductions)(model):
            logits, alone_tokens, _ = greedy_cached(model, alone, [VISUAL_ID], 4)
        torch.testing.assert_close(logits[0], together[row], rtol=0, atol=1e-4)
        assert torch.equal(alone_tokens[0], tokens[row])
    assert run.records[0].visual_tokens_BL[4].tolist() == [0, 0, 0, 0]


@torch.no_grad()
def test_dropping_nothing_is_stock_and_dropping_all_is_an_exit():
    model, processor = llava()
    inputs = batch(processor)
    stock, _, _ = greedy_cached(model, inputs, [VISUAL_ID], 3)
    with dyvte.VisualExit(reductions=[FastV(2, 0.0)])(model):
        none, _, _ = greedy_cached(model, inputs, [VISUAL_ID], 3)
    assert torch.equal(none, stock)
    with dyvte.VisualExit.fixed(2)(model):
        expected, _, _ = greedy_cached(model, inputs, [VISUAL_ID], 3)
    with dyvte.VisualExit(reductions=[FastV(2, 1.0)])(model) as run:
        got, _, _ = greedy_cached(model, inputs, [VISUAL_ID], 3)
    assert torch.equal(got, expected)
    assert run.exit_layers.tolist() == [2, 2, 2, 2, -1, 2]


@torch.no_grad()
def test_caches_hold_what_was_kept_only():
    model, processor = llava()
    inputs = batch(processor)
    per_token = (
        2
        * 4
        * model.config.text_config.num_key_value_heads
        * model.get_decoder().layers[0].self_attn.head_dim
    )
    with dyvte.VisualExit(reductions=[FastV(2, 0.5)])(model) as run:
        cache = model(**inputs).past_key_values
    record = run.records[0]
    text_B = inputs["attention_mask"].sum(1) - record.num_visual_B
    for index in (2, 3):
        assert record.kv_bytes[index] == per_token * int((text_B + record.visual_tokens_BL[:, index]).sum())
        layer = cache.layers[index]
        assert record.kv_bytes[index] == sum(t.numel() * t.element_size() for t in (layer.keys, layer.values))
    assert (record.visual_tokens_BL[:, 2] == record.num_visual_B // 2).all()


@torch.no_grad()
def test_gates_read_the_reduced_model():
    # logits of all gates behind FastV equal those of features taken from the masked stock model
    model, inputs, visual_ids = build("llava", "sdpa")
    eager = build("llava", "eager")[0]
    config = GateConfig(num_layers=LAYERS, hidden_size=32, architecture="compact", gate_hidden_size=8)
    gates = GateStack.init(config, seed=3)
    with hidden_by_rule(eager, NEVER, visual_ids, fastv_rule(0.5), 1):
        out = eager(**inputs, output_hidden_states=True, use_cache=False)
    with dyvte.VisualExit(gates, threshold=1.0, reductions=[FastV(1, 0.5)])(model) as run:
        model(**inputs)
    spans = find_spans(inputs["input_ids"], visual_ids, inputs["attention_mask"])
    for k in (1, 2, 3):
        for row in (0, 2):
            states = out.hidden_states[k][row, spans.prompt_BN[row]]
            features = torch.cat([states[:-1].mean(0), states[-1]])
            expected = gates.gate(k, features[None])[0]
            torch.testing.assert_close(run.gate_logits[row, k - 1], expected, rtol=0, atol=1e-5)


@torch.no_grad()
def test_two_reductions_and_beams():
    model, inputs, visual_ids = build("llava", "sdpa")
    options = {"max_new_tokens": 6, "do_sample": False, "num_beams": 3, "num_return_sequences": 2}
    eager = build("llava", "eager")[0]
    with hidden_by_rule(eager, [3, -1, 4], visual_ids, fastv_rule(0.5), 2):
        expected = eager.generate(**inputs, **options, use_cache=False)
    exits = dyvte.VisualExit.from_policy(OraclePolicy([3, -1, 4]), reductions=[FastV(2, 0.5)])
    with exits(model):
        assert torch.equal(model.generate(**inputs, **options), expected)
    # the second one takes its share of what the first one left
    with dyvte.VisualExit(reductions=parse_reductions("fastv:1:0.5+fastv:3:0.5"))(model) as run:
        model(**inputs)
    n = int(run.records[0].num_visual_B[0])
    assert run.records[0].visual_tokens_BL[0].tolist() == [n, n // 2, n // 2, n // 4]


# -- random tokens ------------------------------------------------------------------------------------------
def test_random_tokens_are_uniform_and_depend_on_seed_and_sample_only():
    ids = torch.tensor([[1, 9, VISUAL_ID, VISUAL_ID, VISUAL_ID, 9, 9, 9]])
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    num = 4000
    many = {name: value.expand(num, -1) for name, value in inputs.items()}
    _, kept = draws(RandomTokens(1), many, [VISUAL_ID], [str(i) for i in range(num)])
    share = (~kept).double().mean(0)
    assert share[-1] == 0
    # 3 of 7 tokens leave; five standard deviations
    assert ((share[:-1] - 3 / 7).abs() < 5 * (3 / 7 * 4 / 7 / num) ** 0.5).all()
    padded = {
        "input_ids": torch.cat([torch.zeros(1, 2, dtype=torch.long), ids], 1),
        "attention_mask": torch.tensor([[0, 0] + [1] * 8]),
    }
    assert torch.equal(draws(RandomTokens(1), padded, [VISUAL_ID], ["7"])[1][0, 2:], kept[7])
    assert not torch.equal(
        draws(RandomTokens(1, seed=1), many, [VISUAL_ID], [str(i) for i in range(num)])[1], kept
    )


# -- bad input ----------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "text", ["fastv", "fastv:2", "fastv:2:1.5", "fastv:0:0.5", "fast:2:0.5", "random_tokens:x"]
)
def test_malformed_reductions_are_refused(text):
    with pytest.raises(ConfigError):
        parse_reductions(text)


def test_settings_that_make_no_sense_are_refused():
    model, _ = llava()
    with pytest.raises(ConfigError, match=r"1\.\.3"), dyvte.VisualExit(reductions=[FastV(4, 0.5)])(model):
        pass
    with pytest.raises(ConfigError, match="FastV"):
        dyvte.VisualExit(reductions=["fastv:2:0.5"])
    with pytest.raises(ConfigError, match="rearrange"):
        dyvte.VisualExit.fixed(2, positions="rearrange", reductions=[FastV(1, 0.5)])


def test_attention_that_tells_nothing_is_refused_and_nothing_stays():
    model, inputs, _ = build("llava", "sdpa")
    attention = model.get_decoder().layers[1].self_attn
    forward, config = attention.forward, attention.config
    attention.forward = lambda *args, **kwargs: (forward(*args, **kwargs)[0], None)
    try:
        exits = dyvte.VisualExit(reductions=[FastV(2, 0.5)])
        with pytest.raises(UnsupportedBackboneError, match="weights"), exits(model):
            model(**inputs)
    finally:
        del attention.forward
    assert attention.config is config
    assert not attention._forward_pre_hooks
    assert config._attn_implementation == "sdpa"
    stock = model(**inputs).logits
    with dyvte.VisualExit(reductions=[FastV(2, 0.5)])(model):
        model(**inputs)
    assert not attention._forward_pre_hooks
    assert torch.equal(model(**inputs).logits, stock)
