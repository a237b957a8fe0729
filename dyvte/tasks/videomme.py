"""Video-MME (Fu et al., 2024): multiple-choice questions about 900 videos, without subtitles.

Sources: ``eval_your_results.py`` of the benchmark, seen in public copies (``original``);
``lmms_eval/tasks/videomme/utils.py`` (``lmms``); ``vlmeval/dataset/utils/videomme.py`` with exact matching
(``vlmevalkit``). The official tool leaves answers in which it finds no letter out of the denominator:
``accuracy`` under ``original`` is that figure, ``num_unread`` says how many those are, and
``accuracy_of_all`` counts them wrong. VLMEvalKit would ask a language model about them, or draw an option;
here they are wrong.

The question is put as lmms-eval puts it; frames are sampled uniformly, see :mod:`dyvte.tasks.readers.videos`.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dyvte.errors import DataError
from dyvte.tasks.answers.choices import lmms_letter, parse_list
from dyvte.tasks.base import LETTER_SUFFIX, Predictions, Question, percent, read_json
from dyvte.tasks.common import StandardBenchmark, breakdown
from dyvte.tasks.readers.files import find_file, need, table_rows
from dyvte.tasks.readers.videos import find_video

_REQUEST = (
    "Select the best answer to the following multiple-choice question based on the video. "
    "Respond with only the letter (A, B, C, or D) of the correct option."
)
_FOLDERS = ("frames", "data", "video", "videos", "")
# two pairs of neighbours are one string in the tools: a comma is missing there
_PREFIXES = (
    *("The best answer is", "The correct answer is", "The answer is", "The answer"),
    *("The best option isThe correct option is", "Best answer:Best option:", "Answer:", "Option:"),
)
_OFFICIAL_PREFIXES = (*_PREFIXES, "The correct answer", "The correct option")


class VideoMME(StandardBenchmark):
    """All durations, without subtitles."""

    name = "videomme"
    title = "Video-MME"
    unit = "video"
    suffix = LETTER_SUFFIX
    submission_name = "videomme_results.json"
    expected_tree = (
        "  <root>/\n"
        "    videomme/test-*.parquet                 (or test-*.parquet, Video-MME.tsv, or the release's\n"
        "                                             output_test_template.json)\n"
        "    data/<videoID>.mp4                      (or video/, videos/)\n"
        "    or frames/<videoID>/0001.jpg ...        (frames extracted beforehand, in order of their numbers)"
    )

    def sources(self):
        """The release's template, tables."""
        return self._template, self._table

    def _template(self, root: Path) -> list[Question] | None:
        path = find_file(root, "output_test_template.json")
        if path is None:
            return None
        rows = [
            {
                **{key: video.get(key) for key in ("video_id", "duration", "domain", "sub_category")},
                **question,
            }
            | {"videoID": _video_id(video)}
            for video in read_json(path)
            for question in video["questions"]
        ]
        return _questions(rows, path)

    def _table(self, root: Path) -> list[Question] | None:
        patterns = ("videomme/test-*.parquet", "test-*.parquet", "*.parquet")
        rows = table_rows(root, ("Video-MME.tsv", "*.tsv"), patterns)
        return None if rows is None else _questions(rows, root)

    def hits(self, questions: Sequence[Question], predictions: Predictions, dialect: str) -> list[bool]:
        """Read letter equals gold."""
        return [read_answer(predictions.texts[q.id], dialect) == q.answer for q in questions]

    def figures(
        self, questions: Sequence[Question], hits: Sequence[bool], predictions: Predictions, dialect: str
    ) -> dict[str, Any]:
        """Accuracy in percent, by duration, domain and task, over what the tool of the dialect counts."""
        read = [read_answer(predictions.texts[q.id], dialect) != "" for q in questions]
        counted = [n for n in range(len(questions)) if dialect != "original" or read[n]]
        kept = [hits[n] for n in counted]
        return {
            "accuracy": percent(kept),
            "accuracy_of_all": percent(hits),
            "num_unread": read.count(False),
            **{
                f"per_{part}": breakdown([questions[n].details[part] for n in counted], kept)
                for part in ("duration", "domain", "sub_category", "task_type")
            },
        }

    def submission(self, questions: Sequence[Question], predictions: Predictions) -> Any:
        """The official template with the field ``response`` filled in."""
        videos: dict[str, list[Question]] = defaultdict(list)
        for q in questions:
            videos[q.image_id].append(q)
        return [
            {
                "video_id": own[0].details["video_id"],
                **{part: own[0].details[part] for part in ("duration", "domain", "sub_category")},
                "questions": [
                    {
                        "question_id": q.id,
                        "task_type": q.details["task_type"],
                        "question": q.details["question"],
                        "options": list(q.details["options"]),
                        "answer": q.answer,
                        "response": predictions.texts[q.id],
                    }
                    for q in own
                ],
            }
            for own in videos.values()
        ]

    def read_submission(self, path: Path, questions: Sequence[Question]) -> Predictions:
        """Responses of the filled template."""
        content = read_json(path)
        try:
            texts = {
                str(q["question_id"]): str(q["response"]) for video in content for q in video["questions"]
            }
        except (TypeError, KeyError) as error:
            raise DataError(f"{path}: expected the official template with responses: {error!r}") from error
        return Predictions(texts, converted=True)


def read_answer(text: str, dialect: str) -> str:
    """The letter a tool finds, "" for none.

    ``original`` and ``vlmevalkit``: known beginnings such as "The best answer is" dropped, the first capital
    A to D anywhere, also within a word. ``lmms``: :func:`~dyvte.tasks.answers.choices.lmms_letter`.
    """
    if dialect == "lmms":
        return lmms_letter(text.strip(), "ABCD")
    text = text.strip()
    for prefix in _OFFICIAL_PREFIXES if dialect == "original" else _PREFIXES:
        text = text.replace(prefix, "")
    match = re.search("[ABCD]", text)
    return match[0] if match else ""


def _video_id(video: Mapping[str, Any]) -> str:
    """YouTube id, by which files are named: the template states it in the address only."""
    return str(video.get("videoID") or str(video.get("url", "")).split("v=")[-1] or video.get("video_id"))


def _questions(rows: Sequence[Mapping[str, Any]], where: Path) -> list[Question]:
    base = where.parent if where.is_file() else where
    folders = [base / name for name in _FOLDERS]
    questions = []
    for number, row in enumerate(rows):
        need(row, ("question", "answer"), where, number)
        name = str(row.get("videoID") or row.get("video") or "")
        video = find_video(folders, name)
        questions.append(_question(row, number, name, video))
    return questions


def _question(row: Mapping[str, Any], number: int, name: str, video: Any) -> Question:
    identity = str(row.get("question_id", row.get("index", number)))
    options = parse_list(row.get("options", row.get("candidates")), f"question {identity}")
    answer = str(row["answer"]).strip()
    if answer not in ("A", "B", "C", "D"):
        raise DataError(f"question {identity}: gold answer {answer!r} is none of A, B, C, D")
    parts = ("duration", "domain", "sub_category", "task_type")
    return Question(
        id=identity,
        image=None,
        text="\n".join([_REQUEST, row["question"], *options]),
        answer=answer,
        image_id=name,
        kind=str(row.get("duration") or ""),
        details={
            **{part: str(row.get(part) or "") for part in parts},
            "video_id": str(row.get("video_id") or name),
            "question": row["question"],
            "options": tuple(options),
        },
        video=video,
    )
