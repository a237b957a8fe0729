"""scores.json: written, read back, and refused by name where it is not what this version writes."""

from __future__ import annotations

import json

import pytest

from dyvte.costs.prefill import CONVENTIONS, PrefillCost
from dyvte.errors import DataError
from dyvte.evaluation.scores import (
    SCORES_FILE,
    CostMetrics,
    GenerationTimes,
    Machine,
    RunIdentity,
    RunScores,
    Timing,
)

TIMES = {
    "time_to_first_token_ms": 4.0,
    "first_token_ratio": 0.5,
    "time_per_token_ms": None,
    "per_token_ratio": None,
}
MACHINE = {"processor": "x86_64", "cores": 2, "torch_threads": 2, "gpu": None}
PREFILL = {name: {"tflops": 0.25, "tflops_full": 0.5, "ratio": 0.5} for name in CONVENTIONS}
COST = {
    "num_layers": 4, "mean_exit_layer": 2.5, "exit_layer_counts": {"-1": 1, "2": 3, "3": 3},
    "visual_compute": 0.625, "visual_token_layers_per_question": 40.0, "prefill": PREFILL,
    "score_row_flops_per_question": 0.0, "vision_tower_flops_per_image": None,
    "output_head_flops_per_token": 4096, "kv_bytes_per_question": 512.0, "mean_visual_tokens": 16.0,
    "mean_text_tokens": 9.0, "mean_new_tokens": 2.0,
}  # fmt: skip
# As `dyvte eval` has written it since its format 2.
WRITTEN = {
    "scores": {"benchmark": "gqa", "accuracy": 50.0},
    "headline": "50.0",
    **COST,
    "same_answer_as_never": 0.75,
    "timing": {
        **TIMES, "plain": TIMES, "batches": 1, "batch_size": 8, "new_tokens": 2, "repeats": 3,
        "machine": MACHINE,
    },
    "run": {
        "policy": "gates", "reduction": "none", "gates_sha256": "ab", "threshold": 0.4, "format": 2,
        "name": "gates-x", "backbone": "folder",
    },
    "config": {"seed": 3},
}  # fmt: skip


def test_what_earlier_versions_wrote_is_read_and_written_alike(tmp_path):
    (tmp_path / SCORES_FILE).write_text(json.dumps(WRITTEN))
    found = RunScores.read(tmp_path)
    assert found == RunScores(
        scores={"benchmark": "gqa", "accuracy": 50.0},
        headline="50.0",
        cost=CostMetrics(
            **{
                **COST,
                "exit_layer_counts": {-1: 1, 2: 3, 3: 3},
                "prefill": {name: PrefillCost(0.25, 0.5, 0.5) for name in CONVENTIONS},
            }
        ),
        same_answer_as_never=0.75,
        timing=Timing(
            times=GenerationTimes(**TIMES),
            plain=GenerationTimes(**TIMES),
            batches=1,
            batch_size=8,
            new_tokens=2,
            repeats=3,
            machine=Machine(**MACHINE),
        ),
        run=RunIdentity(
            {k: v for k, v in WRITTEN["run"].items() if k not in ("name", "backbone")}, "gates-x", "folder"
        ),
        config={"seed": 3},
    )
    assert (found.run.policy, found.run.threshold, found.run.is_full_model) == ("gates", 0.4, False)
    found.write(tmp_path / "again")
    assert json.loads((tmp_path / "again" / SCORES_FILE).read_text()) == WRITTEN


def test_runs_that_were_not_timed_and_entries_of_later_versions():
    found = RunScores.from_dict({**WRITTEN, "timing": None, "freeze_layers": [1]})
    assert found.timing is None
    assert found.to_dict() == {**WRITTEN, "timing": None}


@pytest.mark.parametrize(
    ("keys", "named"),
    [
        (("headline",), "no 'headline'"),
        (("visual_compute",), "no 'visual_compute'"),
        (("run", "policy"), "run: no 'policy'"),
        (("prefill", "vtw", "ratio"), "prefill, vtw: no 'ratio'"),
        (("timing", "machine", "gpu"), "timing, machine: no 'gpu'"),
    ],
)
def test_what_is_missing_is_named(tmp_path, keys, named):
    values = json.loads(json.dumps(WRITTEN))
    node = values
    for key in keys[:-1]:
        node = node[key]
    del node[keys[-1]]
    (tmp_path / SCORES_FILE).write_text(json.dumps(values))
    with pytest.raises(DataError, match=rf"{SCORES_FILE}.*{named}.*--overwrite"):
        RunScores.read(tmp_path)


@pytest.mark.parametrize("content", ["", "[1]", "{", '{"run": 3}', json.dumps({**WRITTEN, "prefill": [1]})])
def test_damaged_files_are_refused(tmp_path, content):
    (tmp_path / SCORES_FILE).write_text(content)
    with pytest.raises(DataError, match=SCORES_FILE):
        RunScores.read(tmp_path)
    with pytest.raises(DataError, match="cannot read"):
        RunScores.read(tmp_path / "nowhere")
