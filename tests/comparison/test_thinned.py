"""A question-only router learns from thinned traces, and chooses what they label."""

from __future__ import annotations

import pytest
import torch

from dyvte.comparison.schedule_router import KINDS, schedule_curve, train_schedule_routers
from dyvte.comparison.tuned_router import RouterSettings
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
