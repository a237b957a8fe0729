"""GQA: real-world visual reasoning (Hudson & Manning, 2019), test-dev balanced.

Scores follow the official ``eval.py`` on predictions converted as LLaVA does (strip, drop trailing full
stops, lower-case; the gold answer is left alone). Dialects ``lmms`` and ``vlmevalkit`` read answers as those
tools do.
"""

from __future__ import annotations

import json
import string
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dyvte.errors import DataError, ScoreError
from dyvte.tasks.base import (
    IMAGE_EXTENSIONS,
    Predictions,
    Question,
    count_unknown,
    layout_error,
    name_some,
    percent,
    predictions_from_rows,
    read_json,
    read_jsonl,
    read_raw_predictions,
)
from dyvte.tasks.common import StandardBenchmark
from dyvte.tasks.readers.files import find_file, find_folder, need, table_rows
from dyvte.tasks.statistics import Statistic, mean_statistic

QUESTIONS_FILE = "testdev_balanced_questions.json"
LLAVA_FILE = "llava_gqa_testdev_balanced.jsonl"
_QUESTION_FOLDERS = (".", "questions", "questions1.2", "questions1.3", "data", "data/questions1.2")
_IMAGE_FOLDERS = ("images", "data/images", "allImages/images")
_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)


class GQA(StandardBenchmark):
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

    def sources(self):
        """Tables; then the release, whose reader says what is missing from it."""
        return self._parquet, self._table, self._release

    def _parquet(self, root: Path) -> list[Question] | None:
        rows = table_rows(root, (), ("testdev_balanced_instructions/*.parquet",))
        pictures = table_rows(root, (), ("testdev_balanced_images/*.parquet",))
        if rows is None or pictures is None:
            return None
        images = {str(row["id"]): row["image"] for row in pictures}
        entries = [(str(row["id"]), row) for row in rows]
        _refuse_bad_entries(entries, root / "testdev_balanced_instructions")
        without = sorted({str(entry["imageId"]) for _, entry in entries} - images.keys())
        if without:
            raise DataError(f"{root}: the image table lacks {len(without)} images: {name_some(without)}")
        return [_question(identity, entry, images[str(entry["imageId"])]) for identity, entry in entries]

    def _table(self, root: Path) -> list[Question] | None:
        rows = table_rows(root, ("GQA_TestDev_Balanced.tsv", "GQA*.tsv"), ())
        if rows is None:
            return None
        questions = []
        for number, row in enumerate(rows, start=1):
            need(row, ("index", "image", "question", "answer"), root, number)
            entry = {**row, "imageId": row["image"].name, "types": {}}
            questions.append(_question(str(row["index"]), entry, row["image"]))
        return questions

    def _release(self, root: Path) -> list[Question]:
        path = find_file(root, *(f"{folder}/{QUESTIONS_FILE}" for folder in _QUESTION_FOLDERS))
        if path is None:
            raise layout_error("GQA", root, f"no {QUESTIONS_FILE}", self.expected_tree)
        folder = find_folder(root, *_IMAGE_FOLDERS)
        entries = read_json(path, unique_keys=True)
        if not isinstance(entries, dict) or not entries:
            raise layout_error(
                "GQA", root, f"{path.name} is not a dictionary of questions", self.expected_tree
            )
        chosen = _chosen_by_llava(find_file(root, LLAVA_FILE), entries, path)
        _refuse_bad_entries(chosen, path)
        files = _image_files(folder)
        return [
            _question(question_id, entry, folder / files.get(image_id, f"{image_id.replace('/', ':')}.jpg"))
            for question_id, entry in chosen
            for image_id in (str(entry["imageId"]),)
        ]

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

    def read_predictions(self, path: Path, questions: Sequence[Question]) -> Predictions:
        """Read a submission (``[{"questionId", "prediction"}]``) or raw answers (jsonl)."""
        path = Path(path)
        if path.suffix != ".json":
            return read_raw_predictions(path)
        rows = read_json(path)
        if not isinstance(rows, list):
            raise ScoreError(f'{path}: expected a list of {{"questionId", "prediction"}}')
        return predictions_from_rows(rows, path, "questionId", ("prediction",), converted=True)

    def write_submission(self, folder: Path, questions: Sequence[Question], predictions: Predictions) -> Path:
        """Write ``testdev_balanced_predictions.json`` for the official ``eval.py``."""
        path = Path(folder) / "testdev_balanced_predictions.json"
        rows = [
            {
                "questionId": q.id,
                "prediction": _read(predictions.texts[q.id], "original", predictions.converted),
            }
            for q in questions
        ]
        path.write_text(json.dumps(rows), encoding="utf-8")
        return path


def _image_files(folder: Path) -> dict[str, str]:
    """Image id -> file name; ids are matched against the folder's own listing, so none can point outside."""
    files: dict[str, str] = {}
    if not folder.is_dir():
        return files
    for path in sorted(
        folder.iterdir(),
        key=lambda p: (
            IMAGE_EXTENSIONS.index(p.suffix.lower())
            if p.suffix.lower() in IMAGE_EXTENSIONS
            else len(IMAGE_EXTENSIONS)
        ),
    ):
        if path.suffix.lower() in IMAGE_EXTENSIONS:
            files.setdefault(path.stem, path.name)
    return files


def _chosen_by_llava(path: Path | None, entries: Mapping[str, Any], where: Path) -> list[tuple[str, Any]]:
    """GQA's entries of the questions in LLaVA's file, in its order; all where there is no such file."""
    if path is None:
        return list(entries.items())
    ids = []
    for number, row in enumerate(read_jsonl(path), start=1):
        need(row, ("question_id",), path, number)
        ids.append(str(row["question_id"]))
    without = [question_id for question_id in ids if question_id not in entries]
    if without:
        raise DataError(
            f"{path}: {len(without)} questions have no gold answer in {where}: {name_some(without)}"
        )
    return [(question_id, entries[question_id]) for question_id in ids]


def _refuse_bad_entries(entries: Sequence[tuple[str, Any]], path: Path) -> None:
    needed = ("question", "imageId", "answer", "types")
    for key in needed:
        lacking = [i for i, entry in entries if not isinstance(entry, dict) or key not in entry]
        if lacking:
            what = "gold answer" if key == "answer" else repr(key)
            raise DataError(f"{path}: {len(lacking)} questions have no {what}: {name_some(lacking)}")


def _question(question_id: str, entry: Mapping[str, Any], image: Any) -> Question:
    image_id = str(entry["imageId"])
    types = entry["types"] or {}
    return Question(
        id=str(question_id),
        image=image,
        text=entry["question"],
        answer=entry["answer"],
        image_id=image_id,
        kind=types.get("detailed") or types.get("structural") or "",
        details={
            "balanced": bool(entry.get("isBalanced", True)),
            "group": (entry.get("groups") or {}).get("global"),
            "structural": types.get("structural"),
            "semantic": types.get("semantic"),
            "detailed": types.get("detailed"),
            "words": len(entry["question"].split()),
            "steps": _num_steps(entry.get("semantic") or ()),
        },
    )


def _num_steps(program: Sequence[Mapping[str, Any]]) -> int:
    """Reasoning steps as ``eval.py`` counts them: existence and naming are not steps."""
    trivial = ("exist", "query: name", "choose name")
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
