"""A teacher pass needs no output folder, and reads the file of a whole training."""

from __future__ import annotations

import pytest

from dyvte.config import load_config
from dyvte.errors import ConfigError
from dyvte.tracing import TracingConfig
from dyvte.training import TrainConfig

SMALL = ["model=hub/id", "data.path=data.json"]


def test_model_and_data_are_enough() -> None:
    cfg = load_config(TracingConfig, None, SMALL)
    assert (cfg.model.path, cfg.data.name, cfg.deepspeed) == ("hub/id", "data.json", None)


def test_the_file_of_a_training_is_read_and_what_does_not_concern_it_is_passed_over(tmp_path) -> None:
    path = tmp_path / "training.yaml"
    path.write_text(
        "model: {path: ../m, dtype: bfloat16}\ndata: {path: data.json, limit: 7}\nteacher: {batch_size: 5}\n"
        "objective: {name: safe_label}\nepochs: 3\noutput_dir: runs\ndeepspeed: ds.json\n"
    )
    overrides = ["optimizer.learning_rate=1", "teacher.exit_every=2"]
    cfg = load_config(TracingConfig, path, overrides, within=TrainConfig)
    whole = load_config(TrainConfig, path, overrides)
    assert isinstance(whole, TracingConfig)
    for name in ("model", "data", "teacher", "deepspeed"):
        assert getattr(cfg, name) == getattr(whole, name)
    assert (cfg.teacher.exit_every, cfg.data.limit, cfg.deepspeed) == (2, 7, tmp_path / "ds.json")


def test_a_typing_error_is_named_all_the_same(tmp_path) -> None:
    path = tmp_path / "training.yaml"
    path.write_text("model: m\ndata: {path: d.json}\nteachre: {batch_size: 5}\n")
    with pytest.raises(ConfigError, match="unknown key 'teachre'; did you mean 'teacher'"):
        load_config(TracingConfig, path, within=TrainConfig)
    with pytest.raises(ConfigError, match="unknown key 'output_dir'"):
        load_config(TracingConfig, None, [*SMALL, "output_dir=o"])
