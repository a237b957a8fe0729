"""SEED-Bench, the questions about images (Li et al., 2023).

The benchmark's own tool ranks the options by their likelihood and reads no answers. ``original`` is LLaVA's
``scripts/convert_seed_for_submission.py``: the answer, outer blanks off, is exactly the letter. ``lmms``: the
first character, case aside (``lmms_eval/tasks/seedbench/utils.py``). ``vlmevalkit``: exact matching of
``vlmeval/utils/matching_util.py``. LLaVA counts a missing answer as wrong; here it is an error.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from dyvte.errors import DataError
from dyvte.readers.files import ImageFolder, find_file, find_folder, table_image
from dyvte.readers.rows import Row, read_json, read_jsonl, read_rows, shown
from dyvte.tasks.answers.choices import LETTERS, Options, vlmevalkit_letter, with_options
from dyvte.tasks.base import TASKS, Predictions, Question
from dyvte.tasks.choices import ChoiceBenchmark, gold_letter, lettered_options
from dyvte.tasks.prompts import strip_suffix
from dyvte.tasks.records import ImageSource
from dyvte.tasks.writing import write_jsonl


@TASKS.register
class SEED(ChoiceBenchmark):
    """SEED-Bench, image dimensions only."""

    name = "seed"
    title = "SEED-Bench"
    submission_name = "seed_submission.jsonl"
    expected_tree = (
        "  <root>/                             release, and LLaVA's playground/data/eval/seed_bench\n"
        "    SEED-Bench.json\n"
        "    llava-seed-bench.jsonl            (optional: LLaVA's question texts)\n"
        "    SEED-Bench-image/<data_id>\n"
        "  or <root>/data/test-*.parquet\n"
        "  or <root>/SEEDBench_IMG.tsv"
    )
    tables = ("SEEDBench_IMG.tsv", "*seed*.tsv")
    shards = ("data/test-*.parquet", "*.parquet")
    columns = (("question",), ("answer",), ("choice_a", "A"))
    shard_columns = ("choice_a",)

    def sources(self):
        """The release with LLaVA's texts where they are, tables."""
        return self._release, self.table

    def _release(self, root: Path) -> list[Question] | None:
        path = find_file(root, "SEED-Bench.json")
        if path is None:
            return None
        kinds = _kinds(path)
        images = ImageFolder(find_folder(path, "SEED-Bench-image", "images"), ("", ".jpg", ".png"))
        texts = _llava_texts(path.parent)
        questions = []
        for row in read_rows(path, "questions"):
            if row.value("data_type") != "image":
                continue
            image_id, identity = row.identity("data_id"), row.identity("question_id")
            kind = kinds.get(row.identity("question_type_id", default=""), "")
            image = images.of(row, image_id)
            questions.append(_question(row, identity, image, image_id, kind, texts.get(identity)))
        return questions

    def table_question(self, row: Row, number: int, base: Path) -> Question | None:
        """Parquet has the fields of the release, the TSV has columns A to D."""
        if row.value("data_type") not in (None, "image"):
            return None
        identity = row.identity("question_id", "index", default=str(number - 1))
        image, name = table_image(row, base, identity)
        image_id = row.identity("data_id", default=name)
        kind = row.identity("category", "question_type_id", default="")
        return _question(row, identity, image, image_id, kind)

    def read(self, text: str, question: Question, dialect: str) -> str | None:
        """See :func:`read_answer`."""
        return read_answer(text, question.details["options"], dialect)

    def write_submission(self, folder: Path, questions: Sequence[Question], predictions: Predictions) -> Path:
        """Write lines of ``{"question_id", "prediction"}`` for the leaderboard."""
        rows = [{"question_id": q.id, "prediction": predictions.texts[q.id].strip()} for q in questions]
        return write_jsonl(Path(folder) / self.submission_name, rows)


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
    return text.strip()[:1].upper() if dialect == "lmms" else text.strip()


def _kinds(path: Path) -> dict[str, str]:
    """Names of the question types by number, which the file maps the other way round."""
    content = read_json(path)
    numbers = content.get("question_type") if isinstance(content, dict) else None
    if not isinstance(numbers, dict | None):
        raise DataError(f"{path}: 'question_type' is {shown(numbers)}, expected an object")
    return {str(number): kind for kind, number in (numbers or {}).items()}


def _llava_texts(folder: Path) -> dict[str, str]:
    """LLaVA's prompts by question id; empty where its file is not there."""
    path = find_file(folder, "llava-seed-bench.jsonl")
    if path is None:
        return {}
    return {row.identity("question_id"): strip_suffix(row.text("text")) for row in read_jsonl(path)}


def _question(
    row: Row, identity: str, image: ImageSource | None, image_id: str, kind: str, text: str | None = None
) -> Question:
    named = {f"choice_{letter.lower()}": letter for letter in LETTERS[:4]}
    renamed = Row({named.get(key, key): value for key, value in row.items()}, row.where)
    options = lettered_options(renamed)
    upper = Row({**renamed, "answer": row.text("answer").upper()}, row.where)
    return Question(
        id=identity,
        image=image,
        text=text or with_options(row.text("question"), options),
        answer=gold_letter(upper, options),
        image_id=image_id,
        kind=kind,
        details={"options": options},
    )
