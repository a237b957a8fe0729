"""Plans judged from traces against the model run with that very policy and those reductions."""

from __future__ import annotations

import itertools
import json
import random

import pytest
import torch

import dyvte
from dyvte.backbones import describe
from dyvte.backbones.sizes import decoder_shape
from dyvte.comparison.plan_compare import compare_plans, mixture_for
from dyvte.comparison.plan_search import PlanSearch, combinations
from dyvte.comparison.plans import JudgedPlan, PlanJudge, PolicyAndReduction, choose, folder_name, front
from dyvte.costs.reductions import visual_factors
from dyvte.costs.visual import visual_share
from dyvte.errors import CalibrationError
from dyvte.gates import DEFAULT_FEATURES, GateConfig, GateStack
from dyvte.policies import parse_policy
from dyvte.reductions import parse_reductions
from dyvte.reporting.plans import plan_markdown, plan_table, plot_plans, search_table
from dyvte.teacher import trace_exits
from dyvte.teacher.plain import predicted_logits
from dyvte.teacher.reduced import Turn, answer_logits, trace_reduced_exits
from tests.helpers.rules import LAYERS
from tests.teacher.test_reduced import answered

TEXTS = ["fastv:2:0.5", "ffn:0.5", "neighbours:1+fastv:1:0.5"]


@torch.no_grad()
@pytest.mark.parametrize("text", TEXTS)
def test_a_plan_is_judged_as_the_model_does_under_it(text):
    model, inputs, answer_BN, _, _ = answered("llava")
    backbone, reductions = describe(model), parse_reductions(text)
    config = GateConfig(num_layers=LAYERS, hidden_size=32, architecture="compact", gate_hidden_size=8)
    gates = GateStack.init(config, seed=5)
    trace, _ = trace_reduced_exits(model, inputs, answer_BN, reductions)
    for one in reductions:
        one.check_backbone(backbone)
    judge = PlanJudge(text, reductions, trace, decoder_shape(model.config), gates, DEFAULT_FEATURES)
    # rows of text only have no place in a plan's compute
    turn = Turn.of(inputs, answer_BN)
    before_BN = torch.cat([answer_BN[:, 1:], torch.zeros_like(answer_BN[:, :1])], 1)
    full_BAV, _ = predicted_logits(model, inputs, before_BN)
    learned = judge.learned(12)
    exits_seen = set()
    for judged in [*judge.fixed(), *learned]:
        plan = judged.plan
        if plan.threshold is not None:
            exits = dyvte.VisualExit(gates, threshold=plan.threshold, reductions=reductions)
        else:
            exits = dyvte.VisualExit(fallback=plan.exit_layer, reductions=reductions)
        logits_BAV = answer_logits(model, turn, exits)
        with exits(model) as run:
            model(**turn.prompt)
        for row in (0, 2):
            real = turn.is_answer_BA[row]
            log_full = full_BAV[row][real].log_softmax(-1)
            log_exit = logits_BAV[row][real].log_softmax(-1)
            risk = (log_full.exp() * (log_full - log_exit)).sum(-1).mean()
            torch.testing.assert_close(judged.risk_B[row], risk, rtol=1e-3, atol=1e-6)
            same = bool((log_full.argmax(-1) == log_exit.argmax(-1)).all())
            assert bool(judged.same_answer_B[row]) == same
        exits_seen.add(tuple(run.exit_layers.tolist()))
        # the layers that visual tokens went through, counted by the runtime
        share = float(run.records[0].visual_tokens_BL.sum() / (LAYERS * run.records[0].num_visual_B.sum()))
        if "ffn" not in text and "neighbours" not in text:
            assert judged.compute == pytest.approx(share, rel=1e-6)
        else:
            assert judged.compute < share
    assert len(learned) > 3
    assert len(exits_seen) > 3
    bare = PlanJudge(text, reductions, trace, decoder_shape(model.config))
    assert bare.learned() == []
    with pytest.raises(CalibrationError, match="needs gates"):
        bare.judge(PolicyAndReduction(text, threshold=0.5))


@torch.no_grad()
def test_gates_stay_closed_where_traces_have_no_label():
    model, inputs, answer_BN, _, _ = answered("llava")
    gates = GateStack.init(GateConfig(num_layers=LAYERS, hidden_size=32), seed=5)
    shape = decoder_shape(model.config)
    for exits in ([2, LAYERS], [LAYERS]):
        trace, _ = trace_reduced_exits(model, inputs, answer_BN, parse_reductions("ffn:0.5"), exits=exits)
        judge = PlanJudge("none", [], trace, shape, gates, DEFAULT_FEATURES)
        found = judge.learned(9)
        shares = {round(one.compute * LAYERS, 6) for one in found}
        # both rows with an image leave after 2, or the one that holds a third of the visual tokens
        assert shares == ({2.0, round(2 / 3 * 4 + 1 / 3 * 2, 6)} if exits == [2, LAYERS] else set())
        assert round(judge.judge(PolicyAndReduction("none", threshold=0.0)).compute * LAYERS, 6) == exits[0]


@torch.no_grad()
@pytest.mark.parametrize("text", ["none", "fastv:2:0.5", "ffn:0.5", "frozen:1+fastv:3:0.5"])
def test_a_schedule_with_reductions_is_judged_as_the_model_does_under_it(text):
    model, inputs, answer_BN, _, _ = answered("llava")
    backbone, reductions = describe(model), parse_reductions(text)
    fields = {"num_layers": LAYERS, "hidden_size": 32, "freeze_head": True, "freeze_threshold": 0.4}
    gates = GateStack.init(GateConfig(**fields), seed=5)
    freezes = [0, 1, 3]
    if reductions:
        trace, _ = trace_reduced_exits(model, inputs, answer_BN, reductions, freezes=freezes)
    else:
        trace = trace_exits(model, inputs, answer_BN, freezes=freezes)
    for one in reductions:
        one.check_backbone(backbone)
    shape = decoder_shape(model.config)
    judge = PlanJudge(text, reductions, trace, shape, gates, DEFAULT_FEATURES)
    static, learned = judge.fixed(), judge.learned(9)
    assert len({one.plan for one in static}) == 4 + (4 + 3 + 1)
    assert {one.plan.policy for one in static} >= {"never", "fixed:2", "freeze:0", "freeze:1:3", "freeze:3"}
    turn = Turn.of(inputs, answer_BN)
    before_BN = torch.cat([answer_BN[:, 1:], torch.zeros_like(answer_BN[:, :1])], 1)
    full_BAV, _ = predicted_logits(model, inputs, before_BN)
    seen = set()
    for judged in [*static, *learned]:
        plan = judged.plan
        if plan.threshold is None:
            exits = dyvte.VisualExit.from_policy(parse_policy(plan.policy), reductions=reductions)
        else:
            exits = dyvte.VisualExit(gates, threshold=plan.threshold, reductions=reductions)
        # gates may freeze where the traces did not look
        with exits(model) as run:
            model(**turn.prompt)
        if plan.threshold is not None and 2 in run.freeze_layers[[0, 2]].tolist():
            continue
        seen.add((tuple(run.freeze_layers.tolist()), tuple(run.exit_layers.tolist())))
        logits_BAV = answer_logits(model, turn, exits)
        for row in (0, 2):
            real = turn.is_answer_BA[row]
            log_full = full_BAV[row][real].log_softmax(-1)
            log_exit = logits_BAV[row][real].log_softmax(-1)
            risk = (log_full.exp() * (log_full - log_exit)).sum(-1).mean()
            torch.testing.assert_close(judged.risk_B[row], risk, rtol=1e-3, atol=1e-6)
        record = run.records[0]
        counts = record.visual_tokens_BL, record.num_visual_B
        factors = visual_factors(reductions, shape, float(record.num_visual_B[[0, 2]].double().mean()))
        share = visual_share(shape, *counts, factors, frozen_BL=record.frozen_tokens_BL)
        assert judged.compute == pytest.approx(share, rel=1e-6)
    assert len(seen) > 12


# -- choosing -----------------------------------------------------------------------------------------------
def random_plans(seed: int) -> list[JudgedPlan]:
    draw = random.Random(seed)
    texts = ["none", "fastv:2:0.5", "ffn:0.5", "neighbours:2+ffn:0.5", "fastv:2:0.5+ffn:0.5"]
    plans = [
        PolicyAndReduction(text, **where)
        for text in texts
        for where in ({}, *({"exit_layer": k} for k in (1, 2, 3)), {"threshold": 0.3}, {"threshold": 0.7})
    ]
    # few values, so that there are ties
    return [
        JudgedPlan(plan, draw.randint(1, 12) / 12, torch.tensor([draw.randint(0, 6) / 2.0]), torch.ones(1))
        for plan in plans
    ]


@pytest.mark.parametrize("seed", range(20))
def test_choice_and_front_by_brute_force(seed):
    judged = random_plans(seed)
    for budget in (0.05, 0.25, 0.5, 1.0):
        found = choose(judged, budget)
        within = [one for one in judged if one.compute <= budget + 1e-9]
        if not within:
            assert found is None
            continue
        assert found in within
        assert all((found.risk, found.compute) <= (one.risk, one.compute) for one in within)
    best = front(judged)
    for one in judged:
        beaten = any(
            (other.compute <= one.compute and other.risk < one.risk)
            or (other.compute < one.compute and other.risk <= one.risk)
            for other in judged
        )
        equals = [(b.compute, b.risk) for b in best].count((one.compute, one.risk))
        assert equals == (0 if beaten else 1)
    assert all(a.compute < b.compute and a.risk > b.risk for a, b in itertools.pairwise(best))


@pytest.mark.parametrize(
    ("plan", "kind"),
    [
        (PolicyAndReduction("none"), "never"),
        (PolicyAndReduction("none", 3), "fixed"),
        (PolicyAndReduction("none", threshold=0.5), "gates"),
        (PolicyAndReduction("none", 3, freeze_layer=1), "freeze"),
        (PolicyAndReduction("none", freeze_layer=0), "freeze"),
        (PolicyAndReduction("frozen:2-3"), "ShortV"),
        (PolicyAndReduction("frozen:2-3", 3), "combined"),
        (PolicyAndReduction("frozen:2-3+ffn:0.5"), "combined"),
        (PolicyAndReduction("ffn:0.5", 3, freeze_layer=1), "combined"),
        (PolicyAndReduction("fastv:2:0.5"), "FastV"),
        (PolicyAndReduction("fastv:2:0.5", 3), "combined"),
        (PolicyAndReduction("ffn:0.5"), "YOPO"),
        # YOPO's own fourth strategy, lazy layer dropping
        (PolicyAndReduction("neighbours:2+ffn:0.5", 3), "YOPO"),
        (PolicyAndReduction("neighbours:2+ffn:0.5", threshold=0.5), "combined"),
        (PolicyAndReduction("neighbours:2+fastv:2:0.5"), "combined"),
    ],
)
def test_each_plan_is_of_one_method_or_combined(plan, kind):
    assert plan.kind == kind


def test_the_table_names_choice_and_single_method_for_each_budget():
    judged = random_plans(3)
    text = search_table(PlanSearch(tuple(judged), (0.5, 0.01), 1))
    rows = [line for line in text.splitlines() if "%" in line]
    assert len(rows) == 4
    assert rows[0].split("|")[3].strip() == choose(judged, 0.5).plan.policy
    singles = [one for one in judged if one.plan.kind != "combined"]
    assert rows[1].split("|")[3].strip() == choose(singles, 0.5).plan.policy
    assert "none is cheap enough" in rows[2]


@pytest.mark.parametrize("profile", [None, "some/folder"])
def test_combinations_differ_and_can_be_traced_side_by_side(profile):
    found = combinations(10, profile, num_heads=4)
    assert len(found) == len(set(found)) == len({folder_name(text) for text in found})
    assert found[0] == "none"
    assert any("fastv" in text and "neighbours" in text for text in found)
    assert all(("heads" in text) <= (profile is not None) for text in found)


# -- comparing held out -------------------------------------------------------------------------------------
@pytest.mark.parametrize("seed", range(12))
def test_the_mixture_for_a_budget_is_the_best_of_all_pairs(seed):
    judged = random_plans(seed)
    for budget in (0.05, 0.2, 0.37, 0.5, 0.81, 1.0):
        best = float("inf")
        for a, b in itertools.product(judged, repeat=2):
            if a.compute <= budget <= b.compute:
                share = 0.0 if a.compute == b.compute else (budget - a.compute) / (b.compute - a.compute)
                best = min(best, a.risk + share * (b.risk - a.risk))
        # an unspent rest is no fault: the least risk may be cheaper than the budget
        best = min([best, *(one.risk for one in judged if one.compute <= budget)])
        found = mixture_for(judged, budget)
        if best == float("inf"):
            assert found is None
            continue
        on_these = found.judged({one.plan: one for one in judged}.__getitem__)
        assert on_these.risk == pytest.approx(best, abs=1e-6)
        assert on_these.compute <= budget + 1e-9


class Shown:
    """Stands in for a judge: risk and compute of every plan are given."""

    def __init__(self, text, figures):
        self.text, self.figures = text, figures

    def fixed(self):
        return [self.judge(plan) for plan in self.figures]

    def learned(self):
        return []

    def judge(self, plan):
        compute, risk_B = self.figures[plan]
        return JudgedPlan(plan, compute, risk_B, torch.ones(len(risk_B)))


def test_a_comparison_chooses_on_one_set_and_judges_on_the_other(tmp_path):
    flat = torch.ones(40)
    noise = torch.randn(40, generator=torch.Generator().manual_seed(0)) * 0.01
    never, fixed = PolicyAndReduction("none"), PolicyAndReduction("none", 2)
    yopo, both = PolicyAndReduction("ffn:0.5", 2), PolicyAndReduction("ffn:0.5", threshold=0.5)
    calibration = [
        Shown("none", {never: (1.0, flat * 0), fixed: (0.5, flat)}),
        Shown("ffn:0.5", {yopo: (0.3, flat * 2), both: (0.3, flat * 0.5)}),
    ]
    test = [
        Shown("none", {never: (1.0, flat * 0), fixed: (0.52, flat * 3 + noise)}),
        Shown("ffn:0.5", {yopo: (0.3, flat * 2), both: (0.31, flat * 1.5)}),
    ]
    ids = [str(index // 2) for index in range(40)]
    found = compare_plans([calibration], [test], [0.5, 0.3, 0.1], ids, num_draws=200)
    assert found.at(0.5, "fixed K").risk == pytest.approx(3.0, abs=0.01)
    assert found.at(0.3, "fixed K") is None
    # at 0.5 a mixture of `both` and never is best on calibration: 2/7 never
    mixed = found.at(0.5, "any combination")
    assert mixed.risk == pytest.approx(1.5 * 5 / 7, rel=1e-6)
    assert mixed.compute == pytest.approx(0.31 * 5 / 7 + 2 / 7, rel=1e-6)
    assert found.verdict(0.5) == "better"
    gap = found.differences[0.3, "YOPO"]
    assert gap.difference == pytest.approx(-0.5, abs=1e-6)
    assert gap.num_images == 20
    assert found.verdict(0.1) == "not reached"
    rows = [line for line in plan_table(found).splitlines() if "10%" in line]
    assert all("out of reach" in row for row in rows)
    assert "judged on 40 about 20 images; 1 seed of the gates" in plan_markdown(found)
    assert json.loads(json.dumps(found.to_dict()))["verdicts"]["0.5"] == "better"
    plot_plans(found, tmp_path / "plans.png")
    assert (tmp_path / "plans.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(CalibrationError, match="lack a combination"):
        compare_plans([calibration], [test[:1]], [0.5], ids)
