"""How a question-only router is tuned like the gates."""

from __future__ import annotations

import pytest

from dyvte.comparison.tuned_router import TrainingRecord, training_settings
from dyvte.errors import ConfigError
from dyvte.gates import GateConfig, GateStack
from dyvte.objectives import ExpectedRisk


def gates_with(**training) -> GateStack:
    return GateStack.init(GateConfig(num_layers=4, hidden_size=8, training=training), seed=0)


def test_a_router_is_trained_as_the_record_says():
    objective = {"name": "expected_risk", "lam": 0.3, "span": 40.0}
    found = training_settings(gates_with(objective=objective, epochs=3.0, seed=5), 100_000)
    assert (found.lam, found.span, found.epochs, found.seed) == (0.3, 40.0, 3, 5)
    # never so few steps that it has not learned
    assert training_settings(gates_with(objective=objective, epochs=3.0), 1000).epochs == 256


def test_a_range_that_is_not_recorded_is_the_range_that_training_uses():
    record = TrainingRecord.of(gates_with(objective={"name": "reference_label"}).config)
    assert record.span == ExpectedRisk().span == 100.0
    assert training_settings(gates_with(), 1000, lam=0.2).span == 100.0
    # a range of 1 that IS recorded stays
    assert training_settings(gates_with(objective={"lam": 0.1, "span": 1.0}), 1000).span == 1.0


def test_settings_of_the_same_name_elsewhere_in_the_record_are_others():
    gates = gates_with(
        objective={"lam": 0.1}, data={"epochs": 99, "seed": 99, "lam": 99.0}, trace={"span": 99.0}
    )
    record = TrainingRecord.of(gates.config)
    assert (record.lam, record.span, record.epochs, record.seed) == (0.1, 100.0, 1.0, 0)


def test_without_a_price_none_is_made_up():
    with pytest.raises(ConfigError, match="does not record the lam"):
        training_settings(gates_with(data={"lam": 0.1}), 1000)
