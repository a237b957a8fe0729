"""GQA: real-world visual reasoning (Hudson & Manning, 2019), test-dev balanced.

Scores follow the official ``eval.py`` on predictions converted as LLaVA does (strip, drop trailing full
stops, lower-case; the gold answer is left alone). Dialects ``lmms`` and ``vlmevalkit`` read answers as those
tools do.
"""

from __future__ import annotations

import string
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dyvte.errors import DataError, ScoreError
from dyvte.formatting import name_some
from dyvte.readers.files import (
    IMAGE_EXTENSIONS,
    find_file,
    find_folder,
    shards_below,
    table_image,
)
from dyvte.readers.rows import Row, read_entries, read_jsonl
from dyvte.readers.tables import read_table
from dyvte.tasks.base import TASKS, Benchmark, Predictions, Question
from dyvte.tasks.metrics import percent
from dyvte.tasks.predictions import read_submitted
from dyvte.tasks.records import ImageSource, count_unknown
from dyvte.tasks.statistics import Statistic, mean_statistic
from dyvte.tasks.writing import write_json

QUESTIONS_FILE = "testdev_balanced_questions.json"
LLAVA_FILE = "llava_gqa_testdev_balanced.jsonl"
_QUESTION_FOLDERS = (".", "questions", "questions1.2", "questions1.3", "data", "data/questions1.2")
_IMAGE_FOLDERS = ("images", "data/images", "allImages/images")
_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)


@TASKS.register
class GQA(Benchmark):
    """Test-dev balanced, in GQA's own layout or as a table."""

    name = "gqa"
    title = "GQA"
    expected_tree = (
        "  <root>/                              release, and LLaVA's playground/data/eval/gqa\n"
        f"    {QUESTIONS_FILE}   (or in questions/, questions1.2/ or data/)\n"
        f"    {LLAVA_FILE}  (optional: which questions, in which order)\n"
        "    images/\n"
        "      <imageId>.jpg ...                  (or .png; also in data/)\n"
        "  or <root>/testdev_balanced_instructions/*.parquet and testdev_balanced_images/*.parquet\n"
        "  or <root>/GQA_TestDev_Balanced.tsv     (no question types in it)"
    )
    tables = ("GQA_TestDev_Balanced.tsv", "*gqa*.tsv")
    columns = (("question",), ("answer",))

    def sources(self):
        """Parquet, the TSV; then the release, whose reader says what is missing from it."""
        return self._parquet, self.table, self._release

    def _parquet(self, root: Path) -> list[Question] | None:
        """Questions and images are two splits."""
        if root.is_file():
            return None
        shards = shards_below(root, ("testdev_balanced_instructions/*.parquet",))
        image_shards = shards_below(root, ("testdev_balanced_images/*.parquet",))
        if not shards:
            return None
        images = {row.identity("id"): row.get("image") for row in read_table(image_shards)}
        entries = [(row.identity("id"), row) for row in read_table(shards)]
        _refuse_bad_entries(entries, root / "testdev_balanced_instructions")
        without = sorted({row.identity("imageId") for _, row in entries} - images.keys())
        if without and image_shards:
            raise DataError(f"{root}: the image table lacks {len(without)} images: {name_some(without)}")
        return [_question(identity, row, images.get(row.identity("imageId"))) for identity, row in entries]

    def table_question(self, row: Row, number: int, base: Path) -> Question:
        """The TSV has no types; its images are its own."""
        identity = row.identity("index", default=str(number))
        image, name = table_image(row, base, identity)
        entry = Row({**row, "imageId": name, "types": None}, row.where)
        return _question(identity, entry, image)

    def _release(self, root: Path) -> list[Question] | None:
        path = find_file(root, *(f"{folder}/{QUESTIONS_FILE}" for folder in _QUESTION_FOLDERS))
        if path is None:
            return None
        folder = find_folder(root, *_IMAGE_FOLDERS)
        chosen = _chosen_by_llava(find_file(root, LLAVA_FILE), read_entries(path), path)
        _refuse_bad_entries(chosen, path)
        files = _image_files(folder)
        questions = []
        for question_id, entry in chosen:
            image_id = entry.identity("imageId")
            file = files.get(image_id, f"{image_id.replace('/', ':')}.jpg")
            questions.append(_question(question_id, entry, folder / file))
        return questions

    def hits(self, questions: Sequence[Question], predictions: Predictions, dialect: str) -> list[bool]:
        """Read answer equals gold."""
        return [
            _read(predictions.texts[q.id], dialect, predictions.converted) == _read_gold(q.answer, dialect)
            for q in questions
        ]

    def score(
        self, questions: Sequence[Question], predictions: Predictions, dialect: str = "original"
    ) -> dict[str, Any]:
        """Accuracies in percent: over all, binary and open, per type; and the distribution score.

        Only balanced questions count, as in ``eval.py``. Validity, plausibility and consistency are not
        computed: they need files beside the questions.
        """
        balanced = [q for q in questions if q.details["balanced"]]
        if not balanced:
            raise ScoreError("none of the questions is marked isBalanced: GQA's accuracy is over those")
        hits = self.correct(balanced, predictions, dialect)
        scores: dict[str, Any] = {
            "benchmark": self.name,
            "dialect": dialect,
            "num_questions": len(balanced),
            "num_not_balanced": len(questions) - len(balanced),
            "num_unknown_predictions": count_unknown(questions, predictions),
            "accuracy": percent(hits),
        }
        if all(q.details["structural"] is None for q in balanced):
            return scores  # a table without question types
        is_open = [q.details["structural"] == "query" for q in balanced]
        scores["binary"] = percent([hit for hit, is_query in zip(hits, is_open) if not is_query])
        scores["open"] = percent([hit for hit, is_query in zip(hits, is_open) if is_query])
        scores["distribution"] = _distribution(balanced, predictions, dialect)
        for part in ("structural", "semantic", "detailed", "steps", "words"):
            scores[f"per_{part}"] = _breakdown(balanced, hits, part)
        return scores

    def statistic(self, questions: Sequence[Question], hits: Sequence[float]) -> Statistic:
        """Accuracy over the balanced questions."""
        balanced = [q.details.get("balanced", True) for q in questions]
        return mean_statistic([q.image_id for q in questions], hits, balanced)

    def read_submission(self, path: Path, questions: Sequence[Question]) -> Predictions:
        """Read what ``eval.py`` takes: ``[{"questionId", "prediction"}]``."""
        return read_submitted(path, "questionId", "prediction")

    def write_submission(self, folder: Path, questions: Sequence[Question], predictions: Predictions) -> Path:
        """Write ``testdev_balanced_predictions.json`` for the official ``eval.py``."""
        rows = [
            {
                "questionId": q.id,
                "prediction": _read(predictions.texts[q.id], "original", predictions.converted),
            }
            for q in questions
        ]
        return write_json(Path(folder) / "testdev_balanced_predictions.json", rows)


def _image_files(folder: Path) -> dict[str, str]:
    """Image id -> file name; ids are matched against the folder's own listing, so none can point outside."""
    if not folder.is_dir():
        return {}
    names = sorted(path.name for path in folder.iterdir() if path.suffix.lower() in IMAGE_EXTENSIONS)
    # the first kind of file wins: it is entered last
    names.sort(key=lambda name: -IMAGE_EXTENSIONS.index(Path(name).suffix.lower()))
    return {Path(name).stem: name for name in names}


def _chosen_by_llava(path: Path | None, entries: Mapping[str, Row], where: Path) -> list[tuple[str, Row]]:
    """GQA's entries of the questions in LLaVA's file, in its order; all where there is no such file."""
    if path is None:
        return list(entries.items())
    ids = [row.identity("question_id") for row in read_jsonl(path)]
    without = [question_id for question_id in ids if question_id not in entries]
    if without:
        raise DataError(
            f"{path}: {len(without)} questions have no gold answer in {where}: {name_some(without)}"
        )
    return [(question_id, entries[question_id]) for question_id in ids]


def _refuse_bad_entries(entries: Sequence[tuple[str, Row]], path: Path) -> None:
    for key in ("question", "imageId", "answer"):
        lacking = [identity for identity, entry in entries if entry.value(key) is None]
        if lacking:
            what = "gold answer" if key == "answer" else repr(key)
            raise DataError(f"{path}: {len(lacking)} questions have no {what}: {name_some(lacking)}")


def _question(question_id: str, entry: Row, image: ImageSource | None) -> Question:
    types = entry.child("types")
    text = entry.text("question")
    return Question(
        id=question_id,
        image=image,
        text=text,
        answer=entry.text("answer"),
        image_id=entry.identity("imageId"),
        kind=types.text("detailed", "structural", default=""),
        details={
            "balanced": entry.value("isBalanced") in (None, True, 1, "true", "True"),
            "group": entry.child("groups").text("global", default=None),
            **{part: types.text(part, default=None) for part in ("structural", "semantic", "detailed")},
            "words": len(text.split()),
            "steps": _num_steps(entry),
        },
    )


def _num_steps(entry: Row) -> int:
    """Reasoning steps as ``eval.py`` counts them: existence and naming are not steps."""
    trivial = ("exist", "query: name", "choose name")
    program = entry.rows("semantic") if entry.value("semantic") is not None else []
    steps = (f"{step.get('operation')}: {step.get('argument')}" for step in program)
    return sum(1 for step in steps if not any(word in step for word in trivial))


def _read(text: str, dialect: str, converted: bool) -> str:
    if dialect == "lmms":
        return text.strip().lower().translate(_NO_PUNCTUATION)
    if dialect == "vlmevalkit":
        return text.strip().lower()
    return text if converted else text.strip().rstrip(".").lower()


def _read_gold(answer: str, dialect: str) -> str:
    return answer if dialect == "original" else _read(answer, dialect, converted=False)


def _breakdown(questions: Sequence[Question], hits: Sequence[bool], part: str) -> dict[str, Any]:
    groups: dict[Any, list[bool]] = defaultdict(list)
    for question, hit in zip(questions, hits):
        groups[question.details[part]].append(hit)
    ordered = sorted(
        groups.items(), key=lambda item: (str(type(item[0])), item[0] if item[0] is not None else "")
    )
    return {str(k): {"accuracy": percent(v), "num_questions": len(v)} for k, v in ordered}


def _distribution(questions: Sequence[Question], predictions: Predictions, dialect: str) -> float | None:
    """Chi-square of predicted against gold answers, averaged over global groups, / 100; lower is better."""
    gold: dict[str, dict[str, int]] = defaultdict(lambda: defaultdict(int))
    predicted: dict[str, dict[str, int]] = defaultdict(lambda: defaultdict(int))
    for question in questions:
        group = question.details["group"]
        if group is None:
            continue
        gold[group][_read_gold(question.answer, dialect)] += 1
        predicted[group][_read(predictions.texts[question.id], dialect, predictions.converted)] += 1
    if not gold:
        return None
    total = sum(sum(counts.values()) for counts in gold.values())
    weighted = 0.0
    for group, counts in gold.items():
        chi_square = sum((predicted[group].get(a, 0) - n) ** 2 / n for a, n in counts.items())
        weighted += chi_square * sum(counts.values())
    return weighted / total / 100
