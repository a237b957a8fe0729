"""Question-only routers of schedules: trained together as alone, and never smaller than the gates."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from dyvte.calibration.path import Labels, at_pairs
from dyvte.comparison.question_features import BagOfWords
from dyvte.comparison.router_training import RouterSettings
from dyvte.comparison.scenes import TracedScenes
from dyvte.comparison.schedule_router import KINDS, ScheduleRouter, train_schedule_routers
from dyvte.comparison.tuned_router import (
    ROUTER_LEARNING_RATES,
    best_router,
    train_router_candidates,
    training_settings,
)
from dyvte.errors import DataError
from dyvte.gates import GateConfig, GateStack
from dyvte.gates.architectures import ARCHITECTURES
from dyvte.objectives import answer_loss, expected_risk
from dyvte.teacher.trace import Trace
from tests.helpers.traces import make_trace

LAYERS, FREEZES, LOSS = 5, (0, 1, 3), "same_answer+risk:1"
WORDS = ("what", "how", "many", "red", "blue", "is", "it")


def wordings(count: int, seed: int) -> list[str]:
    """Questions of which many are asked more than once."""
    rng = np.random.default_rng(seed)
    return [" ".join(rng.choice(WORDS, 2)) for _ in range(count)]


def alone(
    features: torch.Tensor, trace: Trace, kind: str, settings: RouterSettings, width: int
) -> ScheduleRouter:
    """One router by itself: its own forward, every sample of a batch, labels taken from the trace anew."""
    torch.manual_seed(settings.seed)
    scale = features.std(0, correction=0)
    scale = torch.where(scale > 1e-6, scale, torch.ones_like(scale))
    router = ScheduleRouter(kind, features.mean(0), scale, trace, settings.min_parameters)
    assert router.layers[0].out_features == width
    optimizer = torch.optim.AdamW(router.parameters(), lr=settings.learning_rate, weight_decay=0.01)
    count = len(features)
    batches = [
        rows for _ in range(settings.epochs) for rows in torch.randperm(count).split(settings.batch_size)
    ]
    for step, rows in enumerate(batches):
        outputs, part = router(features[rows]), trace.rows(rows)
        if kind == "heads":
            prices = {"lam": settings.lam, "span": settings.span, "memory_price": settings.memory_price}
            loss = expected_risk(router.heads(outputs), part, loss=settings.loss, **prices)
        else:
            wanted = at_pairs(Labels(answer_loss(part, settings.loss), FREEZES), router.pairs).float()
            bounded = settings.loss != "risk"
            loss = (F.binary_cross_entropy_with_logits if bounded else F.mse_loss)(outputs, wanted)
        for group in optimizer.param_groups:
            group["lr"] = settings.learning_rate * (1 + np.cos(np.pi * step / len(batches))) / 2
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return router


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("loss", [LOSS, "risk"])
def test_routers_of_schedules_trained_together_are_those_trained_alone(kind, loss):
    trace, questions = make_trace(96, LAYERS, seed=3, freezes=FREEZES), wordings(96, seed=4)
    features, steps = BagOfWords.fit(questions)(questions), []
    first = RouterSettings(lam=0.1, span=20.0, epochs=4, batch_size=32, seed=5, loss=loss, memory_price=0.02)
    tried = [dataclasses.replace(first, learning_rate=rate) for rate in (1e-3, 1e-2)]
    together = train_schedule_routers(features, trace, kind, tried, steps.append)
    assert sum(steps) == 12
    for settings, router in zip(tried, together, strict=True):
        one = alone(features, trace, kind, settings, width=32)
        torch.testing.assert_close(router(features), one(features), rtol=1e-3, atol=1e-4)
    assert not torch.allclose(together[0](features), together[1](features), atol=1e-2)


def test_the_chosen_candidate_is_that_of_routers_trained_alone():
    train, calibration = (
        TracedScenes(
            make_trace(128, LAYERS, seed=seed, freezes=FREEZES), tuple(wordings(128, seed)), ("i",) * 128
        )
        for seed in (6, 7)
    )
    bag = BagOfWords.fit(train.questions)
    settings = RouterSettings(lam=0.2, span=20.0, epochs=8, batch_size=32, loss=LOSS, min_parameters=900)
    (found,) = train_router_candidates({"bag": bag}, train, calibration, [settings], freezes=True)
    assert [one.kind for one in found] == [f"bag, {kind}" for kind in KINDS for _ in ROUTER_LEARNING_RATES]
    features, asked = bag(train.questions), bag(calibration.questions)
    for one in found:
        kind, width = one.kind.removeprefix("bag, "), one.router.layers[0].out_features
        by_itself = alone(features, train.trace, kind, one.settings, width)
        torch.testing.assert_close(one.router(asked), by_itself(asked), rtol=1e-3, atol=1e-3)
    losses = [one.calibration_loss(0.4) for one in found]
    assert best_router(found, 0.4) is found[losses.index(min(losses))]


@pytest.mark.parametrize("name", sorted(ARCHITECTURES.names()))
@pytest.mark.parametrize("freezes", [False, True])
def test_no_candidate_is_smaller_than_the_gates(name, freezes):
    """Of every kind, on few features (words) as on many (states)."""
    config = GateConfig(
        num_layers=LAYERS,
        hidden_size=48,
        architecture=name,
        gate_hidden_size=24,
        freeze_head=freezes,
        training={"objective": {"lam": 0.1}, "epochs": 1.0},
    )
    gates = GateStack.init(config)
    questions = wordings(20, seed=1)
    scenes = TracedScenes(make_trace(20, LAYERS, freezes=FREEZES), tuple(questions), ("i",) * 20)
    states = torch.randn(len(WORDS) ** 2, 300, generator=torch.Generator().manual_seed(2))
    known = {f"{a} {b}": states[i * len(WORDS) + j] for i, a in enumerate(WORDS) for j, b in enumerate(WORDS)}
    features = {
        "bag of words": BagOfWords.fit(questions),
        "text states": lambda asked: torch.stack([known[question] for question in asked]),
    }
    settings = dataclasses.replace(training_settings(gates, 20), epochs=1)
    (found,) = train_router_candidates(features, scenes, scenes, [settings], freezes=freezes)
    assert len(found) == 8
    for one in found:
        assert one.router.num_parameters >= gates.num_deciding_parameters, one.kind
        assert one.router.num_parameters == sum(p.numel() for p in one.router.parameters())


def test_settings_that_do_not_go_together_are_refused():
    trace, features = make_trace(6, LAYERS, freezes=FREEZES), torch.randn(6, 3)
    tried = [RouterSettings(lam=0.1), RouterSettings(lam=0.2)]
    with pytest.raises(DataError, match="the same prices and loss"):
        train_schedule_routers(features, trace, "heads", tried)
    with pytest.raises(DataError, match="same seed"):
        train_schedule_routers(features, trace, "table", [tried[0], RouterSettings(lam=0.1, seed=1)])
    with pytest.raises(DataError, match=r"5 questions, 6 traced samples"):
        train_schedule_routers(features[:5], trace, "table", tried[:1])
