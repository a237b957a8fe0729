"""RealWorldQA: questions about photographs of streets and rooms (xAI, 2024), choices and short answers.

No tool was published. ``original`` compares choices as LLaVA does (the exact letter) and short answers as
lmms-eval does (letter case and a full stop at the end aside). ``lmms``:
``lmms_eval/tasks/realworldqa/utils.py``; ``vlmevalkit``: exact matching of
``vlmeval/utils/matching_util.py``, which reads choices only.

Questions carry their own request ("Please answer directly with ..."), which is asked in place of LLaVA's.
"""

from __future__ import annotations

from pathlib import Path

from dyvte.errors import DataError
from dyvte.readers.files import ImageFolder, find_file, find_folder, table_image
from dyvte.readers.rows import Row, is_blank, read_rows
from dyvte.tasks.answers.choices import cut_options, lmms_letter, vlmevalkit_letter, with_options
from dyvte.tasks.base import TASKS, Question
from dyvte.tasks.choices import ChoiceBenchmark, checked_letter, lettered_options
from dyvte.tasks.records import ImageSource

_REQUEST = "Please answer directly with "
_FOR_LETTER = f"\n{_REQUEST}only the letter of the correct option and nothing else."
_FOR_WORD = f"\n{_REQUEST}a single word or number."
_MARK = r"(?m)^{}\.[ \t]+"
_PARQUET = {"image", "image_path", "question", "answer", "index", "id"}


@TASKS.register
class RealWorldQA(ChoiceBenchmark):
    """The test split."""

    name = "realworldqa"
    title = "RealWorldQA"
    submission_name = "realworldqa_answers.json"
    expected_tree = (
        "  <root>/                          release\n"
        "    annotations.json               (records of image, question, answer)\n"
        "    <image>                        (or images/<image>)\n"
        "  or <root>/data/test-*.parquet\n"
        "  or <root>/RealWorldQA.tsv"
    )
    tables = ("RealWorldQA.tsv", "*realworldqa*.tsv")
    shards = ("data/test-*.parquet", "*.parquet")
    columns = (("question",), ("answer",))

    def sources(self):
        """The release, tables."""
        return self._release, self.table

    def _release(self, root: Path) -> list[Question] | None:
        path = find_file(root, "annotations.json")
        if path is None:
            return None
        images = ImageFolder(find_folder(path, "images"))
        questions = []
        for number, row in enumerate(read_rows(path)):
            name = row.text("image")
            questions.append(_question(row, str(number), images.of(row, name), name))
        return questions

    def _check_columns(self, row: Row, path: Path) -> None:
        super()._check_columns(row, path)
        others = [name for name in row if name not in _PARQUET]
        if path.suffix == ".parquet" and others:
            raise DataError(f"{path} is no table of {self.title}: it has {', '.join(map(repr, others))}")

    def table_question(self, row: Row, number: int, base: Path) -> Question:
        """Parquet states the options in the question, the TSV in columns."""
        identity = row.identity("index", "id", default=str(number - 1))
        image, name = table_image(row, base, identity)
        return _question(row, identity, image, row.identity("image_path", default=name))

    def prompt(self, question: Question, suffix: str | None = None) -> str:
        """With the request that the question carries, unless another is given."""
        return question.text + (question.details["request"] if suffix is None else suffix)

    def read(self, text: str, question: Question, dialect: str) -> str | None:
        """The letter a tool finds; of a short answer the gold answer where the tool takes it for equal."""
        options = question.details["options"]
        if dialect == "vlmevalkit":
            return vlmevalkit_letter(text, options)
        if options:
            return (lmms_letter(text, "ABCD") or None) if dialect == "lmms" else text.strip()
        same = text.lower().strip().rstrip(".") == str(question.answer).lower()
        return question.answer if same else None


def _question(row: Row, identity: str, image: ImageSource | None, image_id: str) -> Question:
    body, asked, request = row.text("question").partition(_REQUEST)
    stem, options = cut_options(body.strip(), _MARK)
    if not options and any(not is_blank(row.get(letter)) for letter in "AB"):
        options = lettered_options(row)
    gold = row.text("answer").strip()
    return Question(
        id=identity,
        image=image,
        text=with_options(stem.strip(), options),
        answer=checked_letter(row, gold.upper(), options) if options else gold,
        image_id=image_id,
        kind="choice" if options else "short",
        details={
            "options": options,
            "request": f"\n{asked}{request}".rstrip() if asked else (_FOR_LETTER if options else _FOR_WORD),
        },
    )
