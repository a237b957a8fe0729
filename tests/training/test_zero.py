"""DeepSpeed's settings for gates and for a sharded backbone, from the user's file and the run's own."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from dyvte.config import from_dict
from dyvte.errors import ConfigError
from dyvte.tracing.zero import backbone_engine, shards_backbone
from dyvte.training.config import TrainConfig
from dyvte.training.zero import engine_config


def config(tmp_path: Path, deepspeed: dict | None = None, **settings) -> TrainConfig:
    values = {"model": {"path": "m"}, "data": {"path": "d.json"}, "output_dir": "o", **settings}
    if deepspeed is not None:
        path = tmp_path / "ds.json"
        path.write_text(json.dumps(deepspeed))
        values["deepspeed"] = str(path)
    return from_dict(TrainConfig, values)


def test_engine_settings_follow_from_the_run(tmp_path: Path) -> None:
    made = engine_config(config(tmp_path, batch_size=4, accumulation=3), world_size=2)
    assert made["zero_optimization"]["stage"] == 0
    assert made["train_batch_size"] == 24
    assert made["gradient_clipping"] == 1.0


def test_a_file_in_the_style_of_other_trainers_is_made_safe(tmp_path: Path) -> None:
    given = {
        "bf16": {"enabled": "auto"}, "fp16": {"enabled": True}, "train_batch_size": "auto",
        "train_micro_batch_size_per_gpu": "auto", "optimizer": {"type": "AdamW"},
        "zero_optimization": {"stage": 2, "overlap_comm": True, "reduce_bucket_size": "auto"},
    }  # fmt: skip
    made = engine_config(config(tmp_path, given, batch_size=4), world_size=1)
    assert made["zero_optimization"] == {"stage": 2, "overlap_comm": True}
    assert not {"bf16", "fp16", "optimizer"} & set(made)
    assert made["train_micro_batch_size_per_gpu"] == 4


def test_offload_is_for_the_backbone_alone(tmp_path: Path) -> None:
    given = {
        "bf16": {"enabled": "auto"}, "train_batch_size": "auto",
        "zero_optimization": {
            "stage": 3, "offload_param": {"device": "cpu"}, "offload_optimizer": {"device": "cpu"},
        },
    }  # fmt: skip
    cfg = config(tmp_path, given)
    assert shards_backbone(cfg)
    assert engine_config(cfg, 2)["zero_optimization"] == {"stage": 3}
    made = backbone_engine(cfg, "bfloat16", 2)
    assert made["bf16"] == {"enabled": True}
    assert made["train_batch_size"] == 2
    assert made["zero_optimization"]["offload_param"] == {"device": "cpu"}
    assert "offload_optimizer" not in made["zero_optimization"]
    assert "bf16" not in backbone_engine(cfg, "float32", 2)
    assert not shards_backbone(config(tmp_path, {"zero_optimization": {"stage": 2}}))


@pytest.mark.parametrize("name", ["zero2", "zero3", "zero3_offload"])
def test_shipped_deepspeed_files_are_read(tmp_path: Path, name: str) -> None:
    path = Path(__file__).resolve().parents[2] / "configs" / "deepspeed" / f"{name}.json"
    cfg = config(tmp_path, json.loads(path.read_text()))
    assert shards_backbone(cfg) == (name != "zero2")
    assert engine_config(cfg, 1)["zero_optimization"]["stage"] == int(name[4])


def test_engine_refusals(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="train_batch_size"):
        engine_config(config(tmp_path, {"train_batch_size": 8}), 1)
    one_layer = {"name": "reference_label", "one_layer_per_step": True}
    with pytest.raises(ConfigError, match="stage 0"):
        engine_config(config(tmp_path, {"zero_optimization": {"stage": 2}}, objective=one_layer), 1)
    with pytest.raises(ConfigError, match="one_layer_per_step belongs"):
        config(tmp_path, objective={"one_layer_per_step": True})


def test_the_search_for_k_says_that_it_does_not_shard(tmp_path: Path) -> None:
    from dyvte.tracing.search import search_k

    with pytest.raises(ConfigError, match="asks for ZeRO-3"):
        search_k(config(tmp_path, {"zero_optimization": {"stage": 3}}))
