"""Traces of a reduced backbone equal the one-pass teacher where nothing is reduced, and the rule's masks."""

import pytest
import torch

import dyvte
from dyvte.policies import FixedPolicy
from dyvte.reductions import (
    DivPrune,
    FastV,
    Neighbours,
    Pool,
    RandomTokens,
    RandomVisual,
    SparseFFN,
    parse_reductions,
)
from dyvte.runtime.replay import Replay
from dyvte.teacher import Trace, trace_exits
from dyvte.teacher.labels import append_answers
from dyvte.teacher.reduced import Turn, answer_logits, trace_reduced_exits
from tests.helpers.families import build
from tests.helpers.rules import LAYERS, fastv_rule, hidden_by_rule


def answered(family):
    """A family's batch with two answers of random length behind it, and one more."""
    model, inputs, visual_ids = build(family, "sdpa")
    answer_BA = torch.randint(7, 60, (3, 4), generator=torch.Generator().manual_seed(2))
    mask_BA = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0], [1, 0, 0, 0]], dtype=torch.bool)
    grown, answer_BN = append_answers(inputs, answer_BA, mask_BA)
    return model, grown, answer_BN, visual_ids, inputs


@pytest.mark.parametrize("family", ["llava", "qwen2_vl"])
def test_without_a_reduction_it_is_the_one_pass_trace(family):
    model, inputs, answer_BN, _, _ = answered(family)
    expected = trace_exits(model, inputs, answer_BN)
    # a share of 0 reduces nothing, but goes the long way
    found, _ = trace_reduced_exits(model, inputs, answer_BN, [FastV(2, 0.0)])
    for name, tensor in expected.tensors().items():
        torch.testing.assert_close(getattr(found, name), tensor, rtol=0, atol=1e-4, msg=name)


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl", "qwen3_vl"])
def test_without_a_reduction_the_grid_is_that_of_the_one_pass(family):
    model, inputs, answer_BN, _, _ = answered(family)
    how = {"exits": [1, 3, 4], "freezes": [0, 2, 3], "features": ("mean_prompt", "mean_visual")}
    expected = trace_exits(model, inputs, answer_BN, **how)
    found, _ = trace_reduced_exits(model, inputs, answer_BN, [FastV(2, 0.0)], **how)
    assert (found.exits, found.freezes) == (expected.exits, expected.freezes)
    for name, tensor in expected.grid.tensors().items():
        got = getattr(found.grid, name)
        torch.testing.assert_close(got, tensor, rtol=0, atol=1e-4, msg=name, equal_nan=True)
    assert found.grid.kv_share == expected.grid.kv_share
    found.grid.check(found.exits, found.tensors())


@torch.no_grad()
@pytest.mark.parametrize("text", ["fastv:2:0.5", "ffn:0.5", "frozen:1+fastv:3:0.5"])
def test_every_schedule_of_a_reduced_backbone_is_its_own_pass(text):
    model, inputs, answer_BN, _, _ = answered("llava")
    reductions = parse_reductions(text)
    found, _ = trace_reduced_exits(model, inputs, answer_BN, reductions, freezes=[0, 1, 3])
    turn = Turn.of(inputs, answer_BN)
    full = trace_reduced_exits(model, inputs, answer_BN, [FastV(2, 0.0)], exits=[LAYERS])[0]
    assert full.risk[:, LAYERS].abs().max() < 1e-6
    never = dyvte.VisualExit.fixed(LAYERS)
    log_p = answer_logits(model, turn, never)[turn.is_answer_BA].log_softmax(-1)
    rows = turn.is_answer_BA.nonzero()[:, 0]
    for f, k in [(0, 0), (0, 2), (0, 4), (1, 1), (1, 3), (3, 4), (1, 4)]:
        exits = dyvte.VisualExit.fixed(k, freeze_layer=f, reductions=reductions)
        log_q = answer_logits(model, turn, exits)[turn.is_answer_BA].log_softmax(-1)
        kl = (log_p.exp() * (log_p - log_q)).sum(-1)
        for row in range(3):
            got = found.grid.risk[row, (0, 1, 3).index(f), k]
            torch.testing.assert_close(got, kl[rows == row].mean(), rtol=1e-3, atol=1e-6)
    assert found.grid.risk[:, 2, :3].isnan().all()


@torch.no_grad()
@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl"])
def test_risk_and_features_are_those_of_the_rule(family):
    model, inputs, answer_BN, visual_ids, prompt = answered(family)
    eager = build(family, "eager")[0]
    found, _ = trace_reduced_exits(model, inputs, answer_BN, [FastV(2, 0.5)])
    assert isinstance(found, Trace)
    full = logits_of(eager, inputs, prompt).log_softmax(-1)
    for k in range(LAYERS + 1):
        # the rule looks at the prompt alone: its last row is the one before the answer
        with hidden_by_rule(eager, [k, -1, k], visual_ids, fastv_rule(0.5), 2):
            eager(**prompt)
            reduced = logits_of(eager, inputs, prompt).log_softmax(-1)
        for row in (0, 2):
            at = torch.cat([answer_BN[row, 1:], answer_BN[row, :1]]).nonzero().flatten()
            kl = (full[row, at].exp() * (full[row, at] - reduced[row, at])).sum(-1).mean()
            torch.testing.assert_close(found.risk[row, k], kl, rtol=1e-3, atol=1e-5)
    assert (found.risk[[0, 2], LAYERS] > 1e-6).all()
    assert found.risk[1].abs().max() < 1e-6


def logits_of(model, inputs, prompt):
    """Of prompts and answers, with positions that count real tokens."""
    given = dict(inputs)
    if not hasattr(model.model, "get_rope_index"):
        given["position_ids"] = (inputs["attention_mask"].cumsum(1) - 1).clamp(min=0)
    return model(**given, use_cache=False).logits


@torch.no_grad()
def test_cheaper_tokens_have_traces_too():
    model, inputs, answer_BN, _, _ = answered("llava")
    found, _ = trace_reduced_exits(model, inputs, answer_BN, [SparseFFN(0.5)], exits=[2, LAYERS])
    assert found.exits == (2, LAYERS)
    assert torch.isnan(found.risk[:, 1]).all()
    assert (found.risk[[0, 2]][:, [2, LAYERS]] > 0).all()


REDUCED = [[FastV(1, 0.5), FastV(3, 1.0)], [RandomTokens(2), SparseFFN(0.5)], [FastV(2, 0.0)]]
CONTROLS = [[Pool(2)], [DivPrune(0.5), FastV(2, 0.5)], [RandomVisual(0, 0.5)]]
CASES = [
    *[(family, case) for family in ("qwen3_vl", "gemma3") for case in (0, 1)],
    *[("llava", case) for case in range(7)],
]


@torch.no_grad()
@pytest.mark.parametrize(("family", "case"), CASES)
def test_what_passes_have_in_common_is_computed_once_and_changes_nothing(family, case):
    model, inputs, answer_BN, _, _ = answered(family)
    reductions = [*REDUCED, [Neighbours(1), FastV(2, 0.5)], *CONTROLS][case]
    turn, replay, calls = Turn.of(inputs, answer_BN), Replay(), []
    handles = [
        layer.mlp.register_forward_hook(lambda *_, index=index: calls.append(index))
        for index, layer in enumerate(model.get_decoder().layers)
    ]
    for k in (LAYERS, *reversed(range(LAYERS))):
        exits = dyvte.VisualExit.from_policy(FixedPolicy(k), reductions=reductions)
        expected = answer_logits(model, turn, exits, sample_ids=["a", "b", "c"])
        exits.replay, replay.upto = replay, None if k == LAYERS else k
        alone, calls[:] = list(calls), []
        got = answer_logits(model, turn, exits, sample_ids=["a", "b", "c"])
        assert (got - expected)[turn.is_answer_BA].abs().max() < 1e-5, k
        # the prefill starts at layer k; the answer runs through all of them
        assert set(calls[:-LAYERS]) == set(range(0 if k == LAYERS else k, LAYERS))
        assert set(alone[:-LAYERS]) == set(range(LAYERS))
        calls.clear()
    for handle in handles:
        handle.remove()
