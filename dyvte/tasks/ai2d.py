"""AI2D: multiple-choice questions about diagrams (Kembhavi et al., 2016), the test questions.

The data set has no answer reader of its own. ``original`` is LLaVA's rule for options: the answer, outer
blanks off, is exactly the letter (as its ``convert_seed_for_submission.py`` compares). ``lmms``: the letter
before a leading "A.", else the whole answer, case and punctuation aside (``lmms_eval/tasks/ai2d``).
``vlmevalkit``: exact matching of ``vlmeval/utils/matching_util.py``. The release states in
``ai2d_test_ids.csv`` which images are the test images; questions about letters in the diagram need its images
with the labels replaced.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dyvte.errors import DataError
from dyvte.tasks.answers.choices import (
    LETTERS,
    lettered,
    lmms_exact,
    options_of,
    parse_list,
    vlmevalkit_letter,
    with_options,
)
from dyvte.tasks.base import LETTER_SUFFIX, Predictions, Question, read_json
from dyvte.tasks.common import StandardBenchmark
from dyvte.tasks.readers.files import ImageFolder, find_folder, need, table_rows


class AI2D(StandardBenchmark):
    """The test split."""

    name = "ai2d"
    title = "AI2D"
    suffix = LETTER_SUFFIX
    submission_name = "ai2d_answers.json"
    expected_tree = (
        "  <root>/                          release\n"
        "    questions/<image>.json         (e.g. 0.png.json)\n"
        "    images/<image>\n"
        "    abc_images/<image>             (labels replaced by letters; else images/ is used)\n"
        "    ai2d_test_ids.csv\n"
        "  or <root>/data/test-*.parquet\n"
        "  or <root>/AI2D_TEST.tsv"
    )

    def sources(self):
        """The release, tables."""
        return self._release, self._table

    def _release(self, root: Path) -> list[Question] | None:
        ids = root / "ai2d_test_ids.csv"
        if not ids.is_file() or not (root / "questions").is_dir():
            return None
        plain = ImageFolder(root / "images")
        lettered_images = ImageFolder(find_folder(root, "abc_images", "images"))
        questions = []
        for image_id in ids.read_text(encoding="utf-8").split():
            path = root / "questions" / f"{image_id.removesuffix('.png')}.png.json"
            if not path.is_file():
                continue  # not every test image has questions
            content = read_json(path)
            for text, entry in content.get("questions", {}).items():
                need(entry, ("answerTexts", "correctAnswer", "questionId"), path, len(questions))
                folder = lettered_images if entry.get("abcLabel") else plain
                image = folder[content["imageName"]]
                options, answer = entry["answerTexts"], int(entry["correctAnswer"])
                kind = "letters" if entry.get("abcLabel") else "text"
                row = (entry["questionId"], image, content["imageName"], text, options, answer, kind)
                questions.append(_question(*row))
        return questions

    def _table(self, root: Path) -> list[Question] | None:
        rows = table_rows(root, ("AI2D_TEST.tsv", "AI2D*.tsv", "*.tsv"), ("data/test-*.parquet", "*.parquet"))
        if rows is None:
            return None
        questions = []
        for number, row in enumerate(rows):
            need(row, ("image", "question", "answer"), root, number)
            options, answer = _choices(row, number)
            identity = row.get("index", row.get("id", number))
            image = row["image"]
            questions.append(_question(identity, image, image.name, row["question"], options, answer, ""))
        return questions

    def hits(self, questions: Sequence[Question], predictions: Predictions, dialect: str) -> list[bool]:
        """Read letter equals gold."""
        return [
            read_answer(predictions.texts[q.id], q.details["options"], dialect) == q.answer for q in questions
        ]


def read_answer(text: str, options: Sequence[str], dialect: str) -> str | None:
    """The letter a tool finds; what is no letter equals none."""
    if dialect == "vlmevalkit":
        return vlmevalkit_letter(text.strip(), lettered(options))
    return lmms_exact(text).upper() if dialect == "lmms" else text.strip()


def _choices(row: Mapping[str, Any], number: int) -> tuple[list[str], int]:
    """Options and index of the right one: parquet lists them, the TSV has columns and a letter."""
    if "options" in row:
        return parse_list(row["options"], f"question {number}"), int(row["answer"])
    return options_of(row), LETTERS.index(str(row["answer"]).strip())


def _question(
    identity: Any, image: Any, image_id: str, text: str, options: Sequence[str], answer: int, kind: str
) -> Question:
    if not 0 <= answer < len(options):
        raise DataError(f"question {identity}: gold answer {answer} is none of {len(options)} options")
    return Question(
        id=str(identity),
        image=image,
        text=with_options(text, options),
        answer=LETTERS[answer],
        image_id=str(image_id),
        kind=kind,
        details={"options": list(options)},
    )
