"""What a step sees is a function of seed and step alone; learning rates are those of transformers."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch

from dyvte.config import from_dict
from dyvte.errors import ConfigError
from dyvte.training import zero
from dyvte.training.config import TrainConfig
from dyvte.training.schedule import SampleOrder, drawn_layer, held_out, lr_factor, total_steps
from dyvte.training.trackers import JsonlTracker
from dyvte.training.zero import engine_config


def test_each_epoch_sees_every_sample_once_in_its_own_order() -> None:
    order = SampleOrder(7, seed=1)
    epochs = [order.at(7 * epoch, 7).tolist() for epoch in range(3)]
    assert all(sorted(epoch) == list(range(7)) for epoch in epochs)
    assert epochs[0] != epochs[1]
    assert SampleOrder(7, seed=2).at(0, 7).tolist() != epochs[0]


def test_the_stream_does_not_depend_on_how_it_is_read() -> None:
    whole = SampleOrder(7, seed=1).at(0, 40).tolist()
    order = SampleOrder(7, seed=1)
    for start, count in [(30, 10), (3, 12), (0, 1), (6, 30)]:
        assert order.at(start, count).tolist() == whole[start : start + count]


def test_drawn_layers_are_uniform_over_all_but_the_last() -> None:
    drawn = torch.tensor([drawn_layer(3, step, 6) for step in range(600)])
    assert set(drawn.tolist()) == {1, 2, 3, 4, 5}
    assert torch.bincount(drawn)[1:].min() > 80
    assert drawn_layer(3, 17, 6) == drawn_layer(3, 17, 6)


def test_held_out_samples_are_whole_images() -> None:
    images = tuple(f"{index // 8}.png" for index in range(400))
    out = held_out(images, 0.1, seed=0)
    assert int(out.sum()) == 40
    for image in range(50):
        assert len(set(out[image * 8 : image * 8 + 8].tolist())) == 1
    assert not torch.equal(out, held_out(images, 0.1, seed=1))
    assert not held_out(images, 0.0, seed=0).any()
    assert not held_out(("a", "a"), 0.9, seed=0).any()  # never everything


@pytest.mark.parametrize("schedule", ["cosine", "linear", "constant"])
def test_learning_rates_are_those_of_transformers(schedule: str) -> None:
    from transformers import get_scheduler

    name = "constant_with_warmup" if schedule == "constant" else schedule
    parameter = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([parameter], lr=1.0)
    reference = get_scheduler(name, optimizer, num_warmup_steps=math.ceil(50 * 0.03), num_training_steps=50)
    factor = lr_factor(schedule, 50, 0.03)
    for step in range(50):
        assert factor(step) == pytest.approx(reference.get_last_lr()[0])
        optimizer.step()
        reference.step()


def test_steps_cover_the_epochs() -> None:
    assert total_steps(100, 2, 32) == 7
    assert total_steps(3, 0.1, 32) == 1


def test_log_lines_after_the_resumed_step_are_cut_and_a_torn_line_too(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    path.write_text('{"step": 1, "loss": 3}\n{"step": 2, "loss": 2}\n{"step": 3, "loss": 1}\n{"step": 4, "lo')
    tracker = JsonlTracker(path, resume_step=2)
    tracker.write(3, {"loss": 0.5})
    tracker.close()
    assert [json.loads(line) for line in path.read_text().split("\n")[:-1]] == [
        {"step": 1, "loss": 3}, {"step": 2, "loss": 2}, {"step": 3, "loss": 0.5}
    ]  # fmt: skip


# --- DeepSpeed configuration ---


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
    assert zero.shards_backbone(cfg)
    assert engine_config(cfg, 2)["zero_optimization"] == {"stage": 3}
    made = zero.backbone_config(cfg, "bfloat16", 2)
    assert made["bf16"] == {"enabled": True}
    assert made["train_batch_size"] == 2
    assert made["zero_optimization"]["offload_param"] == {"device": "cpu"}
    assert "offload_optimizer" not in made["zero_optimization"]
    assert "bf16" not in zero.backbone_config(cfg, "float32", 2)
    assert not zero.shards_backbone(config(tmp_path, {"zero_optimization": {"stage": 2}}))


@pytest.mark.parametrize("name", ["zero2", "zero3", "zero3_offload"])
def test_shipped_deepspeed_files_are_read(tmp_path: Path, name: str) -> None:
    path = Path(__file__).resolve().parents[2] / "configs" / "deepspeed" / f"{name}.json"
    cfg = config(tmp_path, json.loads(path.read_text()))
    assert zero.shards_backbone(cfg) == (name != "zero2")
    assert engine_config(cfg, 1)["zero_optimization"]["stage"] == int(name[4])


def test_engine_refusals(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="train_batch_size"):
        engine_config(config(tmp_path, {"train_batch_size": 8}), 1)
    one_layer = {"name": "reference_label", "one_layer_per_step": True}
    with pytest.raises(ConfigError, match="stage 0"):
        engine_config(config(tmp_path, {"zero_optimization": {"stage": 2}}, objective=one_layer), 1)
    (tmp_path / "bad.json").write_text("[")
    with pytest.raises(ConfigError, match="not valid JSON"):
        zero.read_json(tmp_path / "bad.json")
    with pytest.raises(ConfigError, match="one_layer_per_step belongs"):
        config(tmp_path, objective={"one_layer_per_step": True})


def test_the_search_for_k_says_that_it_does_not_shard(tmp_path: Path) -> None:
    from dyvte.training.tracing import search_k

    with pytest.raises(ConfigError, match="asks for ZeRO-3"):
        search_k(config(tmp_path, {"zero_optimization": {"stage": 3}}))
