"""Videos as frames, Video-MME's readings, TGIF-QA's exact match, MM-Vet's grades."""

from __future__ import annotations

import json
import sys

import pytest

from dyvte.errors import ConfigError, DataError, ScoreError
from dyvte.evaluation.generation import question_images
from dyvte.readers.rows import Row
from dyvte.readers.videos import Video, find_video, read_frames, uniform_indices
from dyvte.tasks.base import Predictions, get_benchmark
from dyvte.tasks.videomme import read_answer
from tests.helpers.benchmark_files import picture, put, put_frames, put_gif, write_benchmark
from tests.helpers.mutations import mutated, seeded

ROW = Row({}, "rows.json, row 1")


@pytest.mark.parametrize(
    ("there", "wanted", "indices"),
    [(10, 4, [0, 3, 6, 9]), (8, 8, list(range(8))), (3, 8, [0, 1, 2]), (100, 3, [0, 49, 99]), (9, 1, [0])],
)
def test_uniform_frames(there, wanted, indices):
    assert uniform_indices(there, wanted) == indices


def test_frames_of_a_folder_are_in_the_order_of_their_numbers(tmp_path):
    put_frames(tmp_path / "v", 12)
    frames = read_frames(Video(tmp_path / "v"), 3)
    expected = [read_frames(Video(one), 1)[0] for one in _one_frame_folders(tmp_path, (1, 6, 12))]
    assert [f.tobytes() for f in frames] == [e.tobytes() for e in expected]


def _one_frame_folders(tmp_path, numbers):
    for n in numbers:
        put(tmp_path / f"only{n}" / "a.png", picture(n))
        yield tmp_path / f"only{n}"


def test_gifs_need_no_decoder(tmp_path):
    put_gif(tmp_path / "a.gif", 5)
    frames = read_frames(Video(tmp_path / "a.gif"), 3)
    assert [frame.getpixel((0, 0))[0] for frame in frames] == pytest.approx([0, 100, 200], abs=8)


def test_damaged_gifs_are_frames_or_a_named_error(tmp_path):
    draw, path = seeded(20260407), tmp_path / "a.gif"
    put_gif(path, 5)
    whole, refusals = path.read_bytes(), []
    for _ in range(150):
        path.write_bytes(mutated(whole, draw))
        try:
            assert read_frames(Video(path), 3)
        except DataError as error:
            refusals.append(str(error))
    assert 0 < len(refusals) < 150
    assert all(str(path) in text for text in refusals)


def test_a_video_file_without_a_decoder_says_what_to_do(tmp_path, monkeypatch):
    put(tmp_path / "clip.mp4", b"not a video")
    for module in ("av", "decord"):
        monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ConfigError, match=r"pip install av .*folder of images named clip/"):
        read_frames(Video(tmp_path / "clip.mp4"), 4)


def test_videos_are_found_by_name_and_never_outside(tmp_path):
    put(tmp_path / "data" / "x.MP4", b"")
    put_frames(tmp_path / "frames" / "x", 2)
    folders = [tmp_path / "frames", tmp_path / "data"]
    assert find_video(ROW, folders, "x") == Video(tmp_path / "frames" / "x")
    assert find_video(ROW, folders[1:], "x") == Video(tmp_path / "data" / "x.MP4")
    assert not find_video(ROW, folders, "y").path.exists()
    for name in ("../frames", "", ".."):
        with pytest.raises(DataError, match="no video name"):
            find_video(ROW, folders, name)
    (tmp_path / "frames" / "empty").mkdir()
    with pytest.raises(DataError, match="holds no frame"):
        read_frames(Video(tmp_path / "frames" / "empty"), 2)


@pytest.mark.parametrize(
    ("answer", "original", "lmms", "vlmevalkit"),
    [
        ("B", "B", "B", "B"),
        ("b", "", "", ""),
        ("B. dog", "B", "B", "B"),
        ("The best answer is B.", "B", "B", "B"),
        ("Answer: C", "C", "C", "C"),
        # the first capital of A to D, wherever it stands
        ("The correct answer: B", "B", "B", "B"),
        ("Dog or (B)", "D", "B", "D"),
        ("Considering all, B", "C", "B", "C"),
        ("The correct option is A", "A", "A", "A"),
        ("maybe", "", "", ""),
        ("", "", "", ""),
    ],
)
def test_videomme_readings(answer, original, lmms, vlmevalkit):
    assert [read_answer(answer, d) for d in ("original", "lmms", "vlmevalkit")] == [
        original,
        lmms,
        vlmevalkit,
    ]


def test_videomme_leaves_unread_answers_out_as_its_tool_does_and_says_so(tmp_path):
    benchmark = get_benchmark("videomme")
    questions = benchmark.load(write_benchmark(tmp_path / "d", "videomme", "parquet"))
    predictions = Predictions({q.id: a for q, a in zip(questions, ["B", "C", "none of these"])})
    scores = {d: benchmark.score(questions, predictions, d) for d in benchmark.dialects}
    assert {d: s["accuracy"] for d, s in scores.items()} == {
        "original": 50.0,
        "lmms": pytest.approx(100 / 3),
        "vlmevalkit": pytest.approx(100 / 3),
    }
    assert scores["original"]["num_unread"] == 1
    assert scores["original"]["accuracy_of_all"] == pytest.approx(100 / 3)
    assert scores["original"]["per_duration"] == {"short": {"accuracy": 50.0, "num_questions": 2}}
    filled = json.loads(benchmark.write_submission(tmp_path, questions, predictions).read_text())
    assert [v["video_id"] for v in filled] == ["000", "001"]
    assert filled[0]["questions"][1]["response"] == "C"
    assert filled[0]["questions"][1]["options"][0] == "A. one"
    assert len(question_images(questions[0], 4)) == 4


def test_tgif_exact_match_is_labelled_and_the_grader_gets_its_lines(tmp_path):
    benchmark = get_benchmark("tgifqa")
    questions = benchmark.load(write_benchmark(tmp_path / "d", "tgifqa", "zero_shot"))
    predictions = Predictions({"FRAMEQA0": "Red.", "FRAMEQA1": "2 men"})
    scores = benchmark.score(questions, predictions)
    assert scores["exact_match"] == 50
    assert "accuracy" not in scores
    assert benchmark.headline(scores) == "50.0 (exact match)"
    assert scores["per_kind"]["color"]["accuracy"] == 100
    assert benchmark.score(questions, Predictions({"FRAMEQA0": "blue", "FRAMEQA1": "2"}))["exact_match"] == 50
    line = benchmark.write_submission(tmp_path, questions, predictions).read_text().split("\n")[0]
    assert json.loads(line) == {
        "id": "FRAMEQA0",
        "question": "what is the color of the hat ?",
        "answer": "red",
        "pred": "Red.",
    }


def test_tgif_answers_without_ids_are_joined_by_line_if_as_many(tmp_path):
    root = write_benchmark(tmp_path, "tgifqa", "zero_shot")
    put(root / "test_a.json", [{"answer": "green"}, {"answer": "five"}])
    assert [q.answer for q in get_benchmark("tgifqa").load(root)] == ["green", "five"]
    put(root / "test_a.json", [{"answer": "green"}])
    with pytest.raises(DataError, match="2 questions, 1 answers, and no ids"):
        get_benchmark("tgifqa").load(root)


def test_mmvet_is_graded_elsewhere_and_takes_the_grades_back(tmp_path):
    benchmark = get_benchmark("mmvet")
    questions = benchmark.load(write_benchmark(tmp_path / "d", "mmvet", "release"))
    answers = Predictions({"v1_0": "x is 5", "v1_1": "grade:1.0"})
    scores = benchmark.score(questions, answers)
    assert scores["graded"] is False
    assert "accuracy" not in scores
    with pytest.raises(ScoreError, match="graded by a language model"):
        benchmark.correct(questions, answers)
    path = benchmark.write_submission(tmp_path, questions, answers)
    assert json.loads(path.read_text()) == {"v1_0": "x is 5", "v1_1": "grade:1.0"}
    llava = tmp_path / "answers.jsonl"
    llava.write_text('{"question_id": 0, "text": "a"}\n{"question_id": 1, "text": "b"}\n')
    assert benchmark.read_predictions(llava, questions).texts == {"v1_0": "a", "v1_1": "b"}
    grades = {"v1_0": {"model": [], "content": [], "score": [0.2, 0.4]}, "v1_1": {"score": [1.0]}}
    put(tmp_path / "grade.json", grades)
    graded = benchmark.score(questions, benchmark.read_predictions(tmp_path / "grade.json", questions))
    assert graded["accuracy"] == pytest.approx(65)
    assert graded["per_capability"] == {
        "math": pytest.approx(30),
        "ocr": pytest.approx(30),
        "rec": pytest.approx(100),
    }
    put(tmp_path / "grade.json", {**grades, "v1_1": "b"})
    with pytest.raises(ScoreError, match="1 questions have no grade: v1_1"):
        benchmark.score(questions, benchmark.read_predictions(tmp_path / "grade.json", questions))
