"""TGIF-QA, the FrameQA test questions (Jang et al., 2017): short answers about animated GIFs.

The papers that use it (Video-ChatGPT, Video-LLaVA) have a language model judge the answers: the file which
``videollava/eval/video/eval_video_qa.py`` takes is written (lines of id, question, answer, pred). The own
metric is **exact match**, which no paper reports: the answer, normalised as VQA answers are, equals the gold
answer so normalised. It is labelled ``exact_match``; there is no other dialect.

That script's runner joins questions and answers by line; here they are joined by ``question_id`` where the
answers state it, else by line if there are as many.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dyvte.errors import DataError
from dyvte.readers.files import find_file
from dyvte.readers.rows import Row, read_jsonl, read_rows
from dyvte.readers.tables import read_tsv
from dyvte.readers.videos import find_video
from dyvte.tasks.answers.vqa import official_answer, remembering
from dyvte.tasks.base import TASKS, Benchmark, Predictions, Question
from dyvte.tasks.metrics import breakdown, percent
from dyvte.tasks.predictions import collected
from dyvte.tasks.writing import write_jsonl

_FOLDERS = ("frames", "mp4", "videos", "gifs", "")
_KINDS = ("object", "number", "color", "location")


@TASKS.register
class TGIFQA(Benchmark):
    """FrameQA, the part that video models are asked."""

    name = "tgifqa"
    title = "TGIF-QA"
    unit = "video"
    score_name = "exact match, %"
    headline_metrics = ("exact_match",)
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
        rows, answers = read_rows(path), read_rows(path.with_name("test_a.json"))
        by_id = all("question_id" in answer for answer in answers)
        if not by_id and len(answers) != len(rows):
            raise DataError(
                f"{path.parent}: {len(rows)} questions, {len(answers)} answers, and no ids to join by"
            )
        golds = {answer.identity("question_id"): answer for answer in answers} if by_id else {}
        questions = []
        for number, row in enumerate(rows):
            gold = golds.get(row.identity("question_id"), Row({}, row.where)) if by_id else answers[number]
            found = {"answer": gold.value("answer"), "type": gold.value("type")}
            questions.append(_question(Row({**row, **found}, row.where), path.parent))
        return questions

    def _release(self, root: Path) -> list[Question] | None:
        path = find_file(root, "Test_frameqa_question.csv", "dataset/Test_frameqa_question.csv")
        if path is None:
            return None
        named = {"gif_name": "video_name", "vid_id": "question_id"}
        rows = [
            Row({named.get(key, key): value for key, value in row.items()}, row.where)
            for row in read_tsv(path, keep_words=True)
        ]
        return [_question(row, root if root.is_dir() else root.parent) for row in rows]

    def hits(self, questions: Sequence[Question], predictions: Predictions, dialect: str) -> list[bool]:
        """Exact match of normalised answers."""
        normalise = remembering(official_answer)
        return [normalise(predictions.texts[q.id]) == normalise(str(q.answer)) for q in questions]

    def metrics(
        self, questions: Sequence[Question], hits: Sequence[bool], predictions: Predictions, dialect: str
    ) -> dict[str, Any]:
        """Exact match in percent, and by what is asked for."""
        return {"exact_match": percent(hits), "per_kind": breakdown([q.kind for q in questions], hits)}

    def headline(self, scores: Mapping[str, Any]) -> str:
        """Exact match with one decimal, so labelled."""
        return f"{super().headline(scores)} (exact match)"

    def read_predictions(self, path: Path, questions: Sequence[Question]) -> Predictions:
        """Raw answers, or lines with ``id`` and ``pred``."""
        path = Path(path)
        rows = read_jsonl(path) if path.suffix.lower() == ".jsonl" else []
        if rows and all("pred" in row for row in rows):
            return collected(rows, ("id",), ("pred",), converted=True)
        return super().read_predictions(path, questions)

    def write_submission(self, folder: Path, questions: Sequence[Question], predictions: Predictions) -> Path:
        """Write lines of id, question, answer and pred for ``eval_video_qa.py``."""
        rows = [
            {"id": q.id, "question": q.text, "answer": q.answer, "pred": predictions.texts[q.id].strip()}
            for q in questions
        ]
        return write_jsonl(Path(folder) / self.submission_name, rows)


def _question(row: Row, base: Path) -> Question:
    name, kind = row.identity("video_name"), row.identity("type", default="")
    return Question(
        id=row.identity("question_id"),
        image=None,
        text=row.text("question"),
        answer=row.text("answer", default=None),
        image_id=name,
        kind=_KINDS[int(kind)] if kind in ("0", "1", "2", "3") else kind,
        video=find_video(row, [base / folder for folder in _FOLDERS], name),
    )
