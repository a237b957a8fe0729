"""TGIF-QA, the FrameQA test questions (Jang et al., 2017): short answers about animated GIFs.

The papers that use it (Video-ChatGPT, Video-LLaVA) have a language model judge the answers: the file which
``videollava/eval/video/eval_video_qa.py`` takes is written (lines of id, question, answer, pred). The own
figure is **exact match** and no paper's figure: the answer, normalised as VQA answers are, equals the gold
answer so normalised. It is labelled ``exact_match``; there is no other dialect.

That script's runner joins questions and answers by line; here they are joined by ``question_id`` where the
answers state it, else by line if there are as many.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dyvte.errors import DataError
from dyvte.tasks.answers.vqa import official_answer
from dyvte.tasks.base import (
    Predictions,
    Question,
    percent,
    predictions_from_rows,
    read_json,
    read_jsonl,
)
from dyvte.tasks.common import StandardBenchmark, breakdown, write_jsonl
from dyvte.tasks.readers.files import find_file, need
from dyvte.tasks.readers.tables import read_tsv
from dyvte.tasks.readers.videos import find_video

_FOLDERS = ("frames", "mp4", "videos", "gifs", "")
_KINDS = ("object", "number", "color", "location")


class TGIFQA(StandardBenchmark):
    """FrameQA, the part that video models are asked."""

    name = "tgifqa"
    title = "TGIF-QA"
    unit = "video"
    score_name = "exact match, %"
    dialects = ("original",)
    submission_name = "tgifqa_results.jsonl"
    expected_tree = (
        "  <root>/                              Video-LLaVA's GPT_Zero_Shot_QA/TGIF_Zero_Shot_QA\n"
        "    test_q.json, test_a.json\n"
        "    mp4/<video_name>.mp4               (or .gif)\n"
        "  or <root>/                           release\n"
        "    Test_frameqa_question.csv          (tab-separated; or in dataset/)\n"
        "    gifs/<gif_name>.gif\n"
        "  with frames/<name>/0001.jpg ... in place of videos, if extracted beforehand"
    )

    def sources(self):
        """The two question files."""
        return self._zero_shot, self._release

    def _zero_shot(self, root: Path) -> list[Question] | None:
        path = find_file(root, "test_q.json")
        if path is None:
            return None
        rows, answers = read_json(path), read_json(path.with_name("test_a.json"))
        by_id = all("question_id" in answer for answer in answers)
        if not by_id and len(answers) != len(rows):
            raise DataError(
                f"{path.parent}: {len(rows)} questions, {len(answers)} answers, and no ids to join by"
            )
        golds = {str(a["question_id"]): a for a in answers} if by_id else {}
        joined = []
        for number, row in enumerate(rows):
            need(row, ("question_id", "question", "video_name"), path, number)
            gold = golds.get(str(row["question_id"]), {}) if by_id else answers[number]
            joined.append({**row, "answer": gold.get("answer"), "type": gold.get("type", row.get("type"))})
        return _questions(joined, path.parent)

    def _release(self, root: Path) -> list[Question] | None:
        path = find_file(root, "Test_frameqa_question.csv", "dataset/Test_frameqa_question.csv")
        if path is None:
            return None
        rows = [
            {**row, "video_name": row.get("gif_name"), "question_id": row.get("vid_id")}
            for row in read_tsv(path)
        ]
        return _questions(rows, root if root.is_dir() else root.parent)

    def hits(self, questions: Sequence[Question], predictions: Predictions, dialect: str) -> list[bool]:
        """Exact match of normalised answers."""
        return [official_answer(predictions.texts[q.id]) == official_answer(str(q.answer)) for q in questions]

    def figures(
        self, questions: Sequence[Question], hits: Sequence[bool], predictions: Predictions, dialect: str
    ) -> dict[str, Any]:
        """Exact match in percent, and by what is asked for."""
        return {"exact_match": percent(hits), "per_kind": breakdown([q.kind for q in questions], hits)}

    def headline(self, scores: Mapping[str, Any]) -> str:
        """Exact match with one decimal, so labelled."""
        return f"{scores['exact_match']:.1f} (exact match)"

    def read_predictions(self, path: Path, questions: Sequence[Question]) -> Predictions:
        """Raw answers, or lines with ``id`` and ``pred``."""
        rows = read_jsonl(Path(path)) if Path(path).suffix == ".jsonl" else []
        if rows and all(isinstance(row, Mapping) and "pred" in row for row in rows):
            return predictions_from_rows(rows, Path(path), "id", ("pred",), converted=True)
        return super().read_predictions(path, questions)

    def write_submission(self, folder: Path, questions: Sequence[Question], predictions: Predictions) -> Path:
        """Write lines of id, question, answer and pred for ``eval_video_qa.py``."""
        rows = [
            {"id": q.id, "question": q.text, "answer": q.answer, "pred": predictions.texts[q.id].strip()}
            for q in questions
        ]
        return write_jsonl(Path(folder) / self.submission_name, rows)


def _questions(rows: Sequence[Mapping[str, Any]], base: Path) -> list[Question]:
    folders = [base / name for name in _FOLDERS]
    questions = []
    for number, row in enumerate(rows):
        need(row, ("question_id", "question", "video_name"), base, number)
        video = find_video(folders, str(row["video_name"]))
        kind = str(row.get("type", ""))
        questions.append(
            Question(
                id=str(row["question_id"]),
                image=None,
                text=row["question"],
                answer=None if row.get("answer") is None else str(row["answer"]),
                image_id=str(row["video_name"]),
                kind=_KINDS[int(kind)] if kind in ("0", "1", "2", "3") else kind,
                video=video,
            )
        )
    return questions
