"""`generate` as people use it, against the same `generate` without a cache over brute-force masks."""

import threading

import pytest
import torch
from transformers import DynamicCache, TextIteratorStreamer

from dyvte import VisualExit
from dyvte.errors import ExitRuntimeError
from dyvte.policies import OraclePolicy
from tests.helpers.batches import QUESTIONS, VISUAL_ID, batch, llava
from tests.helpers.reference import exit_by_masks

EXITS = [0, 1, 2, 4, -1, 3]
STRATEGIES = {
    "greedy": {"do_sample": False},
    "sampling": {"do_sample": True, "temperature": 0.7, "top_k": 20},
    "return sequences": {"do_sample": True, "num_return_sequences": 3},
    "beams": {"do_sample": False, "num_beams": 3},
    "beams, two returned": {
        "do_sample": False,
        "num_beams": 4,
        "num_return_sequences": 2,
        "length_penalty": 0.5,
    },
    "beam sampling": {"do_sample": True, "num_beams": 2},
    "repetition penalty": {"do_sample": False, "repetition_penalty": 1.3},
}


@pytest.mark.parametrize("options", STRATEGIES.values(), ids=STRATEGIES.keys())
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_generate_equals_brute_force(attention, options):
    model, processor = llava(attention)
    inputs = batch(processor)
    with exit_by_masks(model, EXITS, [VISUAL_ID]):
        torch.manual_seed(0)
        expected = model.generate(**inputs, max_new_tokens=8, min_new_tokens=8, use_cache=False, **options)
    with VisualExit.from_policy(OraclePolicy(EXITS))(model) as run:
        torch.manual_seed(0)
        got = model.generate(**inputs, max_new_tokens=8, min_new_tokens=8, **options)
    assert torch.equal(got, expected)
    expansion = options.get("num_beams", options.get("num_return_sequences", 1))
    assert run.exit_layers.tolist() == [k for k in EXITS for _ in range(expansion)]


def test_prompt_lookup_equals_greedy():
    model, processor = llava()
    inputs = batch(processor, QUESTIONS[3:4])
    for k in (0, 2):
        with VisualExit.fixed(k)(model):
            greedy = model.generate(**inputs, max_new_tokens=20, do_sample=False)
            lookup = model.generate(
                **inputs,
                max_new_tokens=20,
                do_sample=False,
                prompt_lookup_num_tokens=3,
                max_matching_ngram_size=1,
            )
        assert torch.equal(greedy, lookup)


def test_streaming():
    model, processor = llava()
    inputs = batch(processor, QUESTIONS[:1])
    streamer = TextIteratorStreamer(processor.tokenizer, skip_prompt=True)
    with VisualExit.fixed(1)(model):
        expected = model.generate(**inputs, max_new_tokens=6, do_sample=False)
        thread = threading.Thread(
            target=model.generate,
            kwargs={**inputs, "max_new_tokens": 6, "do_sample": False, "streamer": streamer},
        )
        thread.start()
        text = "".join(streamer)
        thread.join()
    assert text == processor.tokenizer.decode(expected[0, inputs["input_ids"].shape[1] :])


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("exits", [[2, 2], [0, 4], [1, 3]])
def test_a_second_text_turn_on_the_same_cache(attention, exits):
    model, processor = llava(attention)
    inputs = batch(processor, (QUESTIONS[0], QUESTIONS[5]))
    more = processor.tokenizer("user what shape is it ? assistant", return_tensors="pt").input_ids
    more = more.expand(2, -1)

    def second_turn(first, **options):
        ids = torch.cat([first, more], 1)
        mask = torch.cat(
            [inputs["attention_mask"], torch.ones_like(ids[:, inputs["input_ids"].shape[1] :])], 1
        )
        return model.generate(
            input_ids=ids, attention_mask=mask, max_new_tokens=6, min_new_tokens=6, do_sample=False, **options
        )

    with exit_by_masks(model, exits, [VISUAL_ID]):
        first = model.generate(**inputs, max_new_tokens=4, min_new_tokens=4, do_sample=False, use_cache=False)
        expected = second_turn(first, use_cache=False, pixel_values=inputs["pixel_values"])
    with VisualExit.from_policy(OraclePolicy(exits))(model) as run:
        cache = DynamicCache(config=model.config)
        got_first = model.generate(
            **inputs, max_new_tokens=4, min_new_tokens=4, do_sample=False, past_key_values=cache
        )
        got = second_turn(got_first, past_key_values=cache)
    assert torch.equal(got_first, first)
    assert torch.equal(got, expected)
    assert len(run.records) == 1


def test_padded_tokens_in_a_later_turn_stay_hidden():
    # rows get new text of different length, padded in the middle of their sequences
    model, processor = llava()
    inputs = batch(processor, (QUESTIONS[0], QUESTIONS[2]))
    more = torch.tensor([[10, 11, 12, 13], [0, 0, 14, 15]])
    more_valid = torch.tensor([[1, 1, 1, 1], [0, 0, 1, 1]])
    mask = torch.cat([inputs["attention_mask"], more_valid], 1)
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    n = inputs["input_ids"].shape[1]
    for exits in ([2, 2], [0, 4], [1, 2]):
        with exit_by_masks(model, exits, [VISUAL_ID]), torch.no_grad():
            expected = model(
                input_ids=torch.cat([inputs["input_ids"], more], 1),
                attention_mask=mask,
                position_ids=positions,
                pixel_values=inputs["pixel_values"],
                use_cache=False,
            ).logits[:, -1]
        with VisualExit.from_policy(OraclePolicy(exits))(model), torch.no_grad():
            first = model(**inputs, position_ids=positions[:, :n])
            got = model(
                input_ids=more,
                attention_mask=mask,
                position_ids=positions[:, n:],
                past_key_values=first.past_key_values,
            ).logits[:, -1]
        torch.testing.assert_close(got, expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize(("kind", "text"), [("static", "StaticLayer"), ("offloaded", "offloaded cache")])
def test_caches_that_cannot_hold_ragged_layers_are_refused(kind, text):
    model, processor = llava()
    inputs = batch(processor, QUESTIONS[:1])
    with VisualExit.fixed(2)(model), pytest.raises(ExitRuntimeError, match=text):
        model.generate(**inputs, max_new_tokens=2, cache_implementation=kind)
    with VisualExit.fixed(4)(model):
        # an exit that never happens leaves every cache alone
        model.generate(**inputs, max_new_tokens=2, cache_implementation="static", disable_compile=True)


def test_many_decode_steps_outgrow_the_first_block_of_columns():
    model, processor = llava()
    inputs = batch(processor, (QUESTIONS[0], QUESTIONS[5]))
    with VisualExit.from_policy(OraclePolicy([1, 4]))(model):
        got = model.generate(**inputs, max_new_tokens=150, min_new_tokens=150, do_sample=False)
    with exit_by_masks(model, [1, 4], [VISUAL_ID]), torch.no_grad():
        mask = torch.cat([inputs["attention_mask"], torch.ones(2, 150, dtype=torch.long)], 1)
        logits = model(
            input_ids=got,
            attention_mask=mask,
            position_ids=(mask.cumsum(1) - 1).clamp(min=0),
            pixel_values=inputs["pixel_values"],
            use_cache=False,
        ).logits
    n = inputs["input_ids"].shape[1]
    logits[:, :, [VISUAL_ID, processor.tokenizer.eos_token_id]] = -torch.inf
    assert torch.equal(logits[:, n - 1 : -1].argmax(-1), got[:, n:])


@pytest.mark.filterwarnings("ignore:.*no text after the image")
def test_a_prefill_in_chunks_serves_a_fixed_exit_where_one_chunk_holds_the_image():
    model, processor = llava()
    inputs = batch(processor, QUESTIONS[3:4])
    options = {"max_new_tokens": 4, "do_sample": False}
    assert (inputs["input_ids"][0] == VISUAL_ID).nonzero().max() == 17
    with VisualExit.fixed(2)(model) as run:
        whole = model.generate(**inputs, **options)
        assert torch.equal(model.generate(**inputs, **options, prefill_chunk_size=20), whole)
        assert run.exit_layers.tolist() == [2]
        with pytest.raises(ExitRuntimeError, match="a part of the prompt only"):
            model.generate(**inputs, **options, prefill_chunk_size=12)
