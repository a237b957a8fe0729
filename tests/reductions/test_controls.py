"""The controls: pooled, drawn and most diverse visual tokens, and none at all.

That each equals its rule on every family, with every policy, is in `tests/runtime/test_matrix.py`.
"""

from __future__ import annotations

import pytest
import torch

import dyvte
from dyvte.errors import ConfigError, ExitRuntimeError, UnsupportedBackboneError
from dyvte.policies import BlindPolicy, OraclePolicy, parse_policy
from dyvte.reductions import DivPrune, FastV, Pool, RandomVisual, parse_reduction, parse_reductions
from dyvte.reductions.divprune import most_diverse
from dyvte.reductions.pool import window_means, windows
from tests.helpers.batches import QUESTIONS, VISUAL_ID, batch, llava
from tests.helpers.families import build
from tests.helpers.models import tiny_llava
from tests.helpers.reference import greedy_cached
from tests.helpers.rules import keeps_farthest

CONTROLS = ("pool:2", "divprune:0.4", "random_visual:0:0.4", "random_visual:2:0.4")


def answers_of(reductions, exits=None, *, inputs=None, steps=3):
    """Logits and tokens of the tiny LLaVA under reductions, and the run."""
    model, processor = llava()
    inputs = batch(processor) if inputs is None else inputs
    policy = parse_policy("never") if exits is None else OraclePolicy(exits)
    with dyvte.VisualExit.from_policy(policy, reductions=reductions)(model) as run:
        logits, tokens, _ = greedy_cached(model, inputs, [VISUAL_ID], steps)
    return logits, tokens, run


# --- the rules of their own -----------------------------------------------------------------------------


@pytest.mark.parametrize(("height", "width"), [(4, 4), (5, 7), (1, 6), (3, 1)])
@pytest.mark.parametrize("side", [1, 2, 3, 9])
def test_windows_are_those_of_a_loop(height, width, side):
    states_VD = torch.randn(2 * height * width, 5, generator=torch.Generator().manual_seed(0))
    cells = [(image, y, x) for image in (0, 1) for y in range(height) for x in range(width)]
    window_V, first_W = windows(torch.tensor(cells), side)
    means_WD = window_means(states_VD, window_V, len(first_W))
    expected = {}
    for at, (image, y, x) in enumerate(cells):
        expected.setdefault((image, y // side, x // side), []).append(at)
    assert len(first_W) == len(expected) == 2 * -(-height // side) * -(-width // side)
    by_first = {int(first): means_WD[n] for n, first in enumerate(first_W)}
    for members in expected.values():
        torch.testing.assert_close(by_first[members[0]], states_VD[members].double().mean(0).float())
        assert len({int(window_V[at]) for at in members}) == 1


def test_of_two_states_nearest_to_each_other_the_first_is_taken():
    """Their distances to the nearest are one number, whatever the last bits of a product are."""
    mutual = 0
    for seed in range(300):
        states_VD = torch.randn(2 + seed % 4, 48, generator=torch.Generator().manual_seed(seed))
        unit_VD = torch.nn.functional.normalize(states_VD.double(), dim=1)
        far_VV = (1 - unit_VD @ unit_VD.T).fill_diagonal_(torch.inf)
        nearest_V = far_VV.argmin(1)
        first = int(most_diverse(states_VD, 1)[0])
        other = int(nearest_V[first])
        if int(nearest_V[other]) == first:
            mutual += 1
            assert first < other
    assert mutual > 0


@pytest.mark.parametrize("count", [0, 1, 2, 7, 24, 30])
def test_the_most_diverse_are_those_of_the_published_rule(count):
    """As its authors wrote it down: distances to those chosen so far, and the largest of the least."""
    for seed in range(20):
        states_VD = torch.randn(24, 6, generator=torch.Generator().manual_seed(seed)).double()
        unit = states_VD / states_VD.norm(dim=1, keepdim=True)
        far = 1 - unit @ unit.T
        chosen: list[int] = []
        for step in range(min(count, 24)):
            least = far.topk(2, dim=0, largest=False).values[1] if step == 0 else far[chosen].amin(0)
            chosen.append(int(least.argmax()))
        found = most_diverse(states_VD, count).tolist()
        assert found == (chosen if count < 24 else list(range(24)))


def test_equal_states_are_chosen_once_each():
    states_VD = torch.ones(6, 4)
    states_VD[3] = torch.tensor([1.0, -1, 1, -1])
    found = most_diverse(states_VD, 5).tolist()
    assert len(set(found)) == 5
    assert 3 in found[:2]


# --- what they are at their ends ------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("text", ["pool:1", "divprune:0", "random_visual:0:0", "random_visual:2:0"])
def test_nothing_taken_is_the_stock_model(text):
    stock, _, _ = answers_of(())
    assert torch.equal(answers_of(parse_reductions(text))[0], stock)


@torch.no_grad()
def test_everything_taken_before_the_first_layer_is_blind():
    model, processor = llava()
    inputs = batch(processor)
    with dyvte.VisualExit.fixed(0)(model):
        expected, _, _ = greedy_cached(model, inputs, [VISUAL_ID], 3)
    with dyvte.VisualExit.from_policy(BlindPolicy())(model) as run:
        assert torch.equal(greedy_cached(model, inputs, [VISUAL_ID], 3)[0], expected)
    assert run.exit_layers.tolist() == [0, 0, 0, 0, -1, 0]
    for text in ("divprune:1", "random_visual:0:1"):
        logits, _, run = answers_of(parse_reductions(text))
        assert torch.equal(logits, expected)
        assert run.exit_layers.tolist() == [0, 0, 0, 0, -1, 0]
        assert (run.records[0].visual_tokens_BL == 0).all()
    exits = [2, 2, 2, 2, -1, 2]
    assert torch.equal(answers_of([RandomVisual(2, 1.0)])[0], answers_of((), exits)[0])


@torch.no_grad()
def test_blind_without_gaps_is_the_prompt_without_its_image():
    """Against the stock model on prompts from which the placeholders are cut."""
    model, processor = llava()
    for row in (0, 3):
        inputs = batch(processor, QUESTIONS[row : row + 1])
        kept_N = inputs["input_ids"][0] != VISUAL_ID
        cut = {name: inputs[name][:, kept_N] for name in ("input_ids", "attention_mask")}
        expected = model(**cut).logits[0, -1]
        with dyvte.VisualExit.from_policy(BlindPolicy(), positions="rearrange")(model):
            found = model(**inputs).logits[0, -1]
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


# --- batches, caches, draws -----------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("text", CONTROLS)
def test_in_a_mixed_batch_they_equal_their_rows_alone(text, side):
    model, processor = llava()
    exits, reductions = [4, 2, 4, 1, -1, 0], parse_reductions(text)
    inputs = batch(processor, padding_side=side)
    with dyvte.VisualExit.from_policy(OraclePolicy(exits), reductions=reductions)(model) as run:
        run.sample_ids = list("abcdef")
        together, tokens, _ = greedy_cached(model, inputs, [VISUAL_ID], 4)
    for row in (0, 1, 3, 4):
        alone = batch(processor, QUESTIONS[row : row + 1])
        if row < 4:
            alone["pixel_values"] = batch(processor)["pixel_values"][row : row + 1]
        with dyvte.VisualExit.from_policy(OraclePolicy(exits[row : row + 1]), reductions=reductions)(
            model
        ) as one:
            one.sample_ids = ["abcdef"[row]]
            logits, alone_tokens, _ = greedy_cached(model, alone, [VISUAL_ID], 4)
        torch.testing.assert_close(logits[0], together[row], rtol=0, atol=1e-4)
        assert torch.equal(alone_tokens[0], tokens[row])


@torch.no_grad()
@pytest.mark.parametrize("text", CONTROLS)
@pytest.mark.parametrize("family", ["llava", "qwen2_vl"])
def test_without_a_cache_and_with_beams_they_decide_once(text, family):
    model, inputs, _ = build(family, "sdpa")
    options = {"max_new_tokens": 5, "do_sample": False, "num_beams": 2, "num_return_sequences": 2}
    found = []
    for use_cache in (True, False):
        with dyvte.VisualExit(reductions=parse_reductions(text))(model) as run:
            run.sample_ids = ["a", "b", "c"]
            found.append(model.generate(**inputs, **options, use_cache=use_cache))
        assert len(run.records) == 1
    assert torch.equal(*found)


@torch.no_grad()
def test_a_draw_is_of_seed_and_sample_and_nothing_else():
    reduction = RandomVisual(0, 0.5, seed=3)
    first, again = (answers_of([reduction])[0] for _ in range(2))
    assert torch.equal(first, again)
    other = answers_of([RandomVisual(0, 0.5, seed=4)])[0]
    assert not torch.equal(first, other)
    # before the first layer or behind it, the same tokens are drawn
    early, late = (answers_of([RandomVisual(k, 0.5, seed=3)])[2].records[0] for k in (0, 2))
    assert torch.equal(early.visual_tokens_BL[:, 3], late.visual_tokens_BL[:, 3])


@torch.no_grad()
def test_one_takes_of_what_another_left():
    logits, _, run = answers_of(parse_reductions("pool:2+fastv:2:0.5"))
    visual_B = run.records[0].num_visual_B
    assert run.records[0].visual_tokens_BL[:, 1].tolist() == (visual_B // 4).tolist()
    assert run.records[0].visual_tokens_BL[:, 3].tolist() == (visual_B // 8).tolist()
    _, _, run = answers_of([RandomVisual(0, 0.5), DivPrune(0.5)])
    assert run.records[0].visual_tokens_BL[:, 0].tolist() == (visual_B // 4).tolist()
    assert torch.isfinite(logits).all()


@torch.no_grad()
def test_states_given_are_not_changed():
    """The embeddings may be a user's own."""
    model, processor = llava()
    inputs = batch(processor)
    seen = []
    handle = model.get_decoder().register_forward_pre_hook(
        lambda module, args, kwargs: seen.append((kwargs["inputs_embeds"], kwargs["inputs_embeds"].clone())),
        with_kwargs=True,
    )
    try:
        with dyvte.VisualExit(reductions=[Pool(2)])(model):
            model(**inputs)
    finally:
        handle.remove()
    assert torch.equal(*seen[0])


@pytest.mark.parametrize("recomputed", [False, True])
def test_gradients_flow_into_what_was_averaged(recomputed):
    model, processor = tiny_llava(layers=4)
    inputs = batch(processor)
    if recomputed:
        model.train()
        model.activation_checkpointing_enable({"use_reentrant": False})
    states = []

    def keep(module, args, kwargs):
        kwargs["inputs_embeds"] = kwargs["inputs_embeds"].detach().requires_grad_()
        states.append(kwargs["inputs_embeds"])
        return args, kwargs

    handle = model.get_decoder().register_forward_pre_hook(keep, with_kwargs=True)
    try:
        with dyvte.VisualExit(reductions=[Pool(2)])(model):
            model(**inputs).logits[0, -1].logsumexp(0).backward()
    finally:
        handle.remove()
    gradient_ND = states[0].grad[0][inputs["input_ids"][0] == VISUAL_ID].view(4, 4, -1)
    assert gradient_ND.abs().sum() > 0
    # every token of a window has a quarter of its mean's
    for y in (0, 2):
        for x in (0, 2):
            window = gradient_ND[y : y + 2, x : x + 2].flatten(0, 1)
            torch.testing.assert_close(window, window[:1].expand(4, -1))


# --- refusals -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("pool:0", "expected S >= 1, got 0"),
        ("pool:2x", "expected pool:S, for example pool:2"),
        ("pool", "expected pool:S"),
        ("divprune:1.5", r"expected 0..1, got 1.5"),
        ("divprune:-1", "expected divprune:R"),
        ("random_visual:2", "expected random_visual:K:R"),
        ("random_visual:2:3", r"expected 0..1, got 3"),
        ("random_visuals:2:0.5", "did you mean 'random_visual'"),
        ("poool:2", "did you mean 'pool'"),
    ],
)
def test_what_is_no_control_is_said(text, problem):
    with pytest.raises(ConfigError, match=problem):
        parse_reduction(text)


def test_text_forms_are_their_own():
    for text in ("pool:2", "divprune:0.9", "random_visual:0:0.5:7"):
        assert repr(parse_reduction(text)) == text
    with pytest.raises(ConfigError, match="policy blind takes no argument"):
        parse_policy("blind:2")
    with pytest.raises(ConfigError, match=r"random_visual after layer 4: expected 0..3"):
        RandomVisual(4, 0.5).check(4)


@torch.no_grad()
@pytest.mark.parametrize(("family", "problem"), [("qwen3_vl", "deepstack"), ("llava_next", "newline token")])
def test_what_cannot_be_pooled_is_refused_on_entering(family, problem):
    model, _, _ = build(family, "sdpa")
    with (
        pytest.raises(UnsupportedBackboneError, match=problem),
        dyvte.VisualExit(reductions=[Pool(2)])(model),
    ):
        pass


@torch.no_grad()
def test_a_prompt_in_parts_is_refused():
    model, processor = llava()
    inputs = batch(processor, QUESTIONS[:1])
    exits = dyvte.VisualExit(reductions=[DivPrune(0.5)])
    with pytest.raises(ExitRuntimeError, match="prefill_chunk_size"), exits(model):
        model.generate(**inputs, max_new_tokens=2, do_sample=False, prefill_chunk_size=12)


def test_the_reference_keeps_what_is_far():
    states_ND = torch.eye(4)[[0, 0, 1, 2]] + 0.01 * torch.randn(
        4, 4, generator=torch.Generator().manual_seed(1)
    )
    _, gone_N = keeps_farthest(0.25)(states_ND, torch.ones(4, dtype=torch.bool), 0)
    assert int(gone_N.sum()) == 1
    assert gone_N[:2].any()
    assert FastV(2, 0.5).usage == "fastv:K:R"
