"""Rules are compared on thinned traces too: what these do not label is no choice for anybody."""

from __future__ import annotations

import dataclasses
import math
from types import SimpleNamespace

import pytest
import torch

from dyvte.comparison.compare import make_pairs
from dyvte.comparison.question_features import BagOfWords
from dyvte.comparison.schedule_router import KINDS, schedule_curve, train_schedule_routers
from dyvte.comparison.traces import compare_on_traces
from dyvte.comparison.tuned_router import RouterSettings
from dyvte.errors import DataError
from dyvte.gates import uniform_offsets
from tests.comparison import test_schedules as whole
from tests.helpers.traces import make_trace

LAYERS, FREEZES, EXITS = 6, (0, 2), (1, 4, 6)


@pytest.mark.parametrize("kind", KINDS)
def test_routers_of_schedules_choose_what_is_labelled(kind):
    trace = make_trace(40, LAYERS, seed=1, freezes=FREEZES).thinned(exits=EXITS)
    features = torch.randn(40, 5, generator=torch.Generator().manual_seed(2))
    settings = RouterSettings(lam=0.1, span=10.0, epochs=30)
    (router,) = train_schedule_routers(features, trace, kind, [settings])
    points = schedule_curve(router, features, trace, settings.loss)(features, trace.num_visual)
    assert len(points.settings_S) > 2
    assert set(points.exits_SB.unique().tolist()) <= set(EXITS)
    frozen = points.freezes_SB[points.freezes_SB < points.exits_SB].unique().tolist()
    assert set(frozen) <= set(FREEZES)
    assert all(torch.isfinite(parameter).all() for parameter in router.parameters())


def test_a_comparison_of_thinned_traces_has_numbers_everywhere(tmp_path, monkeypatch):
    words = SimpleNamespace(of=lambda pipeline: BagOfWords.fit(["update 0 1 3 times and read 2 4 times"]))
    monkeypatch.setattr("dyvte.comparison.question_features.TextStates", words)
    monkeypatch.setattr("dyvte.comparison.tuned_router.ROUTER_MIN_STEPS", 20)
    exits = (1, 4, whole.LAYERS)
    scenes = [whole.planted(60, seed, True) for seed in (1, 2, 3)]
    train, calibration, test = (
        dataclasses.replace(one, trace=one.trace.thinned(exits=exits)) for one in scenes
    )
    gates = whole.trained(train)
    gates.config = dataclasses.replace(gates.config, offsets=uniform_offsets(whole.LAYERS, exits))
    gates.save_pretrained(tmp_path / "both")
    settings = SimpleNamespace(gates=(str(tmp_path / "both"),), lam=None)
    pairs = make_pairs(settings, None, train, calibration)
    found = compare_on_traces(calibration, test, pairs, num_draws=50)
    curves = found.curves
    for curve in (curves.fixed, curves.static, curves.oracle, curves.schedule_oracle, *curves.gates.values()):
        assert all(math.isfinite(value) for values in curve.metrics.values() for value in values)
    assert curves.fixed.settings == (1.0, 4.0, float(whole.LAYERS))
    one_head = {"freeze_head": False, "freeze_offsets": (), "freeze_threshold": 0.5}
    type(gates).init(dataclasses.replace(gates.config, **one_head)).save_pretrained(tmp_path / "exits")
    with pytest.raises(DataError, match="a question-only router of exits alone can leave after layers"):
        make_pairs(SimpleNamespace(gates=(str(tmp_path / "exits"),), lam=None), None, train, calibration)
