"""Questions that cannot be asked: named with benchmark, file and id before anything is asked."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from dyvte.backbones import BackboneConfig, get_template
from dyvte.errors import DataError
from dyvte.evaluation.askable import unaskable, without_unaskable
from dyvte.evaluation.generation import Pipeline, encode_questions
from dyvte.evaluation.metrics import cost_metrics
from dyvte.evaluation.runner import EvalConfig, load_questions, run_policies
from dyvte.evaluation.scores import RunScores
from dyvte.evaluation.settings import parse_policies
from dyvte.plugins.answering import Answering, PluginConfig, Request, request_of
from dyvte.readers.videos import Video
from dyvte.reporting.tables import results_table
from dyvte.tasks.base import Predictions, Question, get_benchmark
from tests.helpers.fixtures import write_mini_gqa
from tests.helpers.models import random_image, tiny_llava


@pytest.fixture(scope="module")
def pipeline() -> Pipeline:
    model, processor = tiny_llava(3)
    return Pipeline(model, processor, get_template("chat", processor), max_new_tokens=3)


def run(pipeline: Pipeline, root: Path, output: Path, max_bad_samples: int = 0):
    config = EvalConfig(
        model=BackboneConfig(path="tiny"),
        benchmark="gqa",
        data=root,
        output=output,
        question_suffix="",
        timing_batches=0,
        max_bad_samples=max_bad_samples,
    )
    benchmark = get_benchmark("gqa")
    questions = load_questions(benchmark, root, None, max_bad_samples)
    return run_policies(pipeline, benchmark, questions, parse_policies(("never", "fixed:1")), config)


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
        count = 3 if damage in ("torn", "text") else 1  # the image is that of three questions
        assert text.startswith(f"gqa ({root}): {count} of 12 questions cannot be asked, 0 allowed")
    text.encode()


def test_questions_already_answered_need_no_picture(pipeline, tmp_path: Path) -> None:
    root = write_mini_gqa(tmp_path / "gqa", questions=6, images=3)
    first, _ = run(pipeline, root, tmp_path / "out")
    image = root / "images" / "1.png"
    image.write_bytes(image.read_bytes()[:-300])
    again, _ = run(pipeline, root, tmp_path / "out")
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


# --- within the allowance ---


@pytest.mark.parametrize("damage", ["torn", "gone", " </s>", " \ude00", "id"])
def test_within_the_allowance_a_bad_question_counts_as_answered_with_nothing(
    pipeline, tmp_path: Path, damage: str, monkeypatch
) -> None:
    whole = run(pipeline, write_mini_gqa(tmp_path / "whole", questions=12, images=4), tmp_path / "before")
    root, bad = damaged(tmp_path / "gqa", "torn" if damage == "gone" else damage)
    bad = ["00001", "00005", "00009"] if damage in ("torn", "gone") else [bad]
    if damage == "gone":
        (root / "images" / "1.png").unlink()
    refusal = rf"{len(bad)} of 12 questions cannot be asked, {len(bad) - 1} allowed|lacks 1 images|half of a"
    with pytest.raises(DataError, match=refusal):
        run(pipeline, root, tmp_path / "strict", max_bad_samples=len(bad) - 1)
    results = run(pipeline, root, tmp_path / "out", max_bad_samples=len(bad))

    benchmark = get_benchmark("gqa")
    questions = load_questions(benchmark, root, None, len(bad))
    assert f"{len(bad)} questions could not be asked" in results_table(results)
    for result, before in zip(results, whole, strict=True):
        rest = [one for one in result.answers if one.question_id not in bad]
        known = {one.question_id: one.prediction for one in before.answers}
        same = {one.id: "" if one.id in bad else known[one.id] for one in questions}
        assert {one.question_id: one.prediction for one in result.answers} == same
        assert result.scores.scores == benchmark.score(questions, Predictions(same))
        assert result.scores.scores["num_questions"] == 12
        # the others' compute, not diluted by questions that cost nothing
        assert result.scores.cost == cost_metrics(pipeline.model.config, rest)
        stored = RunScores.read(result.folder)
        assert sorted(stored.unanswered) == bad
        fields = {text.split(":")[0] for text in stored.unanswered.values()}
        assert fields <= {"image", "text", "question", "id"}
        rows = [json.loads(line) for line in (result.folder / "exits.jsonl").read_text().splitlines()]
        assert [row["question_id"] for row in rows if "problem" in row] == bad

    monkeypatch.setattr(pipeline.model, "generate", lambda **_: pytest.fail("a question was asked again"))
    again = run(pipeline, root, tmp_path / "out", max_bad_samples=len(bad))
    assert [one.answers for one in again] == [one.answers for one in results]
    refusal = rf"{len(bad)} of 12 questions cannot be asked, 0 allowed|lacks|half of a"
    with pytest.raises(DataError, match=refusal):
        run(pipeline, root, tmp_path / "out")  # what was tolerated once is not forgotten


def test_same_answer_is_of_the_questions_that_were_asked(pipeline, tmp_path: Path) -> None:
    root, _ = damaged(tmp_path / "gqa", "torn")
    never, fixed = run(pipeline, root, tmp_path / "out", max_bad_samples=3)
    asked = [i for i, one in enumerate(never.answers) if not one.problem]
    same = sum(never.answers[i].prediction == fixed.answers[i].prediction for i in asked)
    assert fixed.scores.same_answer_as_never == pytest.approx(same / 9)


def question(name: str, image: Path | None, **others) -> Question:
    plain = {"text": "how many ?", "answer": "one", "image_id": name, "kind": ""}
    return Question(id=name, image=image, **{**plain, **others})


def test_what_video_decoder_and_image_processor_refuse_counts_too(pipeline, tmp_path, monkeypatch) -> None:
    strip, good = tmp_path / "strip.png", tmp_path / "good.png"
    random_image(0).resize((90, 1)).save(strip)
    random_image(0).save(good)
    (tmp_path / "frames").mkdir()
    questions = [
        question("good", good),
        question("strip", strip),
        question("strip too", strip),
        question("video", None, video=Video(tmp_path / "frames")),
        question("nothing", None),
    ]
    plain = type(pipeline.processor).__call__

    def refusing(processor, images=None, **options):
        if any(image.size[0] > 50 for image in images):
            raise ZeroDivisionError("no height")
        return plain(processor, images=images, **options)

    monkeypatch.setattr(type(pipeline.processor), "__call__", refusing)
    found = unaskable(pipeline, questions, [one.text for one in questions], "here", 4)
    assert set(found) == {"strip", "strip too", "video", "nothing"}
    assert "ZeroDivisionError" in found["strip too"]
    assert "holds no frame" in found["video"]
    with pytest.raises(DataError, match="4 of 5 questions cannot be asked, 3 allowed"):
        unaskable(pipeline, questions, [one.text for one in questions], "here", 3)


def test_studies_exclude_whole_images(pipeline, tmp_path: Path) -> None:
    """MME scores the two questions of an image together: without one, the other is of no use."""
    random_image(0).save(tmp_path / "a.png")
    random_image(1).save(tmp_path / "b.png")
    questions = [
        question("a1", tmp_path / "a.png", image_id="a"),
        question("a2", tmp_path / "a.png", image_id="a", text="how </s> many ?"),
        question("b1", tmp_path / "b.png", image_id="b"),
    ]
    prompts = [one.text for one in questions]
    kept, problems = without_unaskable(pipeline, questions, prompts, "here", 1)
    assert [one.id for one in kept] == ["b1"]
    assert list(problems) == ["a2"]
    assert without_unaskable(pipeline, questions, prompts, "here", 0) == (questions, {})


# --- plug-ins ---


def answering_of(pipeline: Pipeline, max_bad_samples: int = 0) -> Answering:
    answering = Answering.__new__(Answering)
    answering.pipeline = pipeline
    settings = {"max_new_tokens": 3, "max_bad_samples": max_bad_samples}
    answering.config = PluginConfig(model=BackboneConfig(path="tiny"), **settings)
    answering.policy = parse_policies(("never",))[0]
    answering._num_asked, answering._unusable = 0, []
    return answering


def test_plugins_answer_tolerated_requests_with_nothing(pipeline: Pipeline, caplog) -> None:
    image, answering = random_image(0), answering_of(pipeline, 2)

    def torn() -> Request:
        raise OSError("image file is truncated")

    good = Request("same id", "how many ?", (image,))
    requests = [good, Request("same id", "how </s> many ?", (image,)), request_of("torn", torn)]
    answers = answering.answer(requests)
    assert [bool(one.problem) for one in answers] == [False, True, True]
    assert [one.prediction for one in answers[1:]] == ["", ""]
    assert answers[0].prediction == answering_of(pipeline).answer([good])[0].prediction
    assert "request torn cannot be asked" in caplog.text
    with pytest.raises(DataError, match=r"3 of 4 questions cannot be asked, 2 allowed(.|\n)*truncated"):
        answering.answer([request_of("torn too", torn)])  # counted over all calls


@pytest.mark.parametrize("text", ["how many <image> ?", "how many </s> ?", "how many \ud83d ?"])
def test_plugins_name_the_request(pipeline: Pipeline, text: str) -> None:
    answering = answering_of(pipeline)
    image = random_image(0)
    requests = [Request("good", "how many ?", (image,)), Request("bad", text, (image,))]
    with pytest.raises(DataError, match=r"1 of 2 questions cannot be asked(.|\n)*question 'bad'"):
        answering.answer(requests)
    assert len(answering.answer(requests[:1])) == 1
