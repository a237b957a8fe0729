"""The generic path on every family: equal to brute force, tokens and logits.

The normal tier runs a set of exits that covers first, middle, last, none and all mixtures of early and late
on both attention functions; the whole product runs in the full tier.
"""

from functools import cache
from itertools import product

import pytest
import torch

import dyvte
from dyvte.policies import OraclePolicy
from tests.helpers.families import ATTENTION, FAMILIES, build, one_row
from tests.helpers.reference import exit_by_masks, greedy_cached, greedy_reference
from tests.helpers.zoo.common import END, IMAGE, START

LAYERS = 4
GREEDY = {
    "max_new_tokens": 9,
    "do_sample": False,
    "output_logits": True,
    "return_dict_in_generate": True,
}
# rows: one image, no image, two images
FAST = {"sdpa": ([1, -1, 3], [0, -1, 4]), "eager": ([2, -1, 2], [4, -1, 1])}
REST = [
    (attention, [a, -1, b])
    for attention, a, b in product(FAST, range(LAYERS + 1), range(LAYERS + 1))
    if [a, -1, b] not in FAST[attention] and (a, b) != (LAYERS, LAYERS)
]


@cache
def stock(family, attention):
    model, inputs, _ = build(family, attention)
    return model.generate(**inputs, **GREEDY)


def check(family, attention, exits):
    model, inputs, visual_ids = build(family, attention)
    with exit_by_masks(model, exits, visual_ids, attention=ATTENTION.get(family)):
        expected = model.generate(**inputs, **GREEDY, use_cache=False)
    with dyvte.VisualExit.from_policy(OraclePolicy(exits))(model) as run:
        got = model.generate(**inputs, **GREEDY)
    assert run.exit_layers.tolist() == exits
    assert torch.equal(got.sequences, expected.sequences)
    for step, (a, b) in enumerate(zip(got.logits, expected.logits, strict=True)):
        assert (a - b).abs().max() < 1e-4, (exits, step)
    # rows that left early must differ from the full model, or this proves nothing
    change_B = (got.logits[0] - stock(family, attention).logits[0]).abs().amax(1)
    assert all(change_B[row] > 1e-3 for row in (0, 2) if exits[row] < LAYERS)


@pytest.mark.parametrize("attention", FAST)
@pytest.mark.parametrize("family", FAMILIES)
def test_generate_equals_brute_force(family, attention):
    for exits in FAST[attention]:
        check(family, attention, exits)


@pytest.mark.full
@pytest.mark.parametrize(("attention", "exits"), REST, ids=[f"{a}-{e[0]}-{e[2]}" for a, e in REST])
@pytest.mark.parametrize("family", FAMILIES)
def test_generate_equals_brute_force_at_every_pair_of_exits(family, attention, exits):
    check(family, attention, exits)


@pytest.mark.full
@pytest.mark.parametrize("family", FAMILIES)
def test_beam_search_equals_brute_force(family):
    model, inputs, visual_ids = build(family, "sdpa")
    options = {"max_new_tokens": 6, "do_sample": False, "num_beams": 3, "num_return_sequences": 2}
    for exits in ([1, -1, 3], [0, -1, 4]):
        with exit_by_masks(model, exits, visual_ids, attention=ATTENTION.get(family)):
            expected = model.generate(**inputs, **options, use_cache=False)
        with dyvte.VisualExit.from_policy(OraclePolicy(exits))(model):
            assert torch.equal(model.generate(**inputs, **options), expected)


def test_ids_given_by_the_user_leave_too():
    # a family may mark its visual tokens by several ids that its config does not name
    model, inputs, _ = build("internvl", "sdpa")
    ids, exits = (IMAGE, START, END), [2, -1, 1]
    with exit_by_masks(model, exits, ids):
        expected = model.generate(**inputs, **GREEDY, use_cache=False)
    with dyvte.VisualExit.from_policy(OraclePolicy(exits), visual_token_ids=ids)(model) as run:
        got = model.generate(**inputs, **GREEDY)
    assert run.records[0].num_visual_B.tolist() == [6, 0, 20]
    assert torch.equal(got.sequences, expected.sequences)
    for a, b in zip(got.logits, expected.logits, strict=True):
        assert (a - b).abs().max() < 1e-4


def right_padded(inputs):
    """The same rows, padding on the other side."""
    moved = dict(inputs)
    for name in inputs.keys() & {"input_ids", "attention_mask", "token_type_ids", "mm_token_type_ids"}:
        rows = zip(inputs[name], (1 - inputs["attention_mask"]).sum(1).tolist(), strict=True)
        moved[name] = torch.stack([row.roll(-pad) for row, pad in rows])
    return moved


def check_right_padding(family, attention, exits):
    model, inputs, visual_ids = build(family, attention)
    inputs = right_padded(inputs)
    expected_logits, expected_tokens = greedy_reference(
        model, inputs, exits, visual_ids, 8, attention=ATTENTION.get(family)
    )
    with dyvte.VisualExit.from_policy(OraclePolicy(exits))(model):
        logits, tokens, _ = greedy_cached(model, inputs, visual_ids, 8)
    torch.testing.assert_close(logits, expected_logits, rtol=0, atol=1e-4)
    assert torch.equal(tokens, expected_tokens)


@pytest.mark.parametrize("family", FAMILIES)
def test_right_padding_equals_brute_force(family):
    check_right_padding(family, "sdpa", [1, -1, 3])


@pytest.mark.full
@pytest.mark.parametrize("exits", [[0, -1, 4], [2, -1, 2], [4, -1, 1], [3, -1, 0]], ids=str)
@pytest.mark.parametrize("attention", FAST)
@pytest.mark.parametrize("family", FAMILIES)
def test_right_padding_equals_brute_force_at_more_exits(family, attention, exits):
    check_right_padding(family, attention, exits)


@pytest.mark.parametrize("family", FAMILIES)
def test_each_row_equals_its_batch_of_one(family):
    # one image, no image, two images (of different size where the family knows such)
    model, inputs, visual_ids = build(family, "sdpa")
    exits = [1, -1, 3]
    with dyvte.VisualExit.from_policy(OraclePolicy(exits))(model):
        together, tokens, _ = greedy_cached(model, inputs, visual_ids, 4)
    for row, k in enumerate(exits):
        with dyvte.VisualExit.from_policy(OraclePolicy([k]))(model):
            alone, alone_tokens, _ = greedy_cached(model, one_row(family, inputs, row), visual_ids, 4)
        torch.testing.assert_close(alone[0], together[row], rtol=0, atol=1e-4)
        assert torch.equal(alone_tokens[0], tokens[row])


@pytest.mark.parametrize("family", FAMILIES)
def test_never_is_the_stock_model(family):
    model, inputs, _ = build(family, "sdpa")
    logits = model(**inputs).logits
    with dyvte.VisualExit()(model):
        assert torch.equal(model(**inputs).logits, logits)
