"""Frozen visual tokens: read, not updated. Equal to brute force, with the work really saved."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from dyvte import VisualExit
from dyvte.errors import ConfigError
from dyvte.policies import OraclePolicy, parse_policy
from tests.helpers.batches import QUESTIONS, VISUAL_ID, batch, llava
from tests.helpers.reference import greedy_cached, greedy_reference

STEPS = 8
# (freeze, exit) of each row; the fifth has no image.
SCHEDULES = {
    "all frozen at once, never gone": ([0] * 6, [4, 4, 4, 4, -1, 4]),
    "all frozen in the middle, never gone": ([2] * 6, [4, 4, 4, 4, -1, 4]),
    "three states in most layers": ([1, 4, 0, 2, 0, 1], [3, 4, 1, 2, -1, 4]),
    "frozen, gone, updated": ([0, 0, 4, 3, 0, 2], [4, 0, 4, 4, -1, 3]),
    "one frozen row among rows that stay": ([4, 4, 1, 4, 4, 4], [4, 4, 4, 4, -1, 4]),
    "all frozen, then gone": ([1] * 6, [3, 3, 3, 3, -1, 3]),
}


def oracle(freezes, exits, **options):
    return VisualExit.from_policy(OraclePolicy(exits, freezes), **options)


def shown(freezes, exits):
    """What the record says: frozen at the exit at the latest; -1 without an image."""
    return [-1 if k < 0 else min(f, k) for f, k in zip(freezes, exits, strict=True)]


@pytest.mark.parametrize(("freezes", "exits"), SCHEDULES.values(), ids=SCHEDULES.keys())
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_prefill_and_decode_equal_brute_force(attention, side, freezes, exits):
    model, processor = llava(attention)
    inputs = batch(processor, padding_side=side)
    expected_logits, expected_tokens = greedy_reference(
        model, inputs, exits, [VISUAL_ID], STEPS, freezes_B=freezes
    )
    freezes = [min(f, k) if k >= 0 else f for f, k in zip(freezes, exits, strict=True)]
    with oracle(freezes, exits)(model) as run:
        logits, tokens, _ = greedy_cached(model, inputs, [VISUAL_ID], STEPS)
    assert run.exit_layers.tolist() == exits
    assert run.freeze_layers.tolist() == shown(freezes, exits)
    torch.testing.assert_close(logits, expected_logits, rtol=0, atol=1e-4)
    assert torch.equal(tokens, expected_tokens)


@pytest.mark.parametrize("f", range(5))
def test_batch_of_one_at_every_pair_of_layers(f):
    model, processor = llava()
    inputs = batch(processor, QUESTIONS[:1])
    for k in range(f, 5):
        expected_logits, expected_tokens = greedy_reference(model, inputs, [k], [VISUAL_ID], 4, freezes_B=[f])
        with VisualExit.fixed(k, freeze_layer=f)(model) as run:
            logits, tokens, cache = greedy_cached(model, inputs, [VISUAL_ID], 4)
        assert (run.freeze_layers.tolist(), run.exit_layers.tolist()) == ([f], [k])
        torch.testing.assert_close(logits, expected_logits, rtol=0, atol=1e-4)
        assert torch.equal(tokens, expected_tokens)
        assert cache.get_seq_length() == inputs["input_ids"].shape[1] + 4


def test_frozen_tokens_do_change_the_logits_and_less_than_their_exit():
    # or the tests above would prove nothing
    model, processor = llava()
    inputs = batch(processor)
    images = [0, 1, 2, 3, 5]
    full = model(**inputs).logits[images, -1]
    with VisualExit.fixed(4, freeze_layer=1)(model):
        frozen = model(**inputs).logits[images, -1]
    with VisualExit.fixed(1)(model):
        gone = model(**inputs).logits[images, -1]
    assert ((full - frozen).abs().amax(1) > 1e-3).all()
    assert ((gone - frozen).abs().amax(1) > 1e-3).all()


@pytest.mark.parametrize("k", range(5))
def test_a_freeze_at_the_exit_is_the_exit_bit_for_bit(k):
    model, processor = llava()
    inputs = batch(processor)
    with VisualExit.fixed(k)(model):
        expected, expected_tokens, _ = greedy_cached(model, inputs, [VISUAL_ID], STEPS)
    with VisualExit.fixed(k, freeze_layer=k)(model) as run:
        logits, tokens, _ = greedy_cached(model, inputs, [VISUAL_ID], STEPS)
    assert torch.equal(logits, expected)
    assert torch.equal(tokens, expected_tokens)
    assert torch.equal(run.freeze_layers, run.exit_layers)
    assert (run.records[0].frozen_tokens_BL == 0).all()


def test_the_record_counts_every_state():
    model, processor = llava()
    freezes, exits = SCHEDULES["three states in most layers"]
    with oracle(freezes, exits)(model) as run:
        model(**batch(processor))
    record = run.records[0]
    for row, (f, k) in enumerate(zip(shown(freezes, exits), exits, strict=True)):
        count = int(record.num_visual_B[row])
        assert record.visual_tokens_BL[row].tolist() == [count] * max(f, 0) + [0] * (4 - max(f, 0))
        frozen = [0] * max(f, 0) + [count] * (max(k, 0) - max(f, 0))
        assert record.frozen_tokens_BL[row].tolist() == frozen + [0] * (4 - len(frozen))
    assert record.freeze_logits_BL.isnan().all()


@pytest.mark.parametrize("questions", [QUESTIONS[:1], QUESTIONS[:4]], ids=["alone", "padded"])
def test_a_layer_whose_tokens_are_frozen_has_a_stock_cache_layer(questions):
    model, processor = llava()
    inputs = batch(processor, questions)
    stock = model(**inputs).past_key_values
    with VisualExit.fixed(4, freeze_layer=2)(model):
        cache = model(**inputs).past_key_values
    # layer 3 is the first that reads them frozen: they are as layer 2 left them, as in the stock model
    have, want, real_BN = cache.layers[2], stock.layers[2], inputs["attention_mask"].bool()
    assert type(have) is type(want)
    assert have.keys.shape == want.keys.shape
    for name in ("keys", "values"):
        states = [getattr(layer, name).transpose(1, 2)[real_BN] for layer in (have, want)]
        torch.testing.assert_close(*states, rtol=0, atol=1e-5)
    assert not torch.allclose(cache.layers[3].keys, stock.layers[3].keys, atol=1e-2)
    assert {type(layer) for layer in cache.layers} == {type(want)}


def test_gone_layers_hold_no_visual_token():
    model, processor = llava()
    inputs = batch(processor, QUESTIONS[:1])
    with VisualExit.fixed(3, freeze_layer=1)(model) as run:
        cache = model(**inputs).past_key_values
    total, visual = inputs["input_ids"].shape[1], int(run.records[0].num_visual_B)
    assert [layer.keys.shape[-2] for layer in cache.layers] == [total, total, total, total - visual]
    sizes = run.records[0].kv_bytes
    assert sizes[0] == sizes[1] == sizes[2]
    assert sizes[3] * total == sizes[0] * (total - visual)


def flops_by_module(run_it):
    with FlopCounterMode(display=False) as counter:
        run_it()
    found = counter.get_flop_counts()
    return {name: sum(of.values()) for name, of in found.items()}


@pytest.mark.parametrize("f", [0, 2])
def test_the_work_of_frozen_tokens_is_really_left_out(f):
    # text through the whole layer; of the image, keys and values
    model, processor = llava("eager")  # whose attention is counted on a CPU too
    inputs = batch(processor, QUESTIONS[:1])
    visual = int((inputs["input_ids"] == VISUAL_ID).sum())
    text = inputs["input_ids"].shape[1] - visual

    with VisualExit.fixed(4, freeze_layer=f)(model):
        flops = flops_by_module(lambda: model(**inputs))
    config = model.config.text_config
    width = config.num_key_value_heads * config.head_dim
    for index in range(f, 4):
        layer = f"LlavaForConditionalGeneration.model.language_model.layers.{index}"
        size = {
            "self_attn.q_proj": text * config.hidden_size,
            "self_attn.k_proj": (text + visual) * width,
            "self_attn.v_proj": (text + visual) * width,
            "self_attn.o_proj": text * config.hidden_size,
            "mlp.gate_proj": text * config.intermediate_size,
            "mlp.up_proj": text * config.intermediate_size,
            "mlp.down_proj": text * config.intermediate_size,
        }
        for name, products in size.items():
            assert flops[f"{layer}.{name}"] == 2 * products * config.hidden_size, name
        # scores and their sums: text queries over all keys
        heads = config.num_attention_heads * config.head_dim
        attention = flops[f"{layer}.self_attn"] - sum(
            flops[f"{layer}.self_attn.{name}_proj"] for name in "qkvo"
        )
        assert attention == 4 * text * (text + visual) * heads


@pytest.mark.parametrize("text", ["freeze:2", "freeze:0", "freeze:1:3"])
def test_by_its_command_line_form(text):
    model, processor = llava()
    inputs = batch(processor)
    f, *k = (int(part) for part in text.split(":")[1:])
    with VisualExit.fixed(*(k or [4]), freeze_layer=f)(model):
        expected = model(**inputs).logits
    with VisualExit.from_policy(parse_policy(text))(model):
        assert torch.equal(model(**inputs).logits, expected)


def test_a_freeze_out_of_range_is_refused():
    model, _ = llava()
    with pytest.raises(ConfigError, match="freeze layer 3, exit layer 2"):
        VisualExit.fixed(2, freeze_layer=3)
    with pytest.raises(ConfigError, match=r"freeze layer -1"):
        VisualExit.fixed(2, freeze_layer=-1)
    with pytest.raises(ConfigError, match=r"expected 0\.\.4"), VisualExit.fixed(9, freeze_layer=1)(model):
        pass


def test_a_row_that_ends_with_its_image_is_updated_to_the_end():
    # its next token is read from a visual token
    model, processor = llava()
    inputs = batch(processor, QUESTIONS[:2])
    last = int((inputs["input_ids"][0] == VISUAL_ID).nonzero()[-1]) + 1
    inputs = {name: value[:1, :last] if value.dim() == 2 else value[:1] for name, value in inputs.items()}
    expected = model(**inputs).logits
    with (
        pytest.warns(UserWarning, match="no text after the image"),
        VisualExit.fixed(3, freeze_layer=1)(model) as run,
    ):
        got = model(**inputs).logits
    assert torch.equal(got, expected)
    assert run.freeze_layers.tolist() == run.exit_layers.tolist() == [4]
