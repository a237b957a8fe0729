"""The path of thresholds: what several searches along it share."""

from __future__ import annotations

import torch

from dyvte.calibration.compute import threshold_for_budget
from dyvte.calibration.path import ThresholdPath
from dyvte.gates import HeadLogits


def test_levels_that_several_budgets_meet_are_decided_once(monkeypatch) -> None:
    generator = torch.Generator().manual_seed(0)
    exit_BGL = torch.randn(200, 3, 6, generator=generator)
    logits = HeadLogits(exit_BGL, torch.randn(200, 6, generator=generator), (0, 2)).closed_elsewhere()
    path = ThresholdPath(logits, torch.full((200,), 9), kv_share=0.2)
    budgets = (0.3, 0.45, 0.6, 0.75)
    alone = [threshold_for_budget(ThresholdPath(logits, path.num_visual_B, kv_share=0.2), b) for b in budgets]
    asked = []
    at = ThresholdPath.at
    monkeypatch.setattr(ThresholdPath, "at", lambda self, level: asked.append(level) or at(self, level))
    assert [threshold_for_budget(path, budget) for budget in budgets] == alone
    assert len(asked) == len(set(asked)) > 0
    some = path.rows(torch.arange(20))  # other samples: nothing is remembered of these
    assert some.spent(0.0) == (some.compute(some.at(0.0)), some.memory(some.at(0.0)))
