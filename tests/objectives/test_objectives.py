"""Objectives against enumeration in float64, the reference's own arithmetic, and the starvation bound."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from dyvte.errors import ConfigError
from dyvte.gates import GateConfig, GateStack, exit_layers, uniform_offsets
from dyvte.objectives import (
    OBJECTIVES,
    ExpectedRisk,
    ReferenceLabel,
    SafeLabel,
    expected_risk,
    reference_label,
    reference_labels,
    safe_label,
    safe_labels,
)
from dyvte.objectives.safe_label import class_balance
from dyvte.teacher.trace import Trace
from tests.helpers.traces import make_trace


def test_expected_risk_equals_walking_through_the_gates() -> None:
    layers, lam = 5, 0.3
    trace = make_trace(7, layers)
    logits = torch.randn(7, layers, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    total = 0.0
    for row in range(7):
        inside = 1.0
        for k in range(1, layers + 1):
            leave = 1 / (1 + math.exp(-float(logits[row, k - 1]))) if k < layers else 1.0
            total += inside * leave * (float(trace.risk[row, k]) + lam * k / layers)
            inside *= 1 - leave
    assert float(expected_risk(logits, trace, lam=lam)) == pytest.approx(total / 7, rel=1e-9)


def test_expected_risk_is_the_mean_over_sampled_exits() -> None:
    """Independent of any formula for P: enumerate every pattern of gate coins."""
    layers = 4
    trace = make_trace(1, layers, seed=3)
    logits = torch.tensor([[0.4, -1.1, 0.7, 99.0]], dtype=torch.float64)
    chance = torch.sigmoid(logits[0, :3]).tolist()
    mean = 0.0
    for coins in itertools.product((0, 1), repeat=3):
        weight = math.prod(p if coin else 1 - p for p, coin in zip(chance, coins, strict=True))
        k = coins.index(1) + 1 if 1 in coins else layers
        mean += weight * (float(trace.risk[0, k]) + 0.2 * k / layers)
    assert float(expected_risk(logits, trace, lam=0.2)) == pytest.approx(mean, rel=1e-9)


def test_span_is_the_weighted_mean_of_shifted_prices() -> None:
    trace = make_trace(6, 5)
    logits = torch.randn(6, 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    terms = []
    for x in (0.01, 1.0, 100.0):
        shifted = logits + 4.0 * math.log(x)
        terms.append(float(expected_risk(shifted, trace, lam=0.2 * x)) / math.sqrt(x))
    found = expected_risk(logits, trace, lam=0.2, span=100.0, points=3)
    assert float(found) == pytest.approx(sum(terms) / 3, rel=1e-5)


def test_with_span_each_threshold_is_optimal_for_its_price() -> None:
    """Logits free per sample: at the optimum, thresholds walk through the exits that each price wants."""
    risk = torch.tensor([[9.0, 1.0, 0.2, 0.03, 0.0]]).double()
    trace = make_trace(1, 4)
    trace = Trace(**{**trace.tensors(), "risk": risk, "sample_ids": trace.sample_ids})
    logits = torch.zeros(1, 4, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.Adam([logits], lr=0.2)
    for _ in range(1500):
        optimizer.zero_grad()
        expected_risk(logits, trace, lam=1.0, span=100.0, points=15).backward()
        optimizer.step()
    for x in (0.02, 0.3, 1.5, 30.0):
        wanted = int((risk[0, 1:] + 1.0 * x * torch.arange(1, 5) / 4).argmin()) + 1
        threshold = 1 / (1 + math.exp(4.0 * math.log(x)))
        assert exit_layers(logits.detach(), threshold).tolist() == [wanted]


@pytest.mark.parametrize("span", [1.0, 100.0])
def test_extreme_logits_stay_finite_with_gradient(span: float) -> None:
    trace = make_trace(3, 32)
    for size in (200.0, -200.0):
        logits = torch.full((3, 32), size, requires_grad=True)
        value = expected_risk(logits, trace, lam=0.1, span=span)
        value.backward()
        assert value.isfinite()
        assert logits.grad is not None
        assert logits.grad.isfinite().all()


def first_step_norms(offsets: tuple[float, ...], span: float = 1.0) -> list[float]:
    """Gradient norm of each gate at initialisation, L = 32, risks alike in all layers."""
    layers, hidden = 32, 8
    trace = make_trace(512, layers, features=2 * hidden)
    config = GateConfig(num_layers=layers, hidden_size=hidden, offsets=offsets)
    stack = GateStack.init(config, seed=0)
    expected_risk(stack(trace.features), trace, lam=0.1, span=span).backward()
    return [
        nn.utils.get_total_norm([p.grad for p in gate.parameters() if p.grad is not None]).item()
        for gate in stack.gates[:-1]
    ]


def test_deep_gates_do_not_starve() -> None:
    norms = first_step_norms(uniform_offsets(32))
    assert 0.1 < norms[0] / norms[30] < 10
    spanned = first_step_norms(uniform_offsets(32), span=100.0)
    assert 0.1 < spanned[0] / spanned[30] < 10
    # Without the offsets the deepest gate is reached with probability 2^-31: the test can fail.
    plain = first_step_norms((0.0,) * 32)
    assert plain[0] / plain[30] > 1e4


def test_gate_L_takes_no_part() -> None:
    trace = make_trace(4, 6)
    for loss in (
        lambda x: expected_risk(x, trace, lam=0.1),
        lambda x: reference_label(x, trace),
        lambda x: safe_label(x, trace, epsilon=0.5),
    ):
        logits = torch.randn(4, 6, requires_grad=True)
        loss(logits).backward()
        assert logits.grad[:, -1].abs().max() == 0
        assert logits.grad[:, :-1].abs().min() > 0


def test_reference_label_is_the_published_rule() -> None:
    """The label and the two-way cross-entropy, computed as the reference does from raw logits."""
    generator = torch.Generator().manual_seed(4)
    rows, answers, vocab, layers = 6, 5, 11, 3
    targets = torch.randint(1, vocab, (rows, answers), generator=generator)
    full = torch.randn(rows, answers, vocab, generator=generator)
    full.scatter_add_(2, targets[..., None], torch.full((rows, answers, 1), 3.0))
    exits = [full + 0.6 * scale * torch.randn(full.shape, generator=generator) for scale in (3, 1, 0.2)]

    def ce(logits: torch.Tensor, row: int) -> float:
        return float(cross_entropy(logits[row], targets[row]))

    columns = [exits[0], *exits]  # column 0 is not read
    agreement = torch.stack([(x.argmax(-1) == full.argmax(-1)).float().mean(1) for x in columns], 1)
    loss = torch.tensor([[ce(x, row) for x in columns] for row in range(rows)])
    loss[:, -1] = torch.tensor([ce(full, row) for row in range(rows)])
    trace = make_trace(rows, layers)
    trace = Trace(**{**trace.tensors(), "agreement": agreement, "loss": loss, "sample_ids": trace.sample_ids})

    two = torch.randn(rows, layers, 2, generator=generator)
    expected, labels = [], reference_labels(trace)
    for k in (1, 2):
        wanted = [
            int(float((exits[k - 1][row].argmax(-1) == full[row].argmax(-1)).float().mean()) > 0.99
                and ce(exits[k - 1], row) < 1.03 * ce(full, row))
            for row in range(rows)
        ]  # fmt: skip
        assert labels[:, k - 1].int().tolist() == wanted
        expected.append(float(cross_entropy(two[:, k - 1], torch.tensor(wanted))))
    assert 0 < labels[:, :2].float().mean() < 1
    logits = two[..., 1] - two[..., 0]
    assert float(reference_label(logits, trace)) == pytest.approx(sum(expected) / 2, rel=1e-5)
    assert float(reference_label(logits, trace, layer=2)) == pytest.approx(expected[1], rel=1e-5)
    assert float(reference_label(logits[:, 1], trace, layer=2)) == pytest.approx(expected[1], rel=1e-5)
    with pytest.raises(ValueError, match=r"1\.\.2"):
        reference_label(logits, trace, layer=3)


def test_reference_thresholds_are_strict() -> None:
    trace = make_trace(3, 2)
    agreement = torch.tensor([[0, 0.99, 1], [0, 1, 1], [0, 1, 1]])
    loss = torch.tensor([[0, 1.0, 1.0], [0, 1.03, 1.0], [0, 1.02, 1.0]])
    trace = Trace(**{**trace.tensors(), "agreement": agreement, "loss": loss, "sample_ids": trace.sample_ids})
    assert reference_labels(trace)[:, 0].tolist() == [False, False, True]


def test_one_layer_schedule_leaves_other_gates_without_gradient() -> None:
    trace = make_trace(5, 4, features=6)
    stack = GateStack.init(GateConfig(num_layers=4, hidden_size=3), seed=0)
    reference_label(stack.gate(2, trace.features[:, 1]), trace, layer=2).backward()
    for k, gate in enumerate(stack.gates, start=1):
        grads = [parameter.grad for parameter in gate.parameters()]
        assert all(grad is not None for grad in grads) if k == 2 else grads == [None] * len(grads)


def test_safe_labels_look_at_all_later_exits() -> None:
    trace = make_trace(2, 4)
    risk = torch.tensor([[9, 0.001, 0.5, 0.001, 0], [9, 0.5, 0.01, 0.009, 0]])
    trace = Trace(**{**trace.tensors(), "risk": risk, "sample_ids": trace.sample_ids})
    # Row 0: harmless at 1, but not at 2. Row 1: 0.01 is not below 0.01.
    assert safe_labels(trace, 0.01).tolist() == [[False, False, True, True], [False, False, True, True]]


def test_class_balance_makes_both_classes_count_alike() -> None:
    labels = torch.tensor([[1, 0, 1], [0, 0, 1], [0, 0, 1], [0, 1, 1]]).bool()
    balance = class_balance(labels)
    weights = torch.where(labels, balance[1], balance[0])
    for layer in (0, 1):
        on = labels[:, layer]
        assert weights[on, layer].sum() == pytest.approx(float(weights[~on, layer].sum()))
        assert weights[:, layer].mean() == pytest.approx(1.0)
    assert balance.isfinite().all()
    assert balance.max() == 10


def test_registry() -> None:
    assert [OBJECTIVES.get(name).name for name in OBJECTIVES] == list(OBJECTIVES)
    with pytest.raises(ConfigError, match="did you mean 'expected_risk'"):
        OBJECTIVES.get("expected")


def test_the_configured_loss_is_the_function_with_its_settings() -> None:
    trace = make_trace(9, 5)
    logits = torch.randn(9, 5, generator=torch.Generator().manual_seed(1))
    train = make_trace(40, 5, seed=8)
    balance = class_balance(safe_labels(train, 0.3))
    expected = {
        "expected_risk": (ExpectedRisk(lam=0.2, span=3.0), expected_risk(logits, trace, lam=0.2, span=3.0)),
        "reference_label": (ReferenceLabel(), reference_label(logits, trace)),
        "safe_label": (SafeLabel(epsilon=0.3), safe_label(logits, trace, epsilon=0.3, balance_2L=balance)),
    }
    assert sorted(expected) == list(OBJECTIVES)
    for name, (objective, loss) in expected.items():
        assert objective.name == name
        assert torch.equal(objective.prepared(train)(logits, trace), loss)
    alone = SafeLabel(epsilon=0.3, balance=False).prepared(train)(logits, trace)
    assert torch.equal(alone, safe_label(logits, trace, epsilon=0.3))
    assert not torch.equal(alone, expected["safe_label"][1])
