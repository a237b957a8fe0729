"""Backbones in 8 or 4 bits: what from_pretrained is told, their digest, and an error without bitsandbytes."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from dyvte.backbones import BackboneConfig, load_backbone, open_backbone, weights_digest
from dyvte.config import from_dict
from dyvte.distributed import Processes
from dyvte.errors import ConfigError, UnsupportedBackboneError
from dyvte.tracing.sharded import opened_backbone
from dyvte.training.config import TrainConfig
from tests.helpers.models import tiny_llava


@pytest.fixture
def folder(tmp_path):
    model, processor = tiny_llava()
    model.save_pretrained(tmp_path / "model")
    processor.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@pytest.mark.parametrize("name", ["int8", "nf4"])
def test_without_bitsandbytes_it_says_what_to_install(folder, monkeypatch, name) -> None:
    monkeypatch.setattr("transformers.utils.is_bitsandbytes_available", lambda: False)
    with pytest.raises(UnsupportedBackboneError, match=rf"{name}.*pip install bitsandbytes"):
        load_backbone(folder, quantization=name)


def test_another_name_is_refused(folder) -> None:
    with pytest.raises(UnsupportedBackboneError, match=r"'int4'.*'int8' or 'nf4'"):
        load_backbone(folder, quantization="int4")
    with pytest.raises(ConfigError, match=r"quantization.*'none', 'int8', 'nf4'"):
        from_dict(BackboneConfig, {"path": "m", "quantization": "int4"})


@pytest.mark.parametrize("name", ["int8", "nf4"])
def test_from_pretrained_gets_the_packing_and_the_device(folder, monkeypatch, name) -> None:
    """bitsandbytes needs a GPU: its place is taken by a recorder that loads plain weights."""
    from transformers import AutoModelForImageTextToText

    real, told = AutoModelForImageTextToText.from_pretrained, {}

    def record(path: str, **arguments: Any) -> Any:
        told.update({key: arguments.pop(key) for key in ("quantization_config", "device_map")})
        return real(path, **arguments)

    monkeypatch.setattr("transformers.utils.is_bitsandbytes_available", lambda: True)
    monkeypatch.setattr(AutoModelForImageTextToText, "from_pretrained", record)
    monkeypatch.setattr(torch.nn.Module, "to", lambda *_: pytest.fail("packed weights cannot be moved"))
    cfg = BackboneConfig(path=str(folder), dtype="bfloat16", quantization=name)
    open_backbone(cfg, torch.device("cpu"))
    packing = told["quantization_config"].to_dict()
    assert told["device_map"] == {"": "cpu"}
    assert packing["quant_method"] == "bitsandbytes"
    if name == "int8":
        assert packing["load_in_8bit"]
    else:
        assert packing["load_in_4bit"]
        assert (packing["bnb_4bit_quant_type"], packing["bnb_4bit_compute_dtype"]) == ("nf4", "bfloat16")


def test_the_digest_tells_packed_weights_from_plain_ones_and_from_each_other() -> None:
    plain, _ = tiny_llava()
    before = weights_digest(plain)
    assert before == weights_digest(plain.to(torch.bfloat16))

    def packed(seed: int):
        model, _ = tiny_llava(seed=seed)
        for name, parameter in list(model.named_parameters()):
            if "language_model.layers" in name and parameter.ndim == 2:
                levels = (parameter / parameter.abs().max() * 127).round().to(torch.int8)
                parent = model.get_submodule(name.rpartition(".")[0])
                parent.weight = torch.nn.Parameter(levels, requires_grad=False)
        return model

    assert weights_digest(packed(0)) == weights_digest(packed(0))
    assert len({before, weights_digest(packed(0)), weights_digest(packed(1))}) == 3


def test_zero3_refuses_a_packed_backbone(tmp_path) -> None:
    (tmp_path / "z.json").write_text('{"zero_optimization": {"stage": 3}}')
    values = {
        "model": {"path": "m", "quantization": "nf4"}, "data": {"path": "d.json"}, "output_dir": "o",
        "deepspeed": str(tmp_path / "z.json"),
    }  # fmt: skip
    processes = Processes(0, 1, torch.device("cpu"))
    with (
        pytest.raises(ConfigError, match="ZeRO-3 cannot shard a backbone in nf4"),
        opened_backbone(from_dict(TrainConfig, values), processes),
    ):
        pass
