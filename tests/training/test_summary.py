"""``summary.json``: typed in memory, flat on disk, refused by name where it is not what is written today."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from dyvte.config import load_config
from dyvte.errors import DataError
from dyvte.training import TrainConfig
from dyvte.training.lora.metrics import ExitRow
from dyvte.training.lora.train import LoraRecord, LoraSummary
from dyvte.training.metrics import BudgetRow
from dyvte.training.summary import SUMMARY_FILE, read_summary, write_summary
from dyvte.training.train import GateRecord, GateSummary

SHARED = {
    "epochs": 2,
    "steps": 4,
    "global_batch": 8,
    "num_samples": 30,
    "seed": 1,
    "optimizer": {"name": "adam"},
}
FARED = {"judged_on": "held-out samples", "num_judged": 6, "parameters": 99, "train_seconds": 1.5}
GATES = GateSummary(
    gates="run/gates",
    budgets=(
        BudgetRow(
            budget=0.5,
            threshold=0.3,
            visual_compute=0.4,
            risk=0.1,
            same_answer=0.9,
            fixed_risk=0.2,
            fixed_same_answer=0.8,
        ),
    ),
    exit_rate=(0.0, 0.25, 0.75),
    dropped=("data.json: sample 's2': image: truncated",),
    trace_seconds=3.0,
    record=GateRecord(
        objective={"name": "expected_risk", "lam": 0.2},
        init_from=None,
        data={"sha256": "abc", "chosen": 30},
        trace={"backbone": "f"},
        reductions="none",
        trace_notes={"ties": 0},
        **SHARED,
    ),
    **FARED,
)
ADAPTER = LoraSummary(
    adapter="run/adapter",
    exits=(
        ExitRow(exit_layer=0, same_answer_before=0.1, same_answer_after=0.6, risk_before=2.0, risk_after=0.3),
    ),
    dropped=(),
    notes={},
    answer_seconds=2.0,
    record=LoraRecord(
        base={"id": "tiny"},
        data={"file": "data.json"},
        lora={"rank": 4},
        exits_trained=(1, 2),
        layers_adapted=(2, 4),
        dyvte_version="0",
        **SHARED,
    ),
    **FARED,
)


@pytest.fixture
def cfg(tmp_path: Path) -> TrainConfig:
    words = ["model.path=nowhere", "data.path=nothing.json", f"output_dir={tmp_path}"]
    return load_config(TrainConfig, None, words)


@pytest.mark.parametrize("summary", [GATES, ADAPTER], ids=["gates", "adapter"])
def test_what_is_written_is_read_back(cfg: TrainConfig, summary) -> None:
    assert read_summary(cfg, type(summary)) is None
    write_summary(cfg, summary)
    assert read_summary(cfg, type(summary)) == summary
    stored = json.loads((cfg.output_dir / SUMMARY_FILE).read_text())
    assert stored["steps"] == 4  # beside the others, as scripts have read it since there are summaries
    assert "record" not in stored


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda values: values.pop("budgets"), "no 'budgets'"),
        (lambda values: values["budgets"][0].pop("fixed_risk"), "budgets: no 'fixed_risk'"),
        (lambda values: values.pop("trace"), "no 'trace'"),
    ],
)
def test_what_another_version_wrote_is_refused_by_name(cfg: TrainConfig, change, message: str) -> None:
    values = GATES.to_dict()
    values = json.loads(json.dumps(values))
    change(values)
    (cfg.output_dir / SUMMARY_FILE).write_text(json.dumps(values))
    with pytest.raises(DataError, match=rf"summary\.json.*{message}.*Choose another output_dir"):
        read_summary(cfg, GateSummary)


@pytest.mark.parametrize("text", ["", "[1, 2", "[]", "null"])
def test_a_damaged_summary_is_named(cfg: TrainConfig, text: str) -> None:
    (cfg.output_dir / SUMMARY_FILE).write_text(text)
    with pytest.raises(DataError, match=r"summary\.json"):
        read_summary(cfg, GateSummary)


def test_further_entries_of_a_later_version_are_passed_over(cfg: TrainConfig) -> None:
    (cfg.output_dir / SUMMARY_FILE).write_text(json.dumps({**GATES.to_dict(), "later": 1}))
    assert read_summary(cfg, GateSummary) == replace(GATES)
