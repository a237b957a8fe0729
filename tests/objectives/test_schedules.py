"""Expected risk over both layers against enumeration in float64; its losses; exits alone as they were."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from dyvte.errors import ConfigError
from dyvte.gates import CLOSED, HeadLogits, exit_probabilities, schedule_probabilities
from dyvte.objectives import ExpectedRisk, answer_loss, expected_risk
from dyvte.objectives.expectation import expected_cost
from dyvte.objectives.losses import is_bounded
from dyvte.teacher.trace import Trace
from tests.helpers.traces import make_trace

LAYERS, SHARE = 5, 1 / 6


def random_logits(rows: int, freezes: tuple[int, ...], dtype=torch.float64, seed: int = 1) -> HeadLogits:
    generator = torch.Generator().manual_seed(seed)
    exit_BGL = torch.randn(rows, len(freezes) + 1, LAYERS, generator=generator, dtype=torch.float64)
    freeze_BL = torch.randn(rows, LAYERS, generator=generator, dtype=torch.float64)
    for i, f in enumerate(freezes):
        exit_BGL[:, i, :f] = exit_BGL[:, -1, :f]
    return HeadLogits(exit_BGL.to(dtype), freeze_BL.to(dtype), freezes)


def by_enumeration(logits, trace, *, lam, memory_price=0.0, loss="risk", shift=0.0) -> float:
    """Every (f, k) of every row: its chance, a product over the gates on the way; its loss and price."""

    def chance(logit: torch.Tensor) -> float:
        return 1 / (1 + math.exp(min(-(float(logit) + shift), 700)))

    def value(row: int, f: int, k: int) -> float:
        columns = trace if f == k else trace.grid
        at = (row, k) if f == k else (row, trace.freezes.index(f), k)
        risk = float(columns.risk[at])
        wrong = {
            "risk": risk,
            "same_answer": 1 - float(columns.same_answer[at]),
            "risk:0.5": min(risk, 0.5) / 0.5,
        }
        return wrong[loss] + (lam * (f + SHARE * (k - f)) + memory_price * k) / LAYERS

    total, mass = 0.0, 0.0
    for row in range(len(trace)):
        plain = logits.exit_BGL[row, -1]
        for f in range(LAYERS + 1):
            for k in range(max(f, 1), LAYERS + 1):
                if f < k and f not in trace.freezes:
                    continue
                p = 1.0
                for j in range(min(f, LAYERS)):  # passed layer j: neither left nor frozen there
                    p *= 1 - chance(plain[j - 1]) if j else 1
                    p *= 1 - chance(logits.freeze_BL[row, j]) if j in trace.freezes else 1
                if f == k:
                    p *= chance(plain[k - 1]) if k < LAYERS else 1
                else:
                    p *= (1 - chance(plain[f - 1]) if f else 1) * chance(logits.freeze_BL[row, f])
                    stream = logits.exit_BGL[row, trace.freezes.index(f)]
                    for j in range(f + 1, k):
                        p *= 1 - chance(stream[j - 1])
                    p *= chance(stream[k - 1]) if k < LAYERS else 1
                total += p * value(row, f, k)
                mass += p
    assert mass == pytest.approx(len(trace), rel=1e-12)
    return total / len(trace)


@pytest.mark.parametrize("freezes", [(0, 1, 2, 3, 4), (0, 2), (3,)])
@pytest.mark.parametrize("settings", [
    {"lam": 0.3}, {"lam": 0.0}, {"lam": 0.2, "memory_price": 0.4},
    {"lam": 0.1, "loss": "same_answer"}, {"lam": 0.1, "loss": "risk:0.5"},
])  # fmt: skip
def test_expected_risk_enumerates_all_schedules(freezes, settings) -> None:
    trace = make_trace(6, LAYERS, freezes=freezes)
    logits = random_logits(6, freezes)
    expected = by_enumeration(logits, trace, **settings)
    assert float(expected_risk(logits, trace, **settings)) == pytest.approx(expected, rel=1e-10)
    # in single precision too, and whatever the head says of freeze layers that are not traced
    single = float(expected_risk(random_logits(6, freezes, torch.float32), trace, **settings))
    assert single == pytest.approx(expected, rel=1e-4)


def test_many_prices_pair_each_price_with_a_shift_of_both_heads() -> None:
    trace, logits = make_trace(6, LAYERS, freezes=(0, 2)), random_logits(6, (0, 2))
    terms = []
    for x in (1 / 10, 10**-0.5, 1.0, 10**0.5, 10.0):
        alone = by_enumeration(logits, trace, lam=0.2 * x, memory_price=0.1 * x, shift=3 * math.log(x))
        terms.append(alone / math.sqrt(x))
    got = expected_risk(logits, trace, lam=0.2, span=10, points=5, shift=3.0, memory_price=0.1)
    assert float(got) == pytest.approx(sum(terms) / 5, rel=1e-10)


def test_thinned_labels_are_passed_over() -> None:
    whole = make_trace(6, LAYERS, freezes=(0, 2, 4))
    thin = whole.thinned(exits=(0, 2, 4), freezes=(0, 2))
    logits = random_logits(6, (0, 2)).closed_elsewhere()
    exit_BGL = logits.exit_BGL.clone()
    exit_BGL[..., [0, 2]] = CLOSED  # exits 1 and 3 are not labelled
    closed = HeadLogits(exit_BGL, logits.freeze_BL, (0, 2))
    got = float(expected_risk(logits, thin, lam=0.3))
    assert got == pytest.approx(by_enumeration(closed, whole.thinned(freezes=(0, 2)), lam=0.3), rel=1e-10)


def test_gradients_reach_every_gate_that_can_decide() -> None:
    trace, logits = make_trace(6, LAYERS, freezes=(0, 2)), random_logits(6, (0, 2))
    exit_BGL, freeze_BL = logits.exit_BGL.requires_grad_(), logits.freeze_BL.requires_grad_()
    expected_risk(HeadLogits(exit_BGL, freeze_BL, (0, 2)), trace, lam=0.1, span=10).backward()
    asked = torch.tensor([[1, 1, 1, 1, 0], [0, 0, 1, 1, 0], [1, 1, 1, 1, 0]]).bool()
    assert (exit_BGL.grad[:, asked] != 0).all()
    assert (exit_BGL.grad[:, ~asked] == 0).all()
    assert (freeze_BL.grad[:, [0, 2]] != 0).all()
    assert (freeze_BL.grad[:, [1, 3, 4]] == 0).all()


def todays_value(logits_BL, trace, lam, span, points=7, shift=4.0):
    """The objective of exits alone, as it was before there was a freeze head, operation by operation."""
    log_x_S = torch.linspace(-math.log(span), math.log(span), points if span > 1 else 1, dtype=torch.float64)
    price_S = lam * log_x_S.exp()
    shifted_SBL = logits_BL + (shift * log_x_S).to(logits_BL)[:, None, None]
    log_p_SBL = exit_probabilities(shifted_SBL.flatten(0, 1)).unflatten(0, shifted_SBL.shape[:2])
    share_L = torch.arange(1, trace.num_layers + 1).to(log_x_S) / trace.num_layers
    cost_SBL = trace.risk[:, 1:].to(log_p_SBL) + (price_S[:, None] * share_L).to(log_p_SBL)[:, None]
    objective_S = (log_p_SBL.exp() * cost_SBL).sum(2).mean(1)
    return (objective_S * (-log_x_S / 2).exp().to(objective_S)).mean()


@pytest.mark.parametrize("span", [1.0, 100.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("freezes", [(), (0, 3)])
def test_exits_alone_have_the_value_they_had_bit_for_bit(span, dtype, freezes) -> None:
    trace = make_trace(64, 10, freezes=freezes)  # a grid changes nothing for gates without freeze head
    logits = torch.randn(64, 10, generator=torch.Generator().manual_seed(3)).to(dtype).requires_grad_()
    mine, before = expected_risk(logits, trace, lam=0.1, span=span), todays_value(logits, trace, 0.1, span)
    assert torch.equal(mine, before)
    assert torch.equal(*(torch.autograd.grad(value, logits)[0] for value in (mine, before)))


def test_a_freeze_head_that_stays_shut_is_no_head() -> None:
    trace = make_trace(6, LAYERS, freezes=(0, 2))
    logits = random_logits(6, (0, 2))
    shut = HeadLogits(logits.exit_BGL, torch.full_like(logits.freeze_BL, CLOSED), (0, 2))
    got = expected_risk(shut, trace, lam=0.3, span=10)
    assert float(got) == pytest.approx(float(expected_risk(logits.plain_BL, trace, lam=0.3, span=10)))


def test_losses_by_name() -> None:
    trace = make_trace(4, LAYERS, freezes=(0, 2))
    assert torch.equal(answer_loss(trace, "risk").nan_to_num(-1), trace.labels("risk").nan_to_num(-1))
    assert torch.equal(answer_loss(trace, "same_answer")[:, -1], 1 - trace.same_answer)
    assert torch.equal(answer_loss(trace, "risk:0.25")[:, -1], trace.risk.clamp(max=0.25) / 0.25)
    for name in ("risk:0", "risk:x", "kl", "risk:-1"):
        with pytest.raises(ConfigError, match="same_answer"):
            ExpectedRisk(loss=name)
    with pytest.raises(ValueError, match="memory_price"):
        ExpectedRisk(memory_price=-0.1)
    loss = ExpectedRisk(lam=0.2, span=1.0, loss="same_answer").prepared(trace)
    logits = random_logits(4, (0, 2))
    assert float(loss(logits, trace)) == pytest.approx(
        by_enumeration(logits, trace, lam=0.2, loss="same_answer"), rel=1e-10
    )


def test_logits_and_labels_must_be_of_one_trace() -> None:
    trace: Trace = make_trace(4, LAYERS, freezes=(0, 2))
    for other in (trace.thinned(freezes=(0,)), replace(trace, grid=None)):
        with pytest.raises(ConfigError, match=r"frozen after \(0, 2\)"):
            expected_risk(random_logits(4, (0, 2)), other)


def test_losses_joined_are_their_mean() -> None:
    trace = make_trace(4, LAYERS, freezes=(0, 2))
    mean = (answer_loss(trace, "same_answer") + answer_loss(trace, "risk:0.5")) / 2
    torch.testing.assert_close(answer_loss(trace, "same_answer+risk:0.5"), mean, equal_nan=True)
    ExpectedRisk(loss="same_answer+risk:0.5")
    with pytest.raises(ConfigError, match="joined by"):
        ExpectedRisk(loss="same_answer+kl")
    assert is_bounded("same_answer+risk:0.5")
    assert not is_bounded("same_answer+risk")


def summed(logits: HeadLogits, shift_S, loss_BGL, price_SGL, weight_SB) -> torch.Tensor:
    """The expectation as the sum over all schedules that it stands for."""
    total = torch.zeros((), dtype=torch.float64)
    for s, shift in enumerate(shift_S.tolist()):
        chance_BGL = schedule_probabilities(logits.shifted(shift, shift).closed_elsewhere()).exp()
        total = total + weight_SB[s].double() @ (chance_BGL * (loss_BGL + price_SGL[s])).sum((1, 2))
    return total


@pytest.mark.parametrize("freezes", [(0, 1, 2, 3, 4), (0, 2), (3,)])
@pytest.mark.parametrize("scale", [1.0, 30.0])  # chances that round to 0 and 1 in single precision
def test_the_recursion_has_the_value_and_the_gradient_of_the_sum(freezes, scale) -> None:
    generator = torch.Generator().manual_seed(7)
    of = {"generator": generator, "dtype": torch.float64}
    logits = random_logits(6, freezes)
    parts = [(scale * part).requires_grad_() for part in (logits.exit_BGL, logits.freeze_BL)]
    logits = HeadLogits(*parts, freezes)
    shape = (len(freezes) + 1, LAYERS)
    given = (
        torch.randn(3, **of),
        torch.rand(6, *shape, **of),
        torch.rand(3, *shape, **of),
        torch.rand(3, 6, **of),
    )
    got, expected = expected_cost(logits, *given), summed(logits, *given)
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=0)
    wanted = torch.autograd.grad(expected, parts)
    for mine, theirs in zip(torch.autograd.grad(got, parts), wanted, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-9, atol=1e-14)
    single = [part.detach().float().requires_grad_() for part in parts]
    got = expected_cost(HeadLogits(*single, freezes), *given)
    assert got.dtype == torch.float32
    for mine, theirs in zip(torch.autograd.grad(got, single), wanted, strict=True):
        torch.testing.assert_close(mine.double(), theirs, rtol=1e-3, atol=1e-6)


def test_small_chances_are_not_rounded_away() -> None:
    # a gate that nearly all rows have passed still learns: 1 - sigmoid(30) is no zero in single precision
    exit_BGL = torch.zeros(1, 2, LAYERS)
    exit_BGL[0, -1, 0] = 30.0
    parts = [exit_BGL.requires_grad_(), torch.zeros(1, LAYERS).requires_grad_()]
    zeros = torch.zeros(1, 2, LAYERS)
    given = (torch.zeros(1), torch.rand(1, 2, LAYERS), zeros, torch.ones(1, 1))
    got = torch.autograd.grad(expected_cost(HeadLogits(*parts, (3,)), *given), parts)
    double = [part.detach().double().requires_grad_() for part in parts]
    wanted = torch.autograd.grad(summed(HeadLogits(*double, (3,)), *given), double)
    assert (got[0][0, -1, 1:4] != 0).all()
    for mine, theirs in zip(got, wanted, strict=True):
        torch.testing.assert_close(mine.double(), theirs, rtol=1e-3, atol=0)


def test_without_a_gradient_the_value_is_the_same() -> None:
    trace, logits = make_trace(6, LAYERS, freezes=(0, 2)), random_logits(6, (0, 2))
    with torch.no_grad():
        alone = expected_risk(logits, trace, lam=0.1, span=10)
    wanted = HeadLogits(logits.exit_BGL.requires_grad_(), logits.freeze_BL.requires_grad_(), (0, 2))
    assert torch.equal(alone, expected_risk(wanted, trace, lam=0.1, span=10).detach())
