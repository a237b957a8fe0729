"""Baselines against brute force and against tasks whose answer is known."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

from dyvte.comparison.question_features import BagOfWords
from dyvte.comparison.router import (
    QuestionRouter,
    router_exits,
    router_points,
    router_threshold,
    train_router,
    train_routers,
)
from dyvte.comparison.router_training import RouterSettings, router_steps
from dyvte.costs.visual import visual_compute
from dyvte.errors import DataError
from dyvte.gates import exit_layers
from dyvte.objectives import expected_risk
from dyvte.teacher.trace import Trace

LAYERS = 6


def test_bag_of_words():
    bag = BagOfWords.fit(["Is it red?", "it is it"])
    assert bag.words == ("?", "is", "it", "red")
    assert bag(["it it blue is"]).tolist() == [[0, 1, 2, 0, 1]]


@pytest.mark.parametrize("threshold", [0.0, 0.05, 0.3, 0.55, 0.999, 1.0])
def test_router_rule_equals_enumeration(threshold):
    log_p = torch.randn(40, LAYERS, generator=torch.Generator().manual_seed(3)).log_softmax(-1)
    expected = []
    for row in log_p.double().exp().tolist():
        sums = itertools.accumulate(row[:-1])
        expected.append(next((k for k, s in enumerate(sums, start=1) if s >= threshold), LAYERS))
    if threshold == 1.0:
        expected = [LAYERS] * 40
    assert router_exits(_cumulative(log_p), threshold).tolist() == expected


@pytest.mark.parametrize("threshold", [0.05, 0.3, 0.55, 0.9])
def test_layerwise_router_leaves_by_the_rule_of_gates(threshold):
    router = QuestionRouter(torch.zeros(4), torch.ones(4), LAYERS, 16, layerwise=True)
    features = 3 * torch.randn(50, 4, generator=torch.Generator().manual_seed(8))
    with torch.no_grad():
        expected = exit_layers(router(features), threshold)
    assert router_exits(router.readiness(features), threshold).tolist() == expected.tolist()


def test_router_threshold_is_the_largest_that_meets_the_budget():
    log_p = _cumulative(torch.randn(30, LAYERS, generator=torch.Generator().manual_seed(4)).log_softmax(-1))
    visual = torch.randint(4, 60, (30,), generator=torch.Generator().manual_seed(5))
    for budget in (0.3, 0.5, 0.77):
        threshold = router_threshold(log_p, visual, budget)
        assert visual_compute(router_exits(log_p, threshold), visual, LAYERS) <= budget
        spent = [
            visual_compute(router_exits(log_p, t), visual, LAYERS)
            for t in np.linspace(threshold, 1, 4000)[1:]
            if not torch.equal(router_exits(log_p, t), router_exits(log_p, threshold))
        ]
        assert min(spent) > budget
    assert router_threshold(log_p, visual, 1.0) == 1.0


def _cumulative(log_p: torch.Tensor) -> torch.Tensor:
    return log_p.double().exp().cumsum(1)


def _trace(risk: torch.Tensor) -> Trace:
    other = torch.zeros_like(risk)
    return Trace(
        risk=risk,
        reverse_risk=other,
        agreement=other,
        same_answer=other,
        loss=other,
        features=torch.zeros(len(risk), risk.shape[1] - 1, 2),
        sample_ids=tuple(map(str, range(len(risk)))),
        num_visual=torch.ones(len(risk), dtype=torch.long),
    )


def _needed_depth(depths: torch.Tensor) -> torch.Tensor:
    """Risk 1 before the needed depth, 0 from it on."""
    return (torch.arange(LAYERS + 1) < depths[:, None]).float()


@pytest.mark.parametrize("span", [1.0, 30.0])
def test_router_learns_depth_that_follows_from_the_wording(span):
    depth_of = {"what colour": 2, "how many": 3, "which digit": 5}
    questions = list(depth_of) * 100
    risk = _needed_depth(torch.tensor([depth_of[q] for q in questions]))
    bag = BagOfWords.fit(questions)
    router = train_router(bag(questions), _trace(risk), RouterSettings(lam=0.5, span=span, epochs=100))
    exits = router_exits(router.readiness(bag(list(depth_of))), 0.5)
    assert exits.tolist() == [2, 3, 5]


@pytest.mark.parametrize("span", [1.0, 30.0])
def test_router_cannot_learn_depth_that_the_image_decides(span):
    rng = torch.Generator().manual_seed(6)
    risk = _needed_depth(torch.randint(1, LAYERS, (400,), generator=rng))
    questions = ["follow the arrow"] * 400
    bag = BagOfWords.fit(questions)
    router = train_router(bag(questions), _trace(risk), RouterSettings(lam=0.5, span=span, epochs=100))
    readiness = router.readiness(bag(questions))
    points = router_points("router", readiness, torch.ones(400), [0.1, 0.5, 0.9])
    assert all(len(exits_B.unique()) == 1 for exits_B in points.exits_SB)


def test_router_size_and_determinism():
    features, risk = torch.randn(64, 10), torch.rand(64, LAYERS + 1)
    settings = RouterSettings(lam=0.1, epochs=2, min_parameters=5000, seed=3)
    state = torch.get_rng_state()
    one, two = (train_router(features, _trace(risk), settings) for _ in range(2))
    assert torch.equal(torch.get_rng_state(), state)
    assert sum(p.numel() for p in one.parameters()) >= 5000
    assert torch.equal(one(features), two(features))


def test_routers_trained_together_are_those_trained_alone():
    rng = torch.Generator().manual_seed(12)
    features, risk = torch.randn(96, 7, generator=rng), torch.rand(96, LAYERS + 1, generator=rng)
    tried = [
        RouterSettings(lam=0.1, span=span, epochs=3, batch_size=32, learning_rate=rate, seed=5)
        for span in (1.0, 50.0)
        for rate in (1e-3, 1e-2)
    ]
    steps = []
    together = train_routers(features, _trace(risk), tried, steps.append)
    for settings, router in zip(tried, together, strict=True):
        alone = _plain_training(features, _trace(risk), settings)
        torch.testing.assert_close(router(features), alone(features), rtol=1e-3, atol=1e-4)
    assert sum(steps) == router_steps(96, tried[0]) == 9
    assert not torch.allclose(together[0](features), together[1](features), atol=1e-2)
    with pytest.raises(DataError, match="same seed"):
        train_routers(features, _trace(risk), [tried[0], RouterSettings(lam=0.1, seed=6)])


def _plain_training(features, trace, settings):
    """One router by itself, by its own forward."""
    torch.manual_seed(settings.seed)
    scale = features.std(0, correction=0)
    router = QuestionRouter(features.mean(0), scale, LAYERS, 32, layerwise=settings.span > 1)
    optimizer = torch.optim.AdamW(router.parameters(), lr=settings.learning_rate, weight_decay=0.01)
    batches = [rows for _ in range(settings.epochs) for rows in torch.randperm(96).split(32)]
    for step, rows in enumerate(batches):
        logits, part = router(features[rows]), trace.rows(rows)
        if settings.span > 1:
            loss = expected_risk(logits, part, lam=settings.lam, span=settings.span)
        else:
            price = settings.lam * torch.arange(1, LAYERS + 1) / LAYERS
            loss = (logits.softmax(-1) * (part.risk[:, 1:] + price)).sum(1).mean()
        for group in optimizer.param_groups:
            group["lr"] = settings.learning_rate * (1 + np.cos(np.pi * step / len(batches))) / 2
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return router


def test_errors():
    with pytest.raises(DataError, match="3 questions but 2"):
        train_router(torch.ones(3, 2), _trace(torch.ones(2, 4)), RouterSettings(lam=0.1))
