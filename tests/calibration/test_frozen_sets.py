"""Sets of frozen layers: effects against brute force, rules against their definitions on all sets."""

from itertools import combinations

import pytest
import torch

from dyvte.backbones.sizes import decoder_shape
from dyvte.calibration.frozen_sets import (
    Effect,
    Effects,
    SetPasses,
    contribution_sets,
    count_sets,
    first_difference,
    greedy_sets,
    search_frozen_sets,
)
from dyvte.costs.visual import frozen_share, visual_compute
from dyvte.errors import CalibrationError, ConfigError, UnsupportedBackboneError
from dyvte.teacher.labels import append_answers
from tests.helpers.families import build
from tests.helpers.reference import frozen_by_hooks, positions_of

LAYERS = 4
ALL_SETS = [layers for size in range(LAYERS + 1) for layers in combinations(range(LAYERS), size)]


def answered(family="llava"):
    """A family's batch with answers behind it: rows with one image, none and two."""
    model, inputs, visual_ids = build(family, "eager")
    answer_BA = torch.randint(7, 60, (3, 4), generator=torch.Generator().manual_seed(2))
    mask_BA = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0], [1, 1, 0, 0]], dtype=torch.bool)
    return model, *append_answers(inputs, answer_BA, mask_BA), visual_ids


@torch.no_grad()
def logits_by_hooks(model, inputs, layers, visual_ids):
    """(B, N, V) of the whole sequence, the visual states put back after each frozen layer."""
    given = dict(inputs)
    ids, valid = given.pop("input_ids"), given.pop("attention_mask")
    frozen = torch.tensor([[index in layers] * len(ids) for index in range(LAYERS)])
    with frozen_by_hooks(model, frozen, visual_ids):
        return model(
            input_ids=ids,
            attention_mask=valid,
            position_ids=positions_of(model, ids, valid.bool(), inputs),
            use_cache=False,
            **given,
        ).logits


def effects_by_hooks(model, inputs, answer_BN, visual_ids):
    """Every set to (risk, risk at the first position, same answer) of the rows with an image: 0 and 2."""
    full = logits_by_hooks(model, inputs, (), visual_ids).double().log_softmax(-1)
    shown = torch.ones(full.shape[-1], dtype=torch.bool)
    shown[list(visual_ids)] = False
    found = {}
    for layers in ALL_SETS:
        log_q = logits_by_hooks(model, inputs, layers, visual_ids).double().log_softmax(-1)
        kl_BN = (full.exp() * (full - log_q)).sum(-1)
        equal_BN = full[..., shown].argmax(-1) == log_q[..., shown].argmax(-1)
        rows = []
        for row in (0, 2):
            at = answer_BN[row].nonzero().flatten() - 1
            rows.append((kl_BN[row, at].mean(), kl_BN[row, at[0]], equal_BN[row, at].all()))
        found[layers] = torch.tensor(rows, dtype=torch.float64).T
    return found


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl"])
def test_effects_equal_brute_force(family):
    model, inputs, answer_BN, visual_ids = answered(family)
    passes = SetPasses(model, [(inputs, answer_BN)])
    expected = effects_by_hooks(model, inputs, answer_BN, visual_ids)
    assert len(passes) == 2
    for one in passes(ALL_SETS):
        risk_B, first_B, same_B = expected[one.layers].float()
        torch.testing.assert_close(one.risk_B, risk_B, rtol=1e-3, atol=1e-6)
        torch.testing.assert_close(one.first_risk_B, first_B, rtol=1e-3, atol=1e-6)
        assert torch.equal(one.same_answer_B, same_B)
    assert [one.layers for one in passes([(1, 3), (0,), (1, 3)])] == [(1, 3), (0,), (1, 3)]


def test_the_greedy_sets_are_those_of_all_effects_known_by_brute_force():
    model, inputs, answer_BN, visual_ids = answered()
    expected = effects_by_hooks(model, inputs, answer_BN, visual_ids)
    passes = SetPasses(model, [(inputs, answer_BN)])
    found = search_frozen_sets(Effects(passes), LAYERS, passes.num_visual_B)
    before: tuple = ()
    for size, one in enumerate(found.sets["answer"], start=1):
        tried = [layers for layers in ALL_SETS if len(layers) == size and set(before) < set(layers)]
        assert one.layers == min(tried, key=lambda layers: float(expected[layers][0].mean()))
        before = one.layers
    singles = torch.stack([expected[index,][1].mean() for index in range(LAYERS)])
    torch.testing.assert_close(torch.tensor(found.contributions).double(), singles, rtol=1e-3, atol=1e-6)
    order = singles.argsort().tolist()
    assert [one.layers for one in found.sets["shortv"]] == [tuple(sorted(order[:n])) for n in range(1, 5)]
    assert [one.layers for one in found.sets["last"]] == [(3,), (2, 3), (1, 2, 3), (0, 1, 2, 3)]
    everything = [of[-1] for of in found.sets.values()]
    assert all(torch.equal(one.risk_B, everything[0].risk_B) for one in everything)


def of_table(table):
    """Effects from a table of (risk, share of equal answers) by set, and what was asked for."""
    asked = []

    def measure(sets):
        asked.extend(sets)
        same = {layers: (torch.arange(4) < table[layers][1]).float() for layers in sets}
        risk = {layers: torch.full((4,), table[layers][0]) for layers in sets}
        return [Effect(layers, risk[layers], risk[layers] / 2, same[layers]) for layers in sets]

    return measure, asked


# (risk, answers of four that stay the same); what is cheap alone is dear together
TABLE = {
    (0,): (0.3, 4), (1,): (0.1, 3), (2,): (0.1, 3), (0, 1): (0.4, 4), (0, 2): (0.5, 2), (1, 2): (0.9, 1),
    (0, 1, 2): (1.0, 0),
}  # fmt: skip


def test_the_objective_decides_and_equals_go_to_the_deeper_layer():
    measure, asked = of_table(TABLE)
    effects = Effects(measure)
    by_risk = greedy_sets(effects, 3, 3)
    assert [one.layers for one in by_risk] == [(2,), (0, 2), (0, 1, 2)]
    by_answer = greedy_sets(effects, 3, 2, "same_answer")
    assert [one.layers for one in by_answer] == [(0,), (0, 1)]
    assert contribution_sets([0.15, 0.05, 0.05], 3) == [(2,), (1, 2), (0, 1, 2)]
    assert len(asked) == len(set(asked)), "no set is measured twice"
    with pytest.raises(ConfigError, match="objective 'agreement'"):
        greedy_sets(effects, 3, 2, "agreement")


def test_what_was_measured_is_kept_and_not_measured_again():
    measure, asked = of_table(TABLE)
    kept = []
    first = search_frozen_sets(Effects(measure, keep=kept.append), 3, torch.ones(4))
    assert len(asked) <= count_sets(3, 3) == 10
    again = [Effect.of_dict(one.to_dict()) for one in kept[-1]]
    asked.clear()
    second = search_frozen_sets(Effects(measure, again), 3, torch.ones(4))
    assert asked == []
    assert [one.layers for one in second.sets["shortv"]] == [one.layers for one in first.sets["shortv"]]
    assert second.contributions == first.contributions
    # stopped in the middle
    asked.clear()
    third = search_frozen_sets(Effects(measure, kept[0]), 3, torch.ones(4))
    assert set(asked) == {(0, 2), (1, 2), (0, 1, 2)}
    assert third.sets["answer"][1].risk == first.sets["answer"][1].risk


def test_the_largest_set_that_keeps_a_share_of_the_answers():
    found = search_frozen_sets(Effects(of_table(TABLE)[0]), 3, torch.ones(4), objective="same_answer")
    assert found.largest("answer", 1.0).layers == (0, 1)
    assert found.largest("shortv", 0.75).layers == (2,)
    assert found.largest("shortv", 1.0) is None
    assert found.largest("answer", 0.0).layers == (0, 1, 2)


@pytest.mark.parametrize(
    ("one", "other", "layer"), [((0, 2), (0, 3), 2), ((), (1,), 1), ((1, 2), (1, 2), 3), ((0,), (0, 3), 3)]
)
def test_where_two_sets_part(one, other, layer):
    assert first_difference(one, other) == first_difference(other, one) == layer


def test_its_price_is_that_of_a_freeze():
    shape = decoder_shape(build("llava", "eager")[0].config)
    for first in range(LAYERS + 1):
        by_freeze = visual_compute(
            torch.tensor([LAYERS]), torch.tensor([7]), LAYERS, torch.tensor([first]), shape
        )
        assert frozen_share(shape, range(first, LAYERS)) == pytest.approx(by_freeze, rel=1e-12)


def test_bad_input_is_refused(monkeypatch):
    model, inputs, answer_BN, _ = answered()
    text_only = {name: inputs[name][1:2] for name in ("input_ids", "attention_mask")}
    with pytest.raises(CalibrationError, match="no sample with an image"):
        SetPasses(model, [(text_only, answer_BN[1:2])])
    for largest in (0, 5):
        with pytest.raises(ConfigError, match=r"expected 1\.\.4"):
            search_frozen_sets(Effects(of_table(TABLE)[0]), LAYERS, torch.ones(4), largest)
    monkeypatch.setattr("dyvte.runtime.frozen.query_projections", lambda layer: ())
    with pytest.raises(UnsupportedBackboneError, match="cannot be frozen"):
        SetPasses(model, [(inputs, answer_BN)])
