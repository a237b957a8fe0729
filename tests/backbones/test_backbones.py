"""Backbones: what is found in a model or its config, loading, identity, refusals."""

import copy
import re

import pytest
import torch
from transformers import CONFIG_MAPPING

from dyvte.backbones import (
    describe,
    describe_config,
    encode,
    fingerprint,
    get_template,
    load_backbone,
    weights_digest,
)
from dyvte.errors import UnsupportedBackboneError
from tests.helpers.batches import QUESTIONS, batch, llava
from tests.helpers.models import random_image, tiny_llava


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A folder written by stock `save_pretrained` of model and processor."""
    folder = tmp_path_factory.mktemp("backbone")
    model, processor = llava()
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def test_describe_a_model_and_its_config(saved):
    model, _ = llava()
    backbone = describe(model)
    assert backbone.decoder is model.model.language_model
    assert [m is n for m, n in zip(backbone.path, (model, model.model, backbone.decoder), strict=True)] == [
        True
    ] * 3
    assert (backbone.num_layers, backbone.hidden_size, backbone.visual_token_ids) == (4, 32, (4,))
    for source in (saved, model.config):
        shape = describe_config(source)
        assert (shape.num_layers, shape.hidden_size, shape.visual_token_ids) == (4, 32, (4,))
        assert shape.model_type == "llava"


def test_describe_config_reads_no_weights(saved, tmp_path):
    (tmp_path / "config.json").write_bytes((saved / "config.json").read_bytes())
    assert describe_config(tmp_path) == describe_config(saved)


def test_load_gives_the_same_model_frozen_and_a_pil_processor(saved):
    model, processor = llava()
    loaded, loaded_processor = load_backbone(saved)
    assert not loaded.training
    assert not any(p.requires_grad for p in loaded.parameters())
    inputs = batch(loaded_processor, QUESTIONS)
    for name, tensor in batch(processor, QUESTIONS).items():
        assert torch.equal(inputs[name], tensor)
    assert torch.equal(loaded(**inputs).logits, model(**inputs).logits)
    assert loaded.config._attn_implementation == "sdpa"
    assert type(loaded_processor.image_processor).__name__.endswith("Pil")


def test_load_options(saved):
    model, _ = load_backbone(saved, dtype=torch.bfloat16, attn_implementation="eager", device="cpu")
    assert model.dtype == torch.bfloat16
    assert model.config._attn_implementation == "eager"


@pytest.mark.parametrize("path", ["/nowhere/model", "./nothing"])
def test_a_path_that_is_not_there(path):
    with pytest.raises(UnsupportedBackboneError, match=f"no model folder at {re.escape(path)}"):
        load_backbone(path)


def test_folders_that_hold_no_model(tmp_path, saved):
    with pytest.raises(UnsupportedBackboneError, match=r"no config\.json"):
        load_backbone(tmp_path)
    with pytest.raises(UnsupportedBackboneError, match=r"no config\.json"):
        describe_config(tmp_path)
    (tmp_path / "config.json").write_bytes((saved / "config.json").read_bytes())
    with pytest.raises(UnsupportedBackboneError, match="cannot load"):
        load_backbone(tmp_path)


def test_flash_attention_without_its_package_is_named(saved):
    with pytest.raises(UnsupportedBackboneError, match="flash-attn package"):
        load_backbone(saved, attn_implementation="flash_attention_2")


def test_fingerprint_is_the_architecture_and_digest_the_weights(saved):
    model, _ = llava()
    loaded, _ = load_backbone(saved, dtype=torch.bfloat16, attn_implementation="eager")
    assert fingerprint(saved) == fingerprint(model) == fingerprint(loaded)
    assert weights_digest(model) == weights_digest(loaded)
    retrained, _ = tiny_llava(seed=1)
    assert fingerprint(retrained) == fingerprint(model)
    assert weights_digest(retrained) != weights_digest(model)
    for other in (tiny_llava(layers=3), tiny_llava(hidden=64), tiny_llava(patch=8)):
        assert fingerprint(other[0]) != fingerprint(model)


def test_digest_of_weights_that_cannot_be_read_is_none():
    model, _ = llava()
    with torch.device("meta"):
        empty = type(model)(copy.deepcopy(model.config))
    assert weights_digest(empty) is None


def text_config(kind, **fields):
    config = CONFIG_MAPPING[kind]()
    text = config.get_text_config(decoder=True)
    for name, value in fields.items():
        setattr(text, name, value)
    return config


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        (lambda: text_config("mllama"), "cross-attention"),
        (lambda: text_config("idefics"), "cross-attention"),
        (lambda: text_config("florence2"), "encoder-decoder"),
        (lambda: text_config("gemma3n"), "shared KV"),
        (lambda: text_config("gemma4", num_kv_shared_layers=2), "shared KV"),
        (lambda: text_config("qwen3_5"), r"recurrent or other stateful layers \['linear_attention'\]"),
        (lambda: text_config("lfm2_vl", layer_types=["conv", "full_attention"]), r"\['conv'\]"),
        (lambda: text_config("llama"), "no visual token is named"),
        (lambda: text_config("molmo2"), "pass visual_token_ids"),
        (lambda: text_config("kosmos-2"), "no visual token is named"),
        (lambda: text_config("qwen3_5_moe"), r"\['linear_attention'\]"),
        (lambda: text_config("glm5_next"), r"\['indexed_attention', 'linear_attention'\]"),
        (lambda: text_config("diffusion_gemma"), "denoises blocks"),
        (lambda: text_config("t5gemma2"), "encoder-decoder"),
    ],
)
def test_families_that_cannot_work_are_refused_by_reason(config, reason):
    config = config()
    with pytest.raises(UnsupportedBackboneError, match=reason) as error:
        describe_config(config)
    assert config.model_type in str(error.value)


def test_explicit_ids_serve_a_family_whose_config_does_not_name_them():
    assert describe_config(CONFIG_MAPPING["molmo2"](), visual_token_ids=[5, 6]).visual_token_ids == (5, 6)


def test_explicit_ids_win():
    assert describe_config(CONFIG_MAPPING["llava"](), visual_token_ids=[7, 9, 7]).visual_token_ids == (7, 9)


def test_encoding_several_images_and_none_of_them():
    _, processor = llava()
    template = get_template("chat", processor)
    rendered = [template.render("what", "red"), template.render("what", has_image=False)]
    inputs, answer = encode(processor, rendered, [[random_image(0)], []], padding_side="left")
    assert (inputs["input_ids"] == 4).sum(1).tolist() == [16, 0]
    assert inputs["pixel_values"].shape[0] == 1
    assert answer.sum(1).tolist() == [2, 0]
    text_only, _ = encode(processor, rendered[1:], [[]], padding_side="left")
    assert "pixel_values" not in text_only
