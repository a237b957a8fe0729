"""DeepSpeed files as people bring them: read, or refused by name before anything runs."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from dyvte.config import load_config
from dyvte.distributed import Processes
from dyvte.errors import ConfigError
from dyvte.tracing.config import TracingConfig
from dyvte.tracing.sharded import opened_backbone
from dyvte.tracing.zero import read_deepspeed, stage_of, start_engine
from tests.helpers.models import tiny_llava

AUTO = {
    "train_micro_batch_size_per_gpu": "auto",
    "train_batch_size": "auto",
    "gradient_accumulation_steps": "auto",
    "fp16": {"enabled": "auto", "loss_scale": 0, "initial_scale_power": 16},
    "bf16": {"enabled": "auto"},
}
ZERO3 = {
    "stage": 3,
    "overlap_comm": True,
    "contiguous_gradients": True,
    "sub_group_size": 1e9,
    "reduce_bucket_size": "auto",
    "stage3_prefetch_bucket_size": "auto",
    "stage3_max_live_parameters": 1e9,
    "stage3_gather_16bit_weights_on_model_save": True,
    "offload_param": {"device": "cpu", "pin_memory": True},
}


def written(folder: Path, content: object) -> Path:
    path = folder / "ds.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


@pytest.mark.parametrize(
    ("content", "stage"),
    [
        ({}, 0),
        ({"zero_optimization": {}}, 0),
        ({"zero_optimization": {"stage": "auto"}}, 0),
        ({**AUTO, "zero_optimization": {"stage": 2, "reduce_bucket_size": "auto"}}, 2),
        ({**AUTO, "zero_optimization": ZERO3, "gradient_clipping": "auto", "steps_per_print": 1e5}, 3),
        (
            {
                "zero_optimization": {"stage": 1},
                "flops_profiler": {"enabled": True},
                "wall_clock_breakdown": True,
                "activation_checkpointing": {"partition_activations": True},
                "zero_allow_untested_optimizer": True,
                "something_of_mine": 1,
            },
            1,
        ),
    ],
)
def test_files_of_other_trainers_are_read(content, stage, tmp_path) -> None:
    found = read_deepspeed(written(tmp_path, content))
    assert stage_of(found) == stage
    assert not {"fp16", "bf16"} & found.keys()
    assert '"auto"' not in json.dumps(found)
    assert found.get("something_of_mine") == content.get("something_of_mine")


def test_without_a_file_it_is_stage_0() -> None:
    assert stage_of(read_deepspeed(None)) == 0


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"zero_optimization": True}, r'expected a group of settings such as \{"stage": 2\}, found True'),
        ({"zero_optimization": None}, "expected a group of settings.*found None"),
        ({"zero_optimization": [2]}, "expected a group of settings"),
        ({"zero_optimization": {"stage": "2"}}, "stage: expected 0, 1, 2 or 3, found '2'"),
        ({"zero_optimization": {"stage": 9}}, "stage: expected 0, 1, 2 or 3, found 9"),
        ({"zero_optimization": {"stage": True}}, "stage: expected 0, 1, 2 or 3, found True"),
        ({"zero_optimization": {"stage": 2, "no_such_key": 1}}, "cannot read it: no_such_key: Extra inputs"),
        ({"zero_optimization": {"stage": 2, "overlap_comm": "perhaps"}}, "cannot read it: overlap_comm"),
        ({"zero_optimization": {"stage": 3, "offload_param": {"device": "moon"}}}, "offload_param.device"),
        ({"zero_optimisation": {"stage": 2}}, "unknown section 'zero_optimisation'; did you mean 'zero_opt"),
        ([], "expected a JSON object"),
        ('{\n // ZeRO-2\n "zero_optimization": {"stage": 2}\n}', "not valid JSON"),
        ("[", "not valid JSON"),
    ],
)
def test_what_cannot_be_meant_is_refused_by_name(content, message, tmp_path) -> None:
    path = written(tmp_path, content)
    with pytest.raises(ConfigError, match=message) as refused:
        read_deepspeed(path)
    assert str(path) in str(refused.value)


def test_a_missing_file_is_named(tmp_path) -> None:
    with pytest.raises(ConfigError, match=r"nothing\.json: the DeepSpeed file cannot be read"):
        read_deepspeed(tmp_path / "nothing.json")


def test_what_only_the_engine_refuses_names_the_file_too(tmp_path, monkeypatch) -> None:
    """Other sections are DeepSpeed's to judge, when it starts."""
    import deepspeed
    from deepspeed.runtime.config import DeepSpeedConfigError

    def refuse(**_):
        raise DeepSpeedConfigError("flops_profiler: no")

    monkeypatch.setattr(deepspeed, "initialize", refuse)
    with pytest.raises(ConfigError, match=r"ds\.json: DeepSpeed refuses its settings: flops_profiler: no"):
        start_engine(tmp_path / "ds.json", {})


def test_a_processor_that_does_not_fit_is_named_before_weights_are_sharded(tmp_path, monkeypatch) -> None:
    model, processor = tiny_llava(2, 32)
    model.save_pretrained(tmp_path / "tiny")
    processor.num_additional_image_tokens = 0
    processor.save_pretrained(tmp_path / "tiny")
    read = "transformers.AutoModelForImageTextToText.from_pretrained"
    monkeypatch.setattr(read, lambda *_, **__: pytest.fail("weights were read"))
    (tmp_path / "data.json").write_text("[]")
    words = [f"model.path={tmp_path / 'tiny'}", f"data.path={tmp_path / 'data.json'}"]
    file = written(tmp_path, {"zero_optimization": ZERO3})
    cfg = load_config(TracingConfig, None, [*words, f"deepspeed={file}"])
    with (
        pytest.raises(ConfigError, match="15 placeholders of an image, the model 16 features"),
        opened_backbone(cfg, Processes()),
    ):
        pass
