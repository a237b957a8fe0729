"""SEED-Bench, the questions about images (Li et al., 2023).

The benchmark's own tool ranks the options by their likelihood and reads no answers. ``original`` is LLaVA's
``scripts/convert_seed_for_submission.py``: the answer, outer blanks off, is exactly the letter. ``lmms``: the
first character, case aside (``lmms_eval/tasks/seedbench/utils.py``). ``vlmevalkit``: exact matching of
``vlmeval/utils/matching_util.py``. LLaVA counts a missing answer as wrong; here it is an error.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dyvte.errors import DataError
from dyvte.tasks.answers.choices import lettered, options_of, vlmevalkit_letter, with_options
from dyvte.tasks.base import LETTER_SUFFIX, Predictions, Question, read_json, read_jsonl
from dyvte.tasks.common import StandardBenchmark, strip_suffix, write_jsonl
from dyvte.tasks.readers.files import ImageFolder, find_file, find_folder, need, table_rows

_OPTIONS = ("choice_a", "choice_b", "choice_c", "choice_d")


class SEED(StandardBenchmark):
    """SEED-Bench, image dimensions only."""

    name = "seed"
    title = "SEED-Bench"
    suffix = LETTER_SUFFIX
    submission_name = "seed_submission.jsonl"
    expected_tree = (
        "  <root>/                             release, and LLaVA's playground/data/eval/seed_bench\n"
        "    SEED-Bench.json\n"
        "    llava-seed-bench.jsonl            (optional: LLaVA's question texts and order)\n"
        "    SEED-Bench-image/<data_id>\n"
        "  or <root>/data/test-*.parquet\n"
        "  or <root>/SEEDBench_IMG.tsv"
    )

    def sources(self):
        """The release with LLaVA's texts where they are, tables."""
        return self._release, self._table

    def _release(self, root: Path) -> list[Question] | None:
        path = find_file(root, "SEED-Bench.json")
        if path is None:
            return None
        content = read_json(path)
        if not isinstance(content, dict) or not isinstance(content.get("questions"), list):
            raise DataError(f'{path}: expected {{"questions": [...], "question_type": {{...}}}}')
        kinds = {number: kind for kind, number in content.get("question_type", {}).items()}
        images = ImageFolder(find_folder(path, "SEED-Bench-image", "images"), ("", ".jpg", ".png"))
        texts = _llava_texts(path.parent)
        questions = []
        for number, entry in enumerate(content["questions"], start=1):
            if entry.get("data_type") != "image":
                continue
            need(entry, ("question_id", "question", "answer", "data_id", "choice_a"), path, number)
            image = images[str(entry["data_id"])]
            kind = kinds.get(entry.get("question_type_id"), "")
            text = texts.get(str(entry["question_id"])) if texts is not None else None
            questions.append(_question(entry, image, str(entry["data_id"]), kind, text))
        return questions

    def _table(self, root: Path) -> list[Question] | None:
        rows = table_rows(root, ("SEEDBench_IMG.tsv", "*.tsv"), ("data/test-*.parquet", "*.parquet"))
        if rows is None:
            return None
        questions = []
        for number, row in enumerate(rows):
            if row.get("data_type", "image") != "image":
                continue
            need(row, ("image", "question", "answer"), root, number)
            image = row["image"][0] if isinstance(row["image"], list) else row["image"]
            entry = {"question_id": row.get("index", number), **row}
            kind = str(row.get("category") or row.get("question_type_id") or "")
            image_id = str(row.get("data_id") or image.name)
            questions.append(_question(entry, image, image_id, kind, None))
        return questions

    def hits(self, questions: Sequence[Question], predictions: Predictions, dialect: str) -> list[bool]:
        """Read letter equals gold."""
        return [
            read_answer(predictions.texts[q.id], q.details["options"], dialect) == q.answer for q in questions
        ]

    def write_submission(self, folder: Path, questions: Sequence[Question], predictions: Predictions) -> Path:
        """Write lines of ``{"question_id", "prediction"}`` for the leaderboard."""
        rows = [{"question_id": q.id, "prediction": predictions.texts[q.id].strip()} for q in questions]
        return write_jsonl(Path(folder) / self.submission_name, rows)


def read_answer(text: str, options: Sequence[str], dialect: str) -> str | None:
    """The letter a tool finds; what is no letter equals none."""
    if dialect == "vlmevalkit":
        return vlmevalkit_letter(text.strip(), lettered(options))
    return text.strip()[:1].upper() if dialect == "lmms" else text.strip()


def _llava_texts(folder: Path) -> dict[str, str] | None:
    path = find_file(folder, "llava-seed-bench.jsonl")
    if path is None:
        return None
    return {str(row["question_id"]): strip_suffix(row["text"]) for row in read_jsonl(path)}


def _question(entry: Mapping[str, Any], image: Any, image_id: str, kind: str, text: str | None) -> Question:
    given = [entry.get(key) for key in _OPTIONS]
    options = [str(option) for option in given if option is not None] or options_of(entry)
    answer = str(entry["answer"]).strip().upper()
    if answer not in lettered(options):
        raise DataError(
            f"question {entry['question_id']}: gold answer {answer!r} is none of {len(options)} options"
        )
    return Question(
        id=str(entry["question_id"]),
        image=image,
        text=text or with_options(entry["question"], options),
        answer=answer,
        image_id=image_id,
        kind=kind,
        details={"options": options},
    )
