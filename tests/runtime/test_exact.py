"""Exits are exact: logits and decode steps equal brute force; `never` equals stock bit for bit."""

import pytest
import torch

from dyvte import VisualExit
from dyvte.policies import NeverPolicy
from tests.helpers.batches import QUESTIONS, VISUAL_ID, batch, llava
from tests.helpers.exits import oracle
from tests.helpers.reference import greedy_cached, greedy_reference

STEPS = 8
EXITS = {
    "mixed": [0, 1, 2, 4, -1, 3],
    "mixed the other way": [4, 3, 0, 1, -1, 2],
    "all before the first layer": [0, 0, 0, 0, -1, 0],
    "all after the first": [1, 1, 1, 1, -1, 1],
    "all in the middle": [2, 2, 2, 2, -1, 2],
    "one stays": [1, 4, 1, 1, -1, 1],
    "one leaves late": [4, 4, 4, 4, -1, 3],
}


@pytest.mark.parametrize("exits", EXITS.values(), ids=EXITS.keys())
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_prefill_and_decode_equal_brute_force(attention, side, exits):
    model, processor = llava(attention)
    inputs = batch(processor, padding_side=side)
    expected_logits, expected_tokens = greedy_reference(model, inputs, exits, [VISUAL_ID], STEPS)
    with oracle(exits)(model) as run:
        logits, tokens, _ = greedy_cached(model, inputs, [VISUAL_ID], STEPS)
    assert run.exit_layers.tolist() == exits
    torch.testing.assert_close(logits, expected_logits, rtol=0, atol=1e-4)
    assert torch.equal(tokens, expected_tokens)


@pytest.mark.parametrize("side", ["left", "right"])
def test_rows_of_a_deep_model_leave_after_5_and_9_and_never(side):
    model, processor = llava(layers=12)
    questions = [QUESTIONS[0], QUESTIONS[3], QUESTIONS[1], QUESTIONS[4], QUESTIONS[5]]
    exits = [5, 9, 12, -1, 7]  # two images in the last
    inputs = batch(processor, questions, padding_side=side)
    expected_logits, expected_tokens = greedy_reference(model, inputs, exits, [VISUAL_ID], STEPS)
    with oracle(exits)(model) as run:
        logits, tokens, _ = greedy_cached(model, inputs, [VISUAL_ID], STEPS)
    assert run.exit_layers.tolist() == exits
    torch.testing.assert_close(logits, expected_logits, rtol=0, atol=1e-4)
    assert torch.equal(tokens, expected_tokens)


def test_exits_do_change_the_logits():
    # or the tests above would prove nothing
    model, processor = llava()
    inputs = batch(processor)
    full = model(**inputs).logits[:, -1]
    with VisualExit.fixed(2)(model):
        early = model(**inputs).logits[:, -1]
    change = (full - early).abs().amax(1)
    assert (change[[0, 1, 2, 3, 5]] > 0.05).all()
    assert change[4] < 1e-4


@pytest.mark.parametrize("k", range(5))
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_batch_of_one_at_every_layer(attention, k):
    model, processor = llava(attention)
    inputs = batch(processor, QUESTIONS[:1])
    expected_logits, expected_tokens = greedy_reference(model, inputs, [k], [VISUAL_ID], STEPS)
    with VisualExit.fixed(k)(model) as run:
        logits, tokens, cache = greedy_cached(model, inputs, [VISUAL_ID], STEPS)
    assert run.exit_layers.tolist() == [k]
    torch.testing.assert_close(logits, expected_logits, rtol=0, atol=1e-4)
    assert torch.equal(tokens, expected_tokens)
    # positions keep counting the tokens that left, at K = 0 as well
    assert cache.get_seq_length() == inputs["input_ids"].shape[1] + STEPS


def test_positions_are_right_without_position_ids_too():
    # a plain loop over forward lets the model count: it asks the cache of layer 0
    model, processor = llava()
    inputs = batch(processor, QUESTIONS[:1])
    for k in (0, 2):
        expected, tokens = greedy_reference(model, inputs, [k], [VISUAL_ID], 3)
        with VisualExit.fixed(k)(model), torch.no_grad():
            out = model(**inputs)
            for step in range(3):
                out = model(input_ids=tokens[:, step : step + 1], past_key_values=out.past_key_values)
        torch.testing.assert_close(out.logits[:, -1], expected[:, 3], rtol=0, atol=1e-4)


def test_each_row_equals_its_batch_of_one():
    model, processor = llava()
    exits = EXITS["mixed"]
    with oracle(exits)(model):
        together, tokens, _ = greedy_cached(model, batch(processor), [VISUAL_ID], 4)
    for row in (0, 1, 2, 3):
        alone_inputs = batch(processor)
        alone_inputs = {name: value[row : row + 1] for name, value in alone_inputs.items()}
        keep = alone_inputs["attention_mask"][0].bool()
        for name in ("input_ids", "attention_mask"):
            alone_inputs[name] = alone_inputs[name][:, keep]
        with oracle(exits[row : row + 1])(model):
            alone, alone_tokens, _ = greedy_cached(model, alone_inputs, [VISUAL_ID], 4)
        torch.testing.assert_close(alone[0], together[row], rtol=0, atol=1e-4)
        assert torch.equal(alone_tokens[0], tokens[row])


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_never_equals_the_stock_model_bit_for_bit(attention, side):
    model, processor = llava(attention)
    inputs = batch(processor, padding_side=side)
    stock, stock_tokens, _ = greedy_cached(model, inputs, [VISUAL_ID], STEPS)
    for exits in (
        VisualExit(),
        VisualExit.fixed(4),
        VisualExit.from_policy(NeverPolicy()),
    ):
        with exits(model) as run:
            logits, tokens, _ = greedy_cached(model, inputs, [VISUAL_ID], STEPS)
        assert torch.equal(logits, stock)
        assert torch.equal(tokens, stock_tokens)
        assert run.exit_layers.tolist() == [4, 4, 4, 4, -1, 4]


def test_a_batch_without_images_is_stock_and_leaves_no_record():
    model, processor = llava()
    inputs = batch(processor, (("is there any square", 0), ("what", 0)))
    stock, _, _ = greedy_cached(model, inputs, [VISUAL_ID], 3)
    with VisualExit.fixed(1)(model) as run:
        logits, _, _ = greedy_cached(model, inputs, [VISUAL_ID], 3)
    assert torch.equal(logits, stock)
    assert run.records == []


def test_without_a_cache():
    model, processor = llava()
    inputs = batch(processor)
    expected, _ = greedy_reference(model, inputs, EXITS["mixed"], [VISUAL_ID], 0)
    positions = (inputs["attention_mask"].cumsum(1) - 1).clamp(min=0)
    with oracle(EXITS["mixed"])(model) as run, torch.no_grad():
        logits = model(**inputs, position_ids=positions, use_cache=False, logits_to_keep=1).logits
    torch.testing.assert_close(logits[:, -1], expected[:, 0], rtol=0, atol=1e-4)
    assert run.records[0].kv_bytes == ()


def test_hidden_states_show_frozen_visual_tokens():
    model, processor = llava()
    inputs = batch(processor, QUESTIONS[:1])
    stock = model(**inputs, output_hidden_states=True).hidden_states
    with VisualExit.fixed(2)(model):
        behind = model(**inputs, output_hidden_states=True).hidden_states
    visual = inputs["input_ids"][0] == VISUAL_ID
    for k in range(3):
        assert torch.equal(behind[k], stock[k])
    assert torch.equal(behind[3][0, visual], behind[2][0, visual])
    assert not torch.equal(behind[3][0, ~visual], behind[2][0, ~visual])


def test_bfloat16_runs_close_to_its_own_reference():
    model, processor = llava()
    inputs = batch(processor)
    import copy

    half = copy.deepcopy(model).to(torch.bfloat16)
    inputs["pixel_values"] = inputs["pixel_values"].to(torch.bfloat16)
    with oracle(EXITS["mixed"])(half), torch.no_grad():
        logits = half(**inputs).logits[:, -1].float()
    inputs["pixel_values"] = inputs["pixel_values"].float()
    with oracle(EXITS["mixed"])(model), torch.no_grad():
        exact = model(**inputs).logits[:, -1]
    assert (logits - exact).abs().max() < 0.1 * exact.abs().max()
