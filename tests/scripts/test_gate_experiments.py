"""The arithmetic of the experiments on what gates read: changes between layers, wider features."""

from __future__ import annotations

import importlib
import sys

import pytest
import torch

pytest.importorskip("deepspeed")

from tests.conftest import ROOT
from tests.helpers.traces import make_trace

LAYERS, FREEZES = 5, (0, 2)


@pytest.fixture(scope="module")
def experiments():
    sys.path.insert(0, str(ROOT / "experiments"))
    try:
        return {name: importlib.import_module(name) for name in ("settled", "widths")}
    finally:
        sys.path.remove(str(ROOT / "experiments"))


def test_a_change_is_that_of_a_streams_own_layers(experiments) -> None:
    trace = make_trace(6, LAYERS, seed=1, freezes=FREEZES)
    size = trace.features.shape[-1]
    wide = experiments["settled"].with_parts(trace, [experiments["settled"].change(1)])
    half = size // 2
    assert torch.equal(wide.features[..., :size], trace.features)
    states = torch.cat((trace.grid.embeddings[:, None], trace.features), 1)[..., half:]
    torch.testing.assert_close(wide.features[..., size:], states[:, 1:] - states[:, :-1])
    for column, (f, layer) in enumerate(trace.grid.stream_layers):
        now = trace.grid.features[:, column, half:]
        before = states[:, f] if layer == f + 1 else trace.grid.features[:, column - 1, half:]
        torch.testing.assert_close(wide.grid.features[:, column, size:], now - before)
    assert not wide.grid.embeddings[:, size:].any()


def test_bumps_tell_numbers_apart_and_are_weights(experiments) -> None:
    values = torch.linspace(0, 1, 21)
    weights = experiments["settled"].bumps(values)
    torch.testing.assert_close(weights.sum(1), torch.ones(21))
    mean = (weights * torch.linspace(0, 1, weights.shape[1])).sum(1)
    assert bool((mean.diff() > 0).all())


def test_wider_features_hold_the_same(experiments) -> None:
    trace = make_trace(6, LAYERS, seed=2, freezes=FREEZES)
    size = trace.features.shape[-1] // 2
    wide = experiments["widths"].widened(trace, experiments["widths"].isometry(size, 4 * size))
    assert wide.features.shape[-1] == 8 * size
    for old, new in ((trace.features, wide.features), (trace.grid.features, wide.grid.features)):
        first_old, first_new = old[..., :size].flatten(0, 1), new[..., : 4 * size].flatten(0, 1)
        # scaled so that the mean square of a part stays what it was
        torch.testing.assert_close(first_new @ first_new.T / 4, first_old @ first_old.T, rtol=1e-4, atol=1e-4)
    assert torch.equal(wide.risk, trace.risk)
