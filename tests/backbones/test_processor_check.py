"""Processors that do not fit the model: filled in from its config, or refused before weights are read."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlavaConfig, LlavaForConditionalGeneration

from dyvte.backbones import describe, encode, get_template, load_backbone
from dyvte.backbones.encode import closing_tokens
from dyvte.backbones.load import load_processor
from dyvte.backbones.processor_check import (
    _features_without_weights,
    check_processor,
    complete_processor,
)
from dyvte.errors import ConfigError
from tests.helpers.families import FAMILIES
from tests.helpers.models import random_image, tiny_llava, tiny_processor
from tests.helpers.zoo.processors import PROCESSORS

KEYS = ("patch_size", "vision_feature_select_strategy", "num_additional_image_tokens")


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("saved") / "tiny"
    model, processor = tiny_llava(2, 32)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def with_settings(saved: Path, folder: Path, drop: tuple[str, ...] = (), **changes: Any) -> Path:
    shutil.copytree(saved, folder)
    path = folder / "processor_config.json"
    settings = {name: value for name, value in json.loads(path.read_text()).items() if name not in drop}
    images = changes.pop("image_processor", {})
    settings["image_processor"].update(images)
    path.write_text(json.dumps({**settings, **changes}))
    return folder


@pytest.mark.parametrize(
    ("drop", "changes"),
    [
        (KEYS[:1], {}),
        (KEYS[1:2], {}),
        (KEYS[2:], {}),
        (KEYS, {}),
        ((), {"patch_size": None}),
        (KEYS[1:], {"vision_feature_select_strategy": None}),
    ],
)
def test_missing_settings_are_those_of_the_model(saved: Path, tmp_path: Path, drop, changes) -> None:
    folder = with_settings(saved, tmp_path / "old", drop, **changes)
    model, processor = load_backbone(folder)
    assert [getattr(processor, name) for name in KEYS] == [4, "default", 1]
    rendered = [get_template("chat", processor).render("what color")]
    inputs, _ = encode(processor, rendered, [[random_image(0)]], padding_side="left")
    expected, _ = encode(load_processor(saved), rendered, [[random_image(0)]], padding_side="left")
    assert torch.equal(inputs["input_ids"], expected["input_ids"])
    model(**inputs)


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"num_additional_image_tokens": 0}, "15 placeholders .* 16 features .*is 0, where 1 would fit"),
        ({"num_additional_image_tokens": 2}, "17 placeholders .*is 2, where 1 would fit"),
        ({"patch_size": 8}, "4 placeholders .* 16 features .patch_size is 8, the model's 4"),
        ({"vision_feature_select_strategy": "full"}, "17 placeholders .* is 'full', the model's 'default'"),
        ({"image_processor": {"size": {"height": 32, "width": 32}}}, "cannot take the images .*match"),
    ],
)
def test_settings_that_do_not_fit_are_refused_before_weights(
    saved: Path, tmp_path: Path, changes: dict[str, Any], problem: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = with_settings(saved, tmp_path / "wrong", **changes)
    read = "transformers.AutoModelForImageTextToText.from_pretrained"
    monkeypatch.setattr(read, lambda *_, **__: pytest.fail("weights were read"))
    with pytest.raises(ConfigError, match=problem):
        load_backbone(folder)
    with pytest.raises(ConfigError, match=problem):
        load_processor(folder)


def test_a_tower_without_a_class_token_adds_none() -> None:
    """LLaVA over SigLIP, all features taken: the default of 0 is right."""
    from transformers import LlamaConfig, SiglipVisionConfig

    tower = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = LlavaConfig(
        vision_config=SiglipVisionConfig(**tower, image_size=16, patch_size=4, vision_use_head=False),
        text_config=LlamaConfig(**tower, vocab_size=64),
        image_token_id=4,
        vision_feature_select_strategy="full",
    )
    processor = tiny_processor()
    for name in KEYS[:2]:
        setattr(processor, name, None)
    processor.num_additional_image_tokens = 0
    assert complete_processor(processor, config, "nowhere")
    assert [getattr(processor, name) for name in KEYS] == [4, "full", 0]
    with torch.no_grad():
        check_processor(processor, LlavaForConditionalGeneration(config), "nowhere")


@pytest.mark.parametrize("family", PROCESSORS)
def test_families_are_compared_without_weights_and_on_the_model(family: str) -> None:
    model, _, _ = FAMILIES[family]("sdpa")
    processor = PROCESSORS[family]()
    assert complete_processor(processor, model.config, family)
    check_processor(processor, model, family)
    if family == "internvl":
        processor.image_seq_length = 9
    elif family.startswith("qwen"):
        processor.image_processor.merge_size = 1
    else:
        processor.num_additional_image_tokens = 3
    if family.startswith("qwen"):  # a tower of one layer cannot say why it cannot take such an image
        assert not complete_processor(processor, model.config, family)
        odd = PROCESSORS[family]()
        odd.image_processor.merge_size = 4
        with pytest.raises(ConfigError, match=f"{family}: the processor makes"):
            complete_processor(odd, model.config, family)
    else:
        with pytest.raises(ConfigError, match=f"{family}: the processor makes"):
            complete_processor(processor, model.config, family)
    with pytest.raises(ConfigError, match=r"placeholders of an image|cannot take the images"):
        check_processor(processor, model, family)
    assert describe(model)  # nothing changed on it


@pytest.mark.parametrize("family", FAMILIES)
def test_features_are_counted_by_the_config_alone(family: str) -> None:
    """As many as there are placeholders in a prompt that the model takes; videos have placeholders apart."""
    model, inputs, _ = FAMILIES[family]("sdpa")
    ids = (
        [model.config.image_token_id] if family == "video_llava" else describe(model).visual_token_ids
    )  # fmt: skip
    placeholders = int(torch.isin(inputs["input_ids"], torch.tensor(ids)).sum())
    assert _features_without_weights(model.config, inputs) == placeholders


def test_what_a_shallow_vision_side_cannot_do_is_not_the_images_fault(monkeypatch) -> None:
    model, inputs, _ = FAMILIES["qwen2_vl"]("sdpa")
    monkeypatch.setattr(
        "transformers.Qwen2VLForConditionalGeneration.get_image_features",
        lambda self, pixel_values: (_ for _ in ()).throw(IndexError("layer 2 of 1")),
    )
    assert _features_without_weights(model.config, inputs) is None


def test_a_tokenizer_without_padding_pads_with_its_end(saved: Path, tmp_path: Path) -> None:
    folder = tmp_path / "no_pad"
    shutil.copytree(saved, folder)
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        if (path := folder / name).is_file():
            settings = json.loads(path.read_text())
            settings.pop("pad_token", None)
            path.write_text(json.dumps(settings))
    model, processor = load_backbone(folder)
    assert processor.tokenizer.pad_token == "</s>"
    _, complete = load_backbone(saved)
    questions = ["what color is the circle ?", "how many"]
    logits = []
    for one in (processor, complete):
        rendered = [get_template("chat", one).render(question) for question in questions]
        inputs, _ = encode(one, rendered, [[random_image(i)] for i in range(2)], padding_side="left")
        logits.append(model(**inputs).logits[:, -1])
    torch.testing.assert_close(*logits)
    processor.tokenizer.pad_token = None
    with pytest.raises(ConfigError, match="the tokenizer has no pad token"):
        encode(processor, rendered, [[random_image(i)] for i in range(2)], padding_side="left")


def closing(processor: Any, ends: str) -> Any:
    """The same processor with a tokenizer that adds special tokens on both sides."""
    from tokenizers.processors import TemplateProcessing

    tokens = ["<s>", *ends.split()]
    ids = [(token, processor.tokenizer.convert_tokens_to_ids(token)) for token in dict.fromkeys(tokens)]
    added = TemplateProcessing(single=f"<s> $A {ends}".strip(), special_tokens=ids)
    processor.tokenizer._tokenizer.post_processor = added
    return processor


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("ends", ["</s>", "</s> <unk>"])
def test_what_a_tokenizer_adds_behind_the_prompt_is_taken_away(side: str, ends: str) -> None:
    plain, odd = closing(tiny_processor(), ""), closing(tiny_processor(), ends)
    assert closing_tokens(plain.tokenizer) == 0
    assert closing_tokens(odd.tokenizer) == len(ends.split())
    template = get_template("v1", plain)
    rendered = [
        template.render("what color", "red"),
        template.render("how many objects are there ?"),
        template.render("what", "yes or no", has_image=False),
    ]
    images = [[random_image(0)], [random_image(1)], []]
    expected, answer = encode(plain, rendered, images, padding_side=side)
    found, labelled = encode(odd, rendered, images, padding_side=side)
    for name in ("input_ids", "attention_mask"):
        assert torch.equal(found[name], expected[name]), name
    assert torch.equal(labelled, answer)
    assert expected["input_ids"][0][expected["attention_mask"][0].bool()][0] == plain.tokenizer.bos_token_id
