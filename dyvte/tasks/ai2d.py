"""AI2D: multiple-choice questions about diagrams (Kembhavi et al., 2016), the test questions.

The data set has no answer reader of its own. ``original`` is LLaVA's rule for options: the answer, outer
blanks off, is exactly the letter (as its ``convert_seed_for_submission.py`` compares). ``lmms``: the letter
before a leading "A.", else the whole answer, case and punctuation aside (``lmms_eval/tasks/ai2d``).
``vlmevalkit``: exact matching of ``vlmeval/utils/matching_util.py``. The release states in
``ai2d_test_ids.csv`` which images are the test images; questions about letters in the diagram need its images
with the labels replaced.
"""

from __future__ import annotations

from pathlib import Path

from dyvte.readers.files import ImageFolder, find_folder, table_image
from dyvte.readers.rows import Row, read_json, read_text, rows_of
from dyvte.tasks.answers.choices import Options, lmms_exact, vlmevalkit_letter, with_options
from dyvte.tasks.base import TASKS, Question
from dyvte.tasks.choices import ChoiceBenchmark, gold_index, gold_letter, lettered_options
from dyvte.tasks.records import ImageSource


@TASKS.register
class AI2D(ChoiceBenchmark):
    """The test split."""

    name = "ai2d"
    title = "AI2D"
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
    tables = ("AI2D_TEST.tsv", "*ai2d*.tsv")
    shards = ("data/test-*.parquet", "*.parquet")
    columns = (("question",), ("answer",), ("options", "A"))
    shard_columns = ("options",)

    def sources(self):
        """The release, tables."""
        return self._release, self.table

    def _release(self, root: Path) -> list[Question] | None:
        ids = root / "ai2d_test_ids.csv"
        if not ids.is_file() or not (root / "questions").is_dir():
            return None
        plain = ImageFolder(root / "images")
        lettered = ImageFolder(find_folder(root, "abc_images", "images"))
        questions = []
        for image_id in read_text(ids).split():
            path = root / "questions" / f"{Path(image_id).name.removesuffix('.png')}.png.json"
            if not path.is_file():
                continue  # not every test image has questions
            (content,) = rows_of([read_json(path)], path)
            name = content.text("imageName", default="")
            for text in content.child("questions"):
                entry = content.child("questions").child(text)
                folder = lettered if entry.value("abcLabel") else plain
                kind = "letters" if entry.value("abcLabel") else "text"
                row = Row({**entry, "question": text, "answer": entry.integer("correctAnswer")}, entry.where)
                image = folder.of(content, content.text("imageName"))
                questions.append(_question(row, entry.identity("questionId"), image, name, kind))
        return questions

    def table_question(self, row: Row, number: int, base: Path) -> Question:
        """Parquet lists the options and the index of the right one, the TSV has columns and a letter."""
        identity = row.identity("index", "id", default=str(number - 1))
        return _question(row, identity, *table_image(row, base, identity))

    def read(self, text: str, question: Question, dialect: str) -> str | None:
        """See :func:`read_answer`."""
        return read_answer(text, question.details["options"], dialect)


def read_answer(text: str, options: Options, dialect: str) -> str | None:
    """The letter a tool finds; what is no letter equals none.

    Parameters
    ----------
    text
        The answer.
    options
        By letter.
    dialect
        Whose rule.
    """
    if dialect == "vlmevalkit":
        return vlmevalkit_letter(text, options)
    return lmms_exact(text.strip()).upper() if dialect == "lmms" else text.strip()


def _question(row: Row, identity: str, image: ImageSource | None, image_id: str, kind: str = "") -> Question:
    options = lettered_options(row, "options", "answerTexts")
    listed = row.value("options", "answerTexts") is not None
    return Question(
        id=identity,
        image=image,
        text=with_options(row.text("question"), options),
        answer=gold_index(row, options) if listed else gold_letter(row, options),
        image_id=image_id,
        kind=kind,
        details={"options": options},
    )
