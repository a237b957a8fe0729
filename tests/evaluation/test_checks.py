"""Questions that cannot be asked: named with benchmark, file and id before anything is asked."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from dyvte.backbones import BackboneConfig, get_template
from dyvte.errors import DataError
from dyvte.evaluation.generation import Pipeline, encode_questions
from dyvte.evaluation.runner import EvalConfig, run_policies
from dyvte.evaluation.settings import parse_policies
from dyvte.plugins.answering import Answering, PluginConfig, Request
from dyvte.tasks.base import Question, get_benchmark
from tests.helpers.fixtures import write_mini_gqa
from tests.helpers.models import random_image, tiny_llava


@pytest.fixture(scope="module")
def pipeline() -> Pipeline:
    model, processor = tiny_llava(3)
    return Pipeline(model, processor, get_template("chat", processor), max_new_tokens=3)


def run(pipeline: Pipeline, root: Path, output: Path):
    config = EvalConfig(
        model=BackboneConfig(path="tiny"),
        benchmark="gqa",
        data=root,
        output=output,
        question_suffix="",
        timing_batches=0,
    )
    benchmark = get_benchmark("gqa")
    return run_policies(pipeline, benchmark, benchmark.load(root), parse_policies(("never",)), config)


def damaged(root: Path, damage: str) -> tuple[Path, str]:
    """A mini-GQA with one bad question; its id."""
    write_mini_gqa(root, questions=12, images=4)
    path = root / "testdev_balanced_questions.json"
    data = json.loads(path.read_text())
    bad = "00009"
    if damage in ("torn", "text"):
        image = root / "images" / "1.png"  # of 00001, 00005 and 00009
        image.write_bytes(image.read_bytes()[:-300] if damage == "torn" else b"no picture")
        bad = "00001"
    elif damage == "id":
        data[bad + "\udc80"] = data.pop(bad)
        bad += "\\udc80"
    else:
        data[bad]["question"] += damage
    path.write_text(json.dumps(data))
    return root, bad


@pytest.mark.parametrize("damage", [" <image>", " </s>", "<pad>", " \ude00", "torn", "text", "id"])
def test_one_bad_question_is_named_before_any_is_asked(pipeline, tmp_path, damage, monkeypatch) -> None:
    root, bad = damaged(tmp_path / "gqa", damage)
    monkeypatch.setattr(pipeline.model, "generate", lambda **_: pytest.fail("a question was asked"))
    with pytest.raises(DataError) as caught:
        run(pipeline, root, tmp_path / "out")
    text = str(caught.value)
    assert str(root) in text
    assert bad in text
    if damage not in (" \ude00", "id"):  # those the reader finds, before any backbone is there
        assert text.startswith(f"gqa ({root}): 1 of 12 questions cannot be asked")
    text.encode()


def test_questions_already_answered_need_no_picture(pipeline, tmp_path: Path) -> None:
    root = write_mini_gqa(tmp_path / "gqa", questions=6, images=3)
    (first,) = run(pipeline, root, tmp_path / "out")
    image = root / "images" / "1.png"
    image.write_bytes(image.read_bytes()[:-300])
    (again,) = run(pipeline, root, tmp_path / "out")
    assert again.answers == first.answers


def test_what_only_the_processor_refuses_is_named_in_its_batch(pipeline, tmp_path, monkeypatch) -> None:
    strip = tmp_path / "strip.png"
    random_image(0).resize((90, 1)).save(strip)
    random_image(0).save(tmp_path / "0.png")
    questions = [
        Question(id=name, image=path, text="how many ?", answer="one", image_id=name, kind="")
        for name, path in (("a", tmp_path / "0.png"), ("b", strip), ("c", tmp_path / "0.png"))
    ]
    plain = type(pipeline.processor).__call__

    def refusing(processor, images=None, **options):
        if any(image.size[0] > 50 for image in images):
            raise ZeroDivisionError("no height")
        return plain(processor, images=images, **options)

    monkeypatch.setattr(type(pipeline.processor), "__call__", refusing)
    prompts = [question.text for question in questions]
    with pytest.raises(DataError, match=r"question 'b': question: ZeroDivisionError: no height") as caught:
        encode_questions(pipeline, questions, prompts)
    assert "1 of 3" in str(caught.value)


@pytest.mark.parametrize("text", ["how many <image> ?", "how many </s> ?", "how many \ud83d ?"])
def test_plugins_name_the_request(pipeline: Pipeline, text: str) -> None:
    answering = Answering.__new__(Answering)
    answering.pipeline = pipeline
    answering.config = PluginConfig(model=BackboneConfig(path="tiny"), max_new_tokens=3)
    answering.policy = parse_policies(("never",))[0]
    image = random_image(0)
    requests = [Request("good", "how many ?", (image,)), Request("bad", text, (image,))]
    with pytest.raises(DataError, match=r"1 of 2 questions cannot be asked(.|\n)*question 'bad'"):
        answering.answer(requests)
    assert len(answering.answer(requests[:1])) == 1
