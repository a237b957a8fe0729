"""From conversations to traces: earlier exchanges in the prompt, embedded images, defects by name."""

from __future__ import annotations

import json
from dataclasses import replace
from io import BytesIO
from pathlib import Path

import pytest
import torch

from dyvte.backbones import encode, get_template
from dyvte.calibration.apply import check_store
from dyvte.data import EmbeddedImage, load_image, open_conversations, select
from dyvte.errors import DataError, GateMismatchError
from dyvte.gates import GateConfig
from dyvte.teacher import Teacher, TeacherConfig, trace_exits, write_traces
from tests.helpers.models import random_image, tiny_llava


@pytest.fixture
def talk(tmp_path: Path) -> Path:
    (tmp_path / "images").mkdir()
    random_image(0).save(tmp_path / "images" / "0.png")
    values = ["<image>\nwhat color", "red", "how many", "two or three", "is there any circle ?", "yes"]
    turns = [{"from": ("human", "gpt")[i % 2], "value": value} for i, value in enumerate(values)]
    path = tmp_path / "talk.jsonl"
    path.write_text(json.dumps({"id": "t", "image": "0.png", "conversations": turns}))
    return path


def teacher_of(**settings) -> Teacher:
    model, processor = tiny_llava(3, 32)
    return Teacher(model, processor, TeacherConfig(label_source="data", **settings))


def test_a_turn_is_traced_with_the_earlier_ones_in_its_prompt(talk: Path):
    teacher = teacher_of()
    selection = select(open_conversations(talk), turns="all")
    shard, defects = teacher.trace(selection.samples)
    assert not defects
    assert shard.trace.sample_ids == ("t", "t:turn2", "t:turn3")
    assert set(shard.image_ids) == {"0.png"}
    # The same, written out: the third turn's text by hand, its answer the last two tokens.
    text = (
        "<s>user <image> what color assistant red</s><s>user how many assistant two or three</s>"
        "<s>user is there any circle ? assistant yes</s>"
    )
    batch = teacher.processor(
        text=[text], images=[random_image(0)], add_special_tokens=False, return_tensors="pt"
    )
    answer_BN = torch.zeros_like(batch["input_ids"], dtype=torch.bool)
    answer_BN[0, -2:] = True
    expected = trace_exits(teacher.model, dict(batch), answer_BN)
    for name in ("risk", "loss", "features"):
        found = getattr(shard.trace, name)[2]
        assert torch.allclose(found, getattr(expected, name)[0], atol=1e-5, equal_nan=True), name
    alone, _ = teacher.trace([replace(selection.samples[2], history=())])
    assert not torch.allclose(alone.trace.loss[0], shard.trace.loss[2], atol=1e-3)


def test_an_embedded_image_is_traced_like_its_file(talk: Path):
    teacher = teacher_of()
    sample = select(open_conversations(talk), turns="first").samples[0]
    stream = BytesIO()
    load_image(sample.image).save(stream, "PNG")
    packed = replace(sample, image=EmbeddedImage(stream.getvalue()))
    (one, _), (other, _) = teacher.trace([sample]), teacher.trace([packed])
    assert torch.equal(one.trace.risk, other.trace.risk)


def test_samples_that_cannot_be_traced_are_named_counted_and_limited(talk: Path, tmp_path: Path):
    good = select(open_conversations(talk), turns="first").samples[0]
    (tmp_path / "broken.png").write_bytes(b"no image")
    bad = [
        replace(good, id="broken", image=tmp_path / "broken.png"),
        replace(good, id="token", question="what </s> color"),
        replace(good, id="long", answer="red " * 60),
    ]
    selection = select(open_conversations(talk), turns="first")
    selection = replace(selection, samples=(*bad, good))
    teacher = teacher_of(max_length=60)
    shard, defects = teacher.trace(selection.samples, "talk.jsonl")
    assert shard.trace.sample_ids == ("t",)
    found = {defect.sample_id: str(defect) for defect in defects}
    assert found["broken"].startswith("talk.jsonl: sample 'broken': image: ")
    assert found["token"].startswith("talk.jsonl: sample 'token': conversations: ")
    assert "the answer would be cut" in found["long"]
    with pytest.raises(DataError, match="3 unusable samples, 2 allowed"):
        write_traces(tmp_path / "a", teacher, selection, max_bad_samples=2)
    store = write_traces(tmp_path / "b", teacher, selection, max_bad_samples=3)
    assert len(store.dropped()) == 3


def test_calibration_refuses_traces_of_another_image_padding(talk: Path, tmp_path: Path):
    store = write_traces(tmp_path / "t", teacher_of(), select(open_conversations(talk), turns="all"))
    config = GateConfig(num_layers=3, hidden_size=32)
    check_store(replace(config, backbone={"image_padding": "none"}), store)
    with pytest.raises(
        GateMismatchError, match="padding is 'none', but the gates were trained with 'square'"
    ):
        check_store(replace(config, backbone={"image_padding": "square"}), store)


def test_padding_sides_label_the_same_tokens_of_a_history(talk: Path):
    _, processor = tiny_llava(2, 32)
    template = get_template("v1", processor)
    samples = select(open_conversations(talk), turns="all").samples
    rendered = [template.render(s.question, s.answer, history=s.history) for s in samples]
    labels = []
    for side in ("left", "right"):
        inputs, answer_BN = encode(processor, rendered, [[random_image(0)]] * 3, padding_side=side)
        labels.append([inputs["input_ids"][row][answer_BN[row]].tolist() for row in range(3)])
    assert labels[0] == labels[1]
    words = [processor.tokenizer.convert_ids_to_tokens(row) for row in labels[0]]
    assert words == [["red", "</s>"], ["two", "or", "three", "</s>"], ["yes", "</s>"]]
