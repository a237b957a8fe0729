"""MME's loader and scorer against the published table of readings and an independent scorer of result
files."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
from PIL import Image

from dyvte.errors import DataError, ScoreError
from dyvte.tasks.base import Predictions, get_benchmark
from dyvte.tasks.mme import read_answer


@pytest.fixture
def mme():
    return get_benchmark("mme")


def _flat(root: Path, subtask: str, name: str, answers=("Yes", "No"), extension=".png") -> None:
    folder = root / subtask
    folder.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (4, 4)).save(folder / f"{name}{extension}")
    _text(folder / f"{name}.txt", name, answers)


def _split(root: Path, subtask: str, name: str, answers=("Yes", "No")) -> None:
    images, texts = root / subtask / "images", root / subtask / "questions_answers_YN"
    images.mkdir(parents=True, exist_ok=True)
    texts.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (4, 4)).save(images / f"{name}.jpg")
    _text(texts / f"{name}.txt", name, answers)


def _text(path: Path, name: str, answers) -> None:
    lines = [f"Is {name} {i} here? Please answer yes or no.\t{answer}" for i, answer in enumerate(answers)]
    path.write_text("\n".join(lines))


@pytest.mark.parametrize(
    ("answer", "original", "lmms", "vlmevalkit"),
    [
        ("Yes", "yes", "yes", "yes"),
        ("No.", "no", "no", "no"),
        ("not sure", "no", "no", "other"),
        ("Nothing is there", "no", "no", "other"),
        ("None", "no", "no", "other"),
        ("Norway", "no", "no", "other"),
        ("yesterday", "yes", "yes", "other"),
        ("A Yes", "other", "other", "yes"),
        ("The answer is yes", "other", "other", "yes"),
        ("The answer is no", "other", "other", "no"),
        ("y", "other", "yes", "other"),
        ("n.", "other", "no", "other"),
        ("Yes and no", "yes", "yes", "other"),
        ("yes, it is", "yes", "yes", "yes"),
        ("(no)", "no", "no", "no"),
        ("", "other", "other", "other"),
        ("\n yes", "yes", "yes", "yes"),
    ],
)
def test_readings(answer, original, lmms, vlmevalkit):
    assert [read_answer(answer, d) for d in ("original", "lmms", "vlmevalkit")] == [
        original,
        lmms,
        vlmevalkit,
    ]


def test_a_result_line_is_read_as_it_stands():
    assert read_answer("    yes", "original", converted=True) == "other"


def _score_result_folder(folder: Path) -> dict[str, float]:
    """An independent scorer of official result files, from the rule's wording."""
    scores = {}
    for path in folder.glob("*.txt"):
        rows = [line.rstrip("\n").split("\t") for line in path.open(newline="\n")]
        right = []
        for _, _, gold, answer in rows:
            head = answer.lower()[0:4]
            guess = "yes" if head.find("yes") >= 0 else ("no" if head.find("no") >= 0 else None)
            right.append(guess == gold.lower())
        pairs = [right[i] and right[i + 1] for i in range(0, len(right), 2)]
        scores[path.stem] = 100 * (sum(right) / len(right) + sum(pairs) / len(pairs))
    return scores


def test_scores_equal_an_independent_scorer_of_the_result_files(mme, tmp_path):
    for subtask in ("existence", "OCR", "code_reasoning"):
        for i in range(6):
            _flat(tmp_path / "d", subtask, f"{i:04d}")
    for i in range(4):
        _split(tmp_path / "d", "artwork", f"{i:04d}", ("No", "Yes"))
    questions = mme.load(tmp_path / "d")
    rng = random.Random(0)
    noise = [
        "Yes",
        "No",
        "no.",
        "Yes, there is",
        "not sure",
        "maybe",
        "",
        "a\tno",
        "No\nyes",
        "The answer is yes",
    ]
    predictions = Predictions({q.id: rng.choice(noise) for q in questions})
    scores = mme.score(questions, predictions)
    reference = _score_result_folder(mme.write_submission(tmp_path, questions, predictions))
    assert {name: row["score"] for name, row in scores["per_subtask"].items()} == pytest.approx(reference)
    assert scores["perception"] == pytest.approx(
        reference["existence"] + reference["OCR"] + reference["artwork"]
    )
    assert scores["cognition"] == pytest.approx(reference["code_reasoning"])
    again = mme.score(questions, mme.read_predictions(tmp_path / "mme_results", questions))
    assert again["per_subtask"] == scores["per_subtask"]


def test_a_pair_half_right(mme, tmp_path):
    _flat(tmp_path, "count", "a")
    _flat(tmp_path, "count", "b")
    questions = mme.load(tmp_path)
    predictions = Predictions(dict(zip([q.id for q in questions], ["Yes", "No", "Yes", "Yes"], strict=True)))
    scores = mme.score(questions, predictions)
    assert scores["per_subtask"]["count"]["acc"] == 75.0
    assert scores["per_subtask"]["count"]["acc_plus"] == 50.0
    assert (scores["perception"], scores["perception_max"], scores["cognition_max"]) == (125.0, 200, 0)
    assert scores["perception_subtasks"] == ["count"]
    assert len(scores["missing_subtasks"]) == 13


def test_line_breaks_inside_answers_are_counted(mme, tmp_path):
    _flat(tmp_path, "count", "a")
    questions = mme.load(tmp_path)
    predictions = Predictions({questions[0].id: "yes\nindeed", questions[1].id: "no\n"})
    assert mme.score(questions, predictions)["num_answers_with_line_breaks"] == 1


def test_layouts_extra_level_and_limit(mme, tmp_path):
    root = tmp_path / "MME_Benchmark"
    _flat(root, "color", "1", extension=".jpg")
    _flat(root, "color", "2")
    _split(root, "landmark", "x")
    questions = mme.load(tmp_path)
    assert [q.id for q in questions] == [
        "color/1.jpg#1",
        "color/1.jpg#2",
        "color/2.png#1",
        "color/2.png#2",
        "landmark/x.jpg#1",
        "landmark/x.jpg#2",
    ]
    assert [q.image_id for q in mme.load(tmp_path, limit=4)] == ["color/1.jpg"] * 2 + ["landmark/x.jpg"] * 2
    assert all(q.image.is_file() for q in questions)


@pytest.mark.parametrize("space", [" ", "  "])
def test_prompt_drops_the_yes_no_request(mme, tmp_path, space):
    _flat(tmp_path, "color", "1")
    (tmp_path / "color" / "1.txt").write_text(f"Is it red?{space}Please answer yes or no.\tYes\nIs it?\tNo\n")
    first, second = mme.load(tmp_path)
    assert mme.prompt(first) == "Is it red?\nAnswer the question using a single word or phrase."
    assert (mme.prompt(first, ""), mme.prompt(second, "")) == ("Is it red?", "Is it?")


@pytest.mark.parametrize(
    ("answers", "message"),
    [
        (("Yes",), "1 questions, expected two"),
        (("Yes", "No", "No"), "3 questions, expected two"),
        (("Yes", "perhaps"), r"line 2: expected question<TAB>Yes\|No"),
    ],
)
def test_odd_pairs_and_odd_golds_are_refused(mme, tmp_path, answers, message):
    _flat(tmp_path, "color", "1", answers)
    with pytest.raises(DataError, match=message):
        mme.load(tmp_path)


def test_missing_image_unknown_subtask_and_wrong_folder(mme, tmp_path):
    with pytest.raises(DataError, match=r"(?s)no question file.*Expected:.*questions_answers_YN"):
        mme.load(tmp_path)
    _flat(tmp_path, "color", "1")
    (tmp_path / "color" / "2.txt").write_text("a\tYes\nb\tNo")
    with pytest.raises(DataError, match=r"lacks 1 images: .*2\.\*"):
        mme.load(tmp_path)
    (tmp_path / "color" / "2.txt").unlink()
    _flat(tmp_path, "colour", "1")
    with pytest.raises(DataError, match="not subtasks of MME: colour"):
        mme.load(tmp_path)


def test_missing_predictions_and_halved_pairs_are_named(mme, tmp_path):
    _flat(tmp_path, "color", "1")
    questions = mme.load(tmp_path)
    with pytest.raises(ScoreError, match=r"1 of 2 questions have no prediction: color/1.png#2"):
        mme.score(questions, Predictions({questions[0].id: "Yes"}))
    with pytest.raises(ScoreError, match=r"1 images have not exactly two questions: color/1\.png"):
        mme.score(questions[:1], Predictions({questions[0].id: "Yes"}))


def test_the_release_is_scored_without_its_images(mme, tmp_path):
    """Answers made where the images were, with ids that hold their endings, scored where they are not."""
    root = tmp_path / "mme"
    for number in range(4):
        _flat(root, "existence", f"{number}.a", extension=(".png", ".jpg")[number % 2])
        _split(root, "artwork", f"{number}")
    whole = mme.load(root)
    rng = random.Random(0)
    answers = {q.id: rng.choice(("Yes", "No")) for q in whole}
    file = tmp_path / "answers.jsonl"
    rows = [{"question_id": name, "prediction": text} for name, text in answers.items()]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    written = mme.write_submission(tmp_path / "official", whole, Predictions(answers))
    expected = mme.score(whole, Predictions(answers))
    for path in [*root.rglob("*.png"), *root.rglob("*.jpg")]:
        path.unlink()
    with pytest.raises(DataError, match="lacks 8 images"):
        mme.load(root)
    bare = mme.load(root, images=False)
    for source in (file, written):
        assert mme.score(bare, mme.read_predictions(source, bare)) == expected
    file.write_text("".join(json.dumps(row) + "\n" for row in rows[1:]))
    with pytest.raises(ScoreError, match="1 of 16 questions have no prediction"):
        mme.score(bare, mme.read_predictions(file, bare))
