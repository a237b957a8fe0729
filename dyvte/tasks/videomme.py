"""Video-MME (Fu et al., 2024): multiple-choice questions about 900 videos, without subtitles.

Sources: ``eval_your_results.py`` of the benchmark, seen in public copies (``original``);
``lmms_eval/tasks/videomme/utils.py`` (``lmms``); ``vlmeval/dataset/utils/videomme.py`` with exact matching
(``vlmevalkit``). The official tool excludes answers in which it finds no letter from the denominator:
``accuracy`` under ``original`` is that score, ``num_unread`` says how many those are, and
``accuracy_of_all`` counts them wrong. VLMEvalKit would ask a language model about them, or draw an option;
here they are wrong.

The question is put as lmms-eval puts it; frames are sampled uniformly, see :mod:`dyvte.readers.videos`.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dyvte.readers.files import find_file
from dyvte.readers.rows import Row, read_rows
from dyvte.readers.videos import find_video
from dyvte.tasks.answers.choices import lmms_letter
from dyvte.tasks.base import TASKS, Predictions, Question
from dyvte.tasks.choices import ChoiceBenchmark, gold_letter, listed_options
from dyvte.tasks.metrics import breakdown, percent
from dyvte.tasks.predictions import collected

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


@TASKS.register
class VideoMME(ChoiceBenchmark):
    """All durations, without subtitles."""

    name = "videomme"
    title = "Video-MME"
    unit = "video"
    submission_name = "videomme_results.json"
    expected_tree = (
        "  <root>/\n"
        "    videomme/test-*.parquet                 (or test-*.parquet, Video-MME.tsv, or the release's\n"
        "                                             output_test_template.json)\n"
        "    data/<videoID>.mp4                      (or video/, videos/)\n"
        "    or frames/<videoID>/0001.jpg ...        (frames extracted beforehand, in order of their numbers)"
    )

    tables = ("Video-MME.tsv", "*video*mme*.tsv")
    shards = ("videomme/test-*.parquet", "test-*.parquet", "*.parquet")
    columns = (("question",), ("answer",), ("options", "candidates"), ("videoID", "video"))

    def sources(self):
        """The release's template, tables."""
        return self._template, self.table

    def _template(self, root: Path) -> list[Question] | None:
        path = find_file(root, "output_test_template.json")
        if path is None:
            return None
        return [
            _question(Row({**_about(video), **row}, row.where), str(number), path.parent)
            for video in read_rows(path)
            for number, row in enumerate(video.rows("questions"))
        ]

    def table_question(self, row: Row, number: int, base: Path) -> Question:
        """As in the release."""
        return _question(row, str(number - 1), base)

    def read(self, text: str, question: Question, dialect: str) -> str:
        """See :func:`read_answer`."""
        return read_answer(text, dialect)

    def metrics(
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
                        "options": list(q.details["options"].values()),
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
        rows = [row for video in read_rows(path) for row in video.rows("questions")]
        return collected(rows, ("question_id",), ("response",), converted=True)


def read_answer(text: str, dialect: str) -> str:
    """The letter a tool finds, "" for none.

    ``original`` and ``vlmevalkit``: known beginnings such as "The best answer is" dropped, the first capital
    A to D anywhere, also within a word. ``lmms``: :func:`~dyvte.tasks.answers.choices.lmms_letter`.

    Parameters
    ----------
    text
        The answer.
    dialect
        Whose rule.
    """
    if dialect == "lmms":
        return lmms_letter(text.strip(), "ABCD")
    text = text.strip()
    for prefix in _OFFICIAL_PREFIXES if dialect == "original" else _PREFIXES:
        text = text.replace(prefix, "")
    match = re.search("[ABCD]", text)
    return match[0] if match else ""


def _about(video: Row) -> dict[str, Any]:
    """What the template says of a video; the YouTube id, by which files are named, in the address only."""
    address = video.text("url", default="")
    named = video.text("videoID", default="") or address.split("v=")[-1] or video.identity("video_id")
    parts = ("video_id", "duration", "domain", "sub_category")
    return {**{key: video.value(key) for key in parts}, "videoID": named}


def _question(row: Row, number: str, base: Path) -> Question:
    identity = row.identity("question_id", "index", default=number)
    name = row.identity("videoID", "video")
    texts = [None if _is_bare(text) else text for text in row.texts("options", "candidates")]
    options = listed_options(row, texts)
    parts = ("duration", "domain", "sub_category", "task_type")
    return Question(
        id=identity,
        image=None,
        text="\n".join([_REQUEST, row.text("question"), *options.values()]),
        answer=gold_letter(row, options),
        image_id=name,
        kind=row.text("duration", default=""),
        details={
            **{part: row.text(part, default="") for part in parts},
            "video_id": row.identity("video_id", default=name),
            "question": row.text("question"),
            "options": options,
        },
        video=find_video(row, [base / folder for folder in _FOLDERS], name),
    )


def _is_bare(text: str | None) -> bool:
    """Nothing, or a letter without an option: options carry their letters here ("A. a cat")."""
    return text is None or re.fullmatch(r"\s*\(?[A-Z]?[.:)]?\s*", text) is not None
