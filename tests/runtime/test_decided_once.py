"""A prompt is decided once and its decisions hold for the whole answer, however `generate` goes about it."""

from __future__ import annotations

import copy

import pytest
import torch
from transformers import DynamicCache

from dyvte import VisualExit
from dyvte.errors import ExitRuntimeError
from dyvte.gates import GateConfig, GateStack, uniform_offsets
from dyvte.policies import OraclePolicy, RandomPolicy
from dyvte.reductions import FastV, RandomTokens, parse_reductions
from tests.helpers.batches import QUESTIONS, VISUAL_ID, batch, llava
from tests.helpers.families import FAMILIES, build
from tests.helpers.models import random_image, tiny_llava
from tests.helpers.reference import exit_by_masks

LAYERS = 4
LONG = {"max_new_tokens": 9, "min_new_tokens": 9}


def gates(seed: int, **changes) -> GateStack:
    """Gates that make much of what they read, so that one more token changes their minds."""
    config = GateConfig(num_layers=LAYERS, hidden_size=32, offsets=uniform_offsets(LAYERS), **changes)
    stack = GateStack.init(config, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    for parameter in stack.parameters():
        parameter.data += 0.5 * torch.randn(parameter.shape, generator=generator)
    return stack


EXITS = {
    "gates": lambda: VisualExit(gates(1), threshold=0.6),
    "gates reading the image": lambda: VisualExit(
        gates(2, features=("last_visual", "last_prompt")), threshold=0.6
    ),
    "random": lambda: VisualExit.from_policy(RandomPolicy(0, LAYERS, seed=1)),
    "freeze": lambda: VisualExit.from_policy(OraclePolicy([1, 2, 2, 4, -1, 3], [0, 2, 1, 2, -1, 1])),
    "fastv": lambda: VisualExit.fixed(LAYERS, reductions=[FastV(1, 0.5)]),
    "fastv, gates": lambda: VisualExit(gates(3), threshold=0.8, reductions=[FastV(2, 0.6)]),
    "random tokens": lambda: VisualExit.fixed(LAYERS, reductions=[RandomTokens(1)]),
    "frozen set": lambda: VisualExit.fixed(3, reductions=parse_reductions("frozen:0,2")),
    "closed up": lambda: VisualExit.fixed(2, positions="rearrange"),
}
OPTIONS = {
    "greedy": {"do_sample": False},
    "beams": {"do_sample": False, "num_beams": 3},
    "return sequences": {"do_sample": True, "num_return_sequences": 2},
}


def generated(exits: VisualExit, model, inputs, **options):
    torch.manual_seed(0)
    with exits(model) as run:
        return model.generate(**inputs, **{**LONG, "do_sample": False, **options}), run


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("name", EXITS)
def test_without_a_cache_as_with_one(name: str, options: dict) -> None:
    model, processor = llava()
    inputs = batch(processor)
    cached, run = generated(EXITS[name](), model, inputs, **options)
    uncached, again = generated(EXITS[name](), model, inputs, use_cache=False, **options)
    assert torch.equal(uncached, cached)
    assert len(run.records) == len(again.records) == 1
    assert again.exit_layers.tolist() == run.exit_layers.tolist()
    assert again.freeze_layers.tolist() == run.freeze_layers.tolist()
    for one, other in zip(again.records[0].visual_tokens_BL, run.records[0].visual_tokens_BL, strict=True):
        assert one.tolist() == other.tolist()


@pytest.mark.parametrize("name", ["gates", "random"])
def test_answers_are_those_of_the_first_decisions_by_brute_force(name: str) -> None:
    model, processor = llava()
    inputs = batch(processor)
    got, run = generated(EXITS[name](), model, inputs, use_cache=False)
    decided = run.exit_layers.tolist()
    assert len(set(decided)) > 2
    with exit_by_masks(model, decided, [VISUAL_ID]):
        expected = model.generate(**inputs, **LONG, do_sample=False, use_cache=False)
    assert torch.equal(got, expected)
    # The same decisions taken again on the grown text would be others.
    grown = {**inputs, "input_ids": got, "attention_mask": torch.ones_like(got)}
    grown["attention_mask"][:, : inputs["attention_mask"].shape[1]] = inputs["attention_mask"]
    with EXITS[name]()(model) as later, torch.no_grad():
        model(**inputs)
        model(**grown)
    assert later.exit_layers.tolist() != decided


def test_a_draw_is_one_for_each_prompt() -> None:
    model, processor = llava()
    inputs = batch(processor)
    exits = VisualExit.from_policy(RandomPolicy(0, LAYERS, seed=3))
    _, run = generated(exits, model, inputs, num_beams=3)
    layers = run.exit_layers.view(-1, 3)
    assert (layers == layers[:, :1]).all()
    assert len(set(layers[:, 0].tolist())) > 2


@pytest.mark.filterwarnings("ignore:.*no text after the image")
@pytest.mark.parametrize("use_cache", [True, False])
@pytest.mark.parametrize("exits", ["fixed", "gates", "fastv", "frozen set"])
def test_a_row_that_ends_with_its_image_keeps_it_for_the_whole_answer(exits: str, use_cache: bool) -> None:
    model, processor = llava()
    inputs = processor(text="user what color <image>", images=[random_image(3)], return_tensors="pt")
    made = VisualExit.fixed(1) if exits == "fixed" else EXITS[exits]()
    got, run = generated(made, model, inputs, use_cache=use_cache)
    assert run.exit_layers.tolist() == [LAYERS]
    if exits in ("fixed", "gates"):
        assert torch.equal(got, model.generate(**inputs, **LONG, do_sample=False))
    assert len(run.records) == 1
    assert torch.equal(got, generated(made, model, inputs)[0])


def test_an_exit_that_never_happens_is_recorded_once_too() -> None:
    model, processor = llava()
    inputs = batch(processor)
    got, run = generated(VisualExit.fixed(LAYERS), model, inputs, use_cache=False)
    assert len(run.records) == 1
    assert torch.equal(got, model.generate(**inputs, **LONG, do_sample=False))


# --- loops of one's own -------------------------------------------------------------------------------


def grown(inputs, tokens: torch.Tensor):
    """The inputs with tokens behind them."""
    more = torch.ones_like(tokens)
    return {
        **inputs,
        "input_ids": torch.cat([inputs["input_ids"], tokens], 1),
        "attention_mask": torch.cat([inputs["attention_mask"], more], 1),
    }


@torch.no_grad()
def by_hand(model, inputs, steps: int, **options):
    for _ in range(steps):
        mask = inputs["attention_mask"]
        logits = model(**inputs, position_ids=(mask.cumsum(1) - 1).clamp(min=0), **options).logits[:, -1]
        logits[:, [VISUAL_ID, 2]] = -torch.inf
        inputs = grown(inputs, logits.argmax(1, keepdim=True))
    return inputs["input_ids"]


@pytest.mark.parametrize("options", [{"use_cache": False}, {}])
@pytest.mark.parametrize("name", ["gates", "random", "fastv"])
def test_a_loop_of_ones_own_decides_once(name: str, options: dict) -> None:
    model, processor = llava()
    inputs = batch(processor)
    with EXITS[name]()(model) as run:
        got = by_hand(model, inputs, 9, **options)
    expected, once = generated(EXITS[name](), model, inputs)
    assert torch.equal(got, expected)
    assert len(run.records) == 1
    assert run.exit_layers.tolist() == once.exit_layers.tolist()


def test_what_is_another_prompt_is_decided_anew() -> None:
    model, processor = llava()
    inputs = batch(processor)
    token = torch.full((6, 1), 20)
    other = {**inputs, "pixel_values": inputs["pixel_values"] + 1}
    equal = {**inputs, "pixel_values": inputs["pixel_values"].clone()}
    cases = [
        (lambda: inputs, 2),  # the same once more
        (lambda: grown(inputs, token), 1),
        (lambda: grown(equal, token), 1),
        (lambda: grown(other, token), 2),
        (lambda: grown(inputs, token.repeat(1, 2)), 2),
        (lambda: grown({**inputs, "input_ids": inputs["input_ids"].flip(0)}, token), 2),
        (lambda: {**grown(inputs, token), "past_key_values": DynamicCache()}, 2),
    ]
    for number, (second, records) in enumerate(cases):
        with EXITS["random"]()(model) as run, torch.no_grad():
            model(**inputs, use_cache=False)
            model(**second())
        assert len(run.records) == records, number
    with EXITS["random"]()(model) as run, torch.no_grad():
        model(**inputs, use_cache=False)
        model.generate(**grown(inputs, token), max_new_tokens=1, use_cache=False)
        model.generate(**grown(inputs, token), max_new_tokens=1, use_cache=False)
    assert len(run.records) == 3


# --- guesses behind the prompt ------------------------------------------------------------------------

# Its end stands in it before: prompt lookup guesses from the first pass on.
REPEATING = (("red circle assistant red or red square and red circle", 1),)


@pytest.mark.parametrize("name", ["gates", "gates reading the image", "random", "fastv", "fastv, gates"])
@pytest.mark.parametrize("seed", [0, 5])
def test_prompt_lookup_decides_on_the_prompt_alone(name: str, seed: int) -> None:
    model, processor = tiny_llava(LAYERS, seed=seed)
    inputs = batch(processor, REPEATING)
    expected, run = generated(EXITS[name](), model, inputs, max_new_tokens=20)
    first = []
    hook = model.register_forward_pre_hook(
        lambda _, args, kwargs: first.append(kwargs["input_ids"].shape[1]), with_kwargs=True
    )
    options = {"prompt_lookup_num_tokens": 4, "max_matching_ngram_size": 2}
    got, looked = generated(EXITS[name](), model, inputs, max_new_tokens=20, **options)
    hook.remove()
    assert first[0] > inputs["input_ids"].shape[1], "nothing was guessed, so nothing is tested"
    assert torch.equal(got, expected)
    assert looked.exit_layers.tolist() == run.exit_layers.tolist()
    torch.testing.assert_close(looked.gate_logits, run.gate_logits, equal_nan=True, atol=1e-5, rtol=1e-4)
    assert looked.records[0].visual_tokens_BL.tolist() == run.records[0].visual_tokens_BL.tolist()


@pytest.mark.parametrize("name", ["gates", "fastv, gates"])
def test_another_model_may_draft(name: str) -> None:
    model, processor = llava()
    assistant, _ = tiny_llava(2, seed=7)
    inputs = batch(processor, QUESTIONS[:1])
    expected, run = generated(EXITS[name](), model, inputs, max_new_tokens=16)
    got, assisted = generated(EXITS[name](), model, inputs, max_new_tokens=16, assistant_model=assistant)
    assert torch.equal(got, expected)
    assert assisted.exit_layers.tolist() == run.exit_layers.tolist()
    assert len(assisted.records) == 1


def test_a_model_that_drafts_for_itself_is_refused_by_name() -> None:
    model, processor = llava()
    inputs = batch(processor, QUESTIONS[:1])
    with VisualExit.fixed(2)(model):
        with pytest.raises(ExitRuntimeError, match="assistant_model: a model cannot draft for itself"):
            model.generate(**inputs, **LONG, assistant_model=model)
        with pytest.raises(ExitRuntimeError, match="assistant_early_exit: a model cannot draft for itself"):
            model.generate(**inputs, **LONG, assistant_early_exit=2)
        model.generate(**inputs, **LONG)


@pytest.mark.parametrize("name", ["gates", "fastv", "random tokens"])
def test_a_prompt_in_parts_is_refused_where_it_is_read_to_decide(name: str) -> None:
    model, processor = llava()
    inputs = batch(processor, QUESTIONS[3:4])
    assert (inputs["input_ids"][0] == VISUAL_ID).nonzero().max() == 17
    with pytest.raises(ExitRuntimeError, match=r"a part of the prompt only.*leave prefill_chunk_size away"):
        generated(EXITS[name](), model, inputs, prefill_chunk_size=20)


@pytest.mark.filterwarnings("ignore:.*no text after the image")
def test_a_part_that_ends_with_its_image_is_no_prompt_that_does() -> None:
    model, processor = llava()
    inputs = batch(processor, QUESTIONS[3:4])
    with pytest.raises(ExitRuntimeError, match="a part of the prompt only"):
        generated(VisualExit.fixed(2), model, inputs, prefill_chunk_size=18)


@pytest.mark.parametrize("name", ["gates", "random", "fastv"])
def test_classifier_free_guidance_decides_once(name: str) -> None:
    """Its second, unconditional pass at every step holds no image."""
    model, processor = llava()
    inputs = batch(processor)
    expected, run = generated(EXITS[name](), model, inputs, guidance_scale=1.5)
    got, again = generated(EXITS[name](), model, inputs, guidance_scale=1.5, use_cache=False)
    assert torch.equal(got, expected)
    assert len(run.records) == len(again.records) == 1


# --- caches -------------------------------------------------------------------------------------------


def continued(model, inputs, cache, cut: int, new: torch.Tensor):
    """Logits of new tokens behind the prompts less their last `cut` columns; and what they follow."""
    kept = {name: inputs[name][:, : inputs[name].shape[1] - cut] for name in ("input_ids", "attention_mask")}
    whole = grown({**inputs, **kept}, new)
    whole["position_ids"] = (whole["attention_mask"].cumsum(1) - 1).clamp(min=0)
    places, mask = whole["position_ids"][:, -new.shape[1] :], whole["attention_mask"]
    out = model(input_ids=new, attention_mask=mask, position_ids=places, past_key_values=cache)
    return out.logits, whole


@pytest.mark.parametrize("cut", [0, 1, 3])
@pytest.mark.parametrize("exits", [[2, 1, 3], [2, 2, 2], [0, 4, 1]])
def test_copied_and_cropped_caches_go_on_as_brute_force_does(exits: list[int], cut: int) -> None:
    model, processor = llava()
    inputs = batch(processor, QUESTIONS[:3])
    places = (inputs["attention_mask"].cumsum(1) - 1).clamp(min=0)
    with VisualExit.from_policy(OraclePolicy(exits))(model), torch.no_grad():
        cache = model(**inputs, position_ids=places, use_cache=True).past_key_values
        found = []
        for words in (20, 25):  # the copies grow apart
            one = copy.deepcopy(cache)
            if cut:
                one.crop(-cut)
            new = torch.full((3, 2), words)
            found.append(continued(model, inputs, one, cut, new))
        found.append(continued(model, inputs, cache, 0, new))
    for logits, whole in found:
        with exit_by_masks(model, exits, [VISUAL_ID]), torch.no_grad():
            expected = model(**whole, use_cache=False).logits[:, -2:]
        torch.testing.assert_close(logits, expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(("side", "cut"), [("left", 4), ("left", 30), ("right", 1)])
def test_a_cache_is_not_cropped_where_rows_hold_different_tokens(side: str, cut: int) -> None:
    model, processor = llava()
    inputs = batch(processor, QUESTIONS[:3], side)
    with VisualExit.fixed(1)(model), torch.no_grad():
        cache = model(**inputs, use_cache=True).past_key_values
        with pytest.raises(ExitRuntimeError, match="cannot go back"):
            cache.crop(-cut)


# --- what is left -------------------------------------------------------------------------------------


def test_generate_is_given_back() -> None:
    model, processor = llava()
    inputs = batch(processor, QUESTIONS[:1])
    assert "generate" not in model.__dict__
    with VisualExit.fixed(2)(model):
        assert "generate" in model.__dict__
        with pytest.raises(TypeError):
            model.generate(**inputs, max_new_tokens="many")
        model.generate(**inputs, max_new_tokens=1)
    assert "generate" not in model.__dict__

    def own(*args, **kwargs):
        return type(model).generate(model, *args, **kwargs)

    model.generate = own
    try:
        with VisualExit.fixed(2)(model) as run:
            model.generate(**inputs, max_new_tokens=2)
        assert model.__dict__["generate"] is own
        assert len(run.records) == 1
    finally:
        del model.generate


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_decides_once_without_a_cache(family: str) -> None:
    model, inputs, _ = build(family, "sdpa")
    found = []
    for use_cache in (True, False):
        with VisualExit.from_policy(RandomPolicy(0, LAYERS, seed=2))(model) as run:
            answers = model.generate(**inputs, max_new_tokens=6, do_sample=False, use_cache=use_cache)
        found.append((answers.tolist(), run.exit_layers.tolist(), len(run.records)))
    assert found[0] == found[1]
    assert found[0][2] == 1
