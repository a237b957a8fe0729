"""The dry run finds what the run itself would trip over."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from dyvte.config import load_config
from dyvte.errors import ConfigError
from dyvte.training import TrainConfig
from dyvte.training.dryrun import dry_run
from tests.helpers.conversations import entry
from tests.helpers.models import random_image, tiny_llava


@pytest.fixture
def settings(tmp_path: Path) -> TrainConfig:
    model, processor = tiny_llava(2, 32)
    model.save_pretrained(tmp_path / "tiny")
    processor.save_pretrained(tmp_path / "tiny")
    (tmp_path / "images").mkdir()
    random_image(0).save(tmp_path / "images" / "0.png")
    rows = [entry(f"s{i}", "0.png", f"<image>\n{'how many ' * (i + 1)}", "red") for i in range(6)]
    (tmp_path / "data.json").write_text(json.dumps(rows))
    words = [f"model.path={tmp_path / 'tiny'}", f"data.path={tmp_path / 'data.json'}", "output_dir=out"]
    return load_config(TrainConfig, None, words)


def edit(settings: TrainConfig, **changes) -> None:
    path = Path(settings.model.path) / "processor_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_placeholders_are_counted_by_the_models_own_settings(settings: TrainConfig) -> None:
    expected = dry_run(settings).tokens
    assert expected.visual == 16
    edit(settings, patch_size=None, vision_feature_select_strategy=None)
    assert dry_run(settings).tokens == expected


def test_a_processor_that_does_not_fit_is_refused(settings: TrainConfig) -> None:
    edit(settings, num_additional_image_tokens=0)
    with pytest.raises(ConfigError, match="15 placeholders of an image, the model 16 features"):
        dry_run(settings)


def test_samples_that_cannot_be_read_are_logged_by_name(settings: TrainConfig, caplog) -> None:
    image = settings.data.images / "1.png"
    image.write_bytes((settings.data.images / "0.png").read_bytes()[:-200])
    rows = json.loads(settings.data.path.read_text())
    rows[2]["image"] = "1.png"
    settings.data.path.write_text(json.dumps(rows))
    tokens = dry_run(settings).tokens
    assert tokens.source == "5 samples of the data"
    assert "data.json: sample 's2': image:" in caplog.text
