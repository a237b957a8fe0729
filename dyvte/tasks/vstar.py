"""V* Bench: small things in large images (Wu and Xie, 2024), attributes and relative positions, multiple
choice.

The authors' ``vstar_bench_eval.py`` ranks the options by their likelihood. ``original`` is LLaVA's rule for
letters, which the release's ``test_questions.jsonl`` asks for: exactly the letter.
``lmms``: ``lmms_eval/tasks/vstar_bench/utils.py``; ``vlmevalkit``: exact matching.
"""

from __future__ import annotations

import re
from pathlib import Path

from dyvte.readers.files import ImageFolder, find_file, table_image
from dyvte.readers.rows import Row, read_jsonl
from dyvte.tasks.answers.choices import cut_options, vlmevalkit_letter, with_options
from dyvte.tasks.base import TASKS, Question
from dyvte.tasks.choices import ChoiceBenchmark, gold_letter, lettered_options
from dyvte.tasks.prompts import strip_suffix
from dyvte.tasks.records import ImageSource

_LETTER_PLACES = (
    r"^([A-D])",
    r"(?:ANSWER|CHOICE|OPTION)(?:\s+IS)?[\s:]+([A-D])",
    r"\(([A-D])\)",
    r"([A-D])\s*(?:\.|\)|])",
    r"(?:^|\s)([A-D])(?:\s|$)",
)


@TASKS.register
class VStar(ChoiceBenchmark):
    """Both parts."""

    name = "vstar"
    title = "V* Bench"
    submission_name = "vstar_answers.json"
    expected_tree = (
        "  <root>/                          release\n"
        "    test_questions.jsonl\n"
        "    direct_attributes/<image>, relative_position/<image>\n"
        "  or <root>/data/test-*.parquet\n"
        "  or <root>/VStarBench.tsv"
    )
    tables = ("VStarBench.tsv", "*vstar*.tsv")
    shards = ("data/test-*.parquet", "*.parquet")
    columns = (("text", "question"), ("label", "answer"), ("category",))
    shard_columns = ("text", "label")

    def sources(self):
        """The release, tables."""
        return self._release, self.table

    def _release(self, root: Path) -> list[Question] | None:
        path = find_file(root, "test_questions.jsonl")
        if path is None:
            return None
        images = ImageFolder(path.parent)
        questions = []
        for number, row in enumerate(read_jsonl(path)):
            name = row.text("image")
            identity = row.identity("question_id", default=str(number))
            questions.append(_question(row, identity, images.of(row, name), name))
        return questions

    def table_question(self, row: Row, number: int, base: Path) -> Question:
        """Parquet has the fields of the release, the TSV has columns A to D."""
        identity = row.identity("question_id", "index", default=str(number - 1))
        return _question(row, identity, *table_image(row, base, identity))

    def read(self, text: str, question: Question, dialect: str) -> str | None:
        """See :func:`read_answer`."""
        return read_answer(text, question.details["options"], dialect)

    def stratum(self, question: Question) -> str:
        """The two parts were collected apart."""
        return question.kind


def read_answer(text: str, options: dict[str, str], dialect: str) -> str | None:
    """The letter a tool finds; what is no letter equals none."""
    if dialect == "vlmevalkit":
        return vlmevalkit_letter(text, options)
    if dialect == "original":
        return text.strip()
    text = text.strip().upper()
    for place in _LETTER_PLACES:
        found = re.search(place, text)
        if found:
            return found[1]
    letters = re.findall(r"[A-D]", text)
    return letters[0] if len(letters) == 1 else None


def _question(row: Row, identity: str, image: ImageSource | None, image_id: str) -> Question:
    stem, options = cut_options(strip_suffix(row.text("text", "question")), r"\({}\)\s*")
    if not options and row.value("A") is not None:
        options = lettered_options(row)
    read = options or dict.fromkeys("ABCD", "")  # written in a way of its own: the letters remain
    return Question(
        id=identity,
        image=image,
        text=with_options(stem, options),
        answer=gold_letter(row, read, "label" if row.value("label") is not None else "answer"),
        image_id=image_id,
        kind=row.text("category"),
        details={"options": read},
    )
