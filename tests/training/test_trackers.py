"""What trackers wrote, read back from their own files, against the JSONL log of the same run."""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path

import pytest

from dyvte.training.trackers import open_trackers
from tests.helpers.tracked import tensorboard_run, wandb_run
from tests.training.test_training import make_config, make_trace, processes, run  # noqa: F401

SERIES = {
    "loss", "learning_rate", "samples_per_second", "validation/risk", "validation/agreement",
    "validation/same_answer", "validation/visual_compute", "validation/exit_rate",
}  # fmt: skip
CONFIG = {"model": {"path": "m"}, "epochs": 4.0}


def jsonl(folder: Path) -> dict[int, dict]:
    """Figures by step, lists as one entry each."""
    lines = [json.loads(line) for line in (folder / "train_log.jsonl").read_text().splitlines()]
    by_step: dict[int, dict] = {}
    for line in lines:
        by_step.setdefault(line.pop("step"), {}).update(line)
    return by_step


def flat(metrics: dict) -> dict[str, float]:
    out = {}
    for name, value in metrics.items():
        pairs = [(f"{name}/{k:02d}", v) for k, v in enumerate(value)] if isinstance(value, list) else None
        out.update(pairs or [(name, value)])
    return out


def opened(folder: Path, names: list[str], resume_step: int = 0):
    return open_trackers(names, folder, project="p", run_name="r", config=CONFIG, resume_step=resume_step)


@pytest.fixture(scope="module")
def logged(tmp_path_factory, processes) -> Path:  # noqa: F811
    """A whole training, told to all trackers."""
    folder = tmp_path_factory.mktemp("logged")
    cfg = make_config(folder, tracking={"log_every": 2})
    _, metrics = run(cfg, processes, make_trace(), validation=make_trace(20, seed=1))
    trackers = opened(folder, ["wandb", "tensorboard"])
    for step, found in metrics:
        for tracker in trackers:
            tracker.write(step, found)
    for tracker in trackers:
        tracker.close()
    return folder


def test_the_log_holds_every_series(logged: Path) -> None:
    steps = jsonl(logged)
    assert set(steps) == set(range(2, 21, 2)) | {5, 10, 15}
    assert set().union(*steps.values()) >= SERIES
    assert (logged / "exit_histogram.png").read_bytes().startswith(b"\x89PNG")


def test_tensorboard_holds_the_same_metrics_and_a_plot(logged: Path) -> None:
    from PIL import Image

    scalars, events = tensorboard_run(logged / "tensorboard")
    expected = jsonl(logged)
    assert set(scalars) == set(expected)
    for step, metrics in expected.items():
        assert scalars[step] == pytest.approx(flat(metrics), rel=1e-6, abs=1e-6)
    (image,) = events.Images("validation/exit_rate")
    assert image.step == 20
    plot = Image.open(io.BytesIO(image.encoded_image_string))
    assert len(plot.getcolors(10**6)) > 2  # not blank
    assert b"epochs: 4.0" in events.Tensors("config/text_summary")[0].tensor_proto.string_val[0]


def test_wandb_offline_holds_the_same_metrics_the_config_and_a_plot(logged: Path) -> None:
    (file,) = (logged / "wandb").glob("offline-run-*/*.wandb")
    config, history = wandb_run(file)
    assert {name: config[name] for name in CONFIG} == CONFIG
    expected = jsonl(logged)
    assert set(history) == set(expected)
    for step, metrics in expected.items():
        wanted = flat(metrics)
        assert {name: history[step][name] for name in wanted} == pytest.approx(wanted)
    assert history[20]["validation/exit_rate/_type"] == "histogram"
    assert history[20]["validation/exit_rate/values"] == pytest.approx(expected[20]["validation/exit_rate"])
    plot = file.parent / "files" / history[20]["validation/exit_rate_plot/path"]
    assert plot.read_bytes().startswith(b"\x89PNG")


def test_a_resumed_run_goes_on_in_every_tracker(tmp_path: Path) -> None:
    first = opened(tmp_path, ["wandb", "tensorboard"])
    for step in range(1, 6):  # killed after step 5; the last checkpoint is of step 3
        for tracker in first:
            tracker.write(step, {"loss": float(step)})
    for tracker in first:
        tracker.close()
    second = opened(tmp_path, ["wandb", "tensorboard"], resume_step=3)
    for step in range(4, 8):
        for tracker in second:
            tracker.write(step, {"loss": 10.0 * step})
    for tracker in second:
        tracker.close()
    expected = {1: 1.0, 2: 2.0, 3: 3.0, 4: 40.0, 5: 50.0, 6: 60.0, 7: 70.0}
    assert {step: metrics["loss"] for step, metrics in jsonl(tmp_path).items()} == expected
    scalars, _ = tensorboard_run(tmp_path / "tensorboard")
    assert {step: metrics["loss"] for step, metrics in scalars.items()} == expected
    files = list((tmp_path / "wandb").glob("offline-run-*/*.wandb"))
    assert len({file.name for file in files}) == 1  # one run id
    assert (tmp_path / "wandb_run_id").read_text() in files[0].name


@pytest.mark.parametrize("name", ["wandb", "tensorboard"])
def test_trackers_that_are_not_installed_are_left_out(tmp_path: Path, monkeypatch, caplog, name: str) -> None:
    monkeypatch.setitem(sys.modules, {"wandb": "wandb", "tensorboard": "torch.utils.tensorboard"}[name], None)
    trackers = opened(tmp_path, [name])
    for tracker in trackers:
        tracker.write(1, {"loss": 1.0})
        tracker.close()
    assert name in caplog.text
    assert json.loads((tmp_path / "train_log.jsonl").read_text()) == {"step": 1, "loss": 1.0}
    assert not (tmp_path / "tensorboard").exists()
    assert not (tmp_path / "wandb").exists()


def test_without_matplotlib_the_metrics_are_kept_and_the_plot_is_named(
    tmp_path: Path, monkeypatch, caplog
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    trackers = opened(tmp_path, [])
    for tracker in trackers:
        tracker.write(1, {"validation/exit_rate": [0.5, 0.5]})
        tracker.close()
    assert "no plot of the exits" in caplog.text
    assert jsonl(tmp_path) == {1: {"validation/exit_rate": [0.5, 0.5]}}
