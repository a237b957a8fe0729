"""POPE: does the model see objects that are not there (Li et al., 2023).

Yes/no questions about objects in COCO images, in three draws of the absent objects: random, popular,
adversarial. Sources: ``evaluate.py`` of AoiDragon/POPE, which LLaVA's ``eval_pope.py`` repeats per category
(``original``); ``lmms_eval/tasks/pope/utils.py`` (``lmms``); ``POPE_rating`` and ``YOrN_Extraction`` in
``vlmeval/dataset/utils/yorn.py``, exact matching (``vlmevalkit``). The official tool joins answers and labels
by line; here they are joined by id, and a missing answer is an error.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dyvte.errors import DataError
from dyvte.tasks.answers.yes_no import yes_no_words
from dyvte.tasks.base import Predictions, Question, name_some, percent, predictions_from_rows, read_jsonl
from dyvte.tasks.common import StandardBenchmark, number_or_text, strip_suffix, write_jsonl
from dyvte.tasks.readers.files import ImageFolder, find_file, find_folder, need, table_rows
from dyvte.tasks.statistics import Statistic, mean_over_parts

CATEGORIES = ("random", "popular", "adversarial")


class POPE(StandardBenchmark):
    """The benchmark over the categories that are present."""

    name = "pope"
    title = "POPE"
    submission_name = "pope_answers"
    expected_tree = (
        "  <root>/                              release, and LLaVA's playground/data/eval/pope\n"
        "    coco/coco_pope_random.json         (also _popular, _adversarial; or without coco/)\n"
        "    llava_pope_test.jsonl              (optional: gives the question ids)\n"
        "    val2014/COCO_val2014_*.jpg\n"
        "  or <root>/data/test-*.parquet        (or Full/*.parquet)\n"
        "  or <root>/POPE.tsv"
    )

    def sources(self):
        """LLaVA's question file, the release, tables."""
        return self._llava, self._release, self._table

    def _llava(self, root: Path) -> list[Question] | None:
        path = find_file(root, "llava_pope_test.jsonl")
        labels = _label_files(path.parent) if path is not None else {}
        if not labels:
            return None
        gold = {key: row["label"] for category in labels for key, row in _rows(labels[category], category)}
        images = ImageFolder(find_folder(path, "val2014", "images"))
        questions = []
        for number, row in enumerate(read_jsonl(path), start=1):
            need(row, ("question_id", "image", "text", "category"), path, number)
            text = strip_suffix(row["text"])
            label = gold.get((row["category"], row["image"], text))
            if label is None:
                raise DataError(f"{path}, question {row['question_id']}: no gold answer in coco_pope_*.json")
            questions.append(
                _question(
                    row["question_id"], images[row["image"]], row["image"], text, label, [row["category"]]
                )
            )
        return questions

    def _release(self, root: Path) -> list[Question] | None:
        labels = _label_files(root)
        if not labels:
            return None
        images = ImageFolder(find_folder(root, "val2014", "images", "../val2014"))
        return [
            _question(
                f"{category}/{row['question_id']}",
                images[row["image"]],
                row["image"],
                row["text"],
                row["label"],
                [category],
            )
            for category, path in labels.items()
            for _, row in _rows(path, category)
        ]

    def _table(self, root: Path) -> list[Question] | None:
        rows = table_rows(root, ("POPE.tsv", "*.tsv"), ("data/test-*.parquet", "Full/*.parquet", "*.parquet"))
        if rows is None:
            return None
        questions = []
        for number, row in enumerate(rows, start=1):
            need(row, ("image", "question", "answer", "category"), root, number)
            categories = str(row["category"]).lower().split(",")
            own = row.get("index", row.get("question_id", number))
            # the parquet numbers each category from the start; the TSV holds a question once for them all
            identity = str(own) if "index" in row else f"{categories[0]}/{own}"
            source = row.get("image_source") or row.get("image_path") or row["image"].name
            questions.append(
                _question(identity, row["image"], str(source), row["question"], row["answer"], categories)
            )
        return questions

    def hits(self, questions: Sequence[Question], predictions: Predictions, dialect: str) -> list[bool]:
        """Read answer equals gold."""
        return [read_answer(predictions.texts[q.id], dialect) == q.answer for q in questions]

    def figures(
        self,
        questions: Sequence[Question],
        hits: Sequence[bool],
        predictions: Predictions,
        dialect: str,
    ) -> dict[str, Any]:
        """Accuracy, precision, recall, F1 and share of yes in percent, per category, and means over those.

        A share over nothing is 0, where the official tool divides by zero. VLMEvalKit's figures over all rows
        are ``overall``; its own "Overall" is that F1. lmms-eval's ``yes_ratio`` is of the gold answers:
        ``gold_yes_rate``.
        """
        rows = [
            (category, q.answer, read_answer(predictions.texts[q.id], dialect))
            for q in questions
            for category in q.details["categories"]
        ]
        present = [name for name in CATEGORIES if any(row[0] == name for row in rows)]
        per_category = {
            name: _rates([(gold, read) for category, gold, read in rows if category == name], dialect)
            for name in present
        }
        overall = _rates([(gold, read) for _, gold, read in rows], dialect)
        means = {
            figure: sum(own[figure] for own in per_category.values()) / len(per_category)
            for figure in ("accuracy", "precision", "recall", "f1", "yes_rate")
        }
        return {
            **means,
            "overall": overall,
            "per_category": per_category,
            "missing_categories": [name for name in CATEGORIES if name not in present],
        }

    def statistic(self, questions: Sequence[Question], hits: Sequence[float]) -> Statistic:
        """Mean over categories of accuracy; a question of several counts in each."""
        entries = [
            (q.image_id, hit, category)
            for q, hit in zip(questions, hits, strict=True)
            for category in q.details["categories"]
        ]
        units, values, categories = zip(*entries, strict=True)
        return mean_over_parts(units, values, categories)

    def headline(self, scores: Mapping[str, Any]) -> str:
        """Mean F1 / accuracy with one decimal."""
        return f"{scores['f1']:.1f} / {scores['accuracy']:.1f}"

    def read_predictions(self, path: Path, questions: Sequence[Question]) -> Predictions:
        """Read raw answers (jsonl) or a folder of ``<category>.json`` (see :meth:`write_submission`)."""
        path = Path(path)
        if not path.is_dir():
            return super().read_predictions(path, questions)
        texts: dict[str, str] = {}
        known = {q.id for q in questions}
        for category in CATEGORIES:
            file = path / f"{category}.json"
            if not file.is_file():
                continue
            rows = predictions_from_rows(read_jsonl(file), file, "question_id", ("answer",), converted=True)
            for own, text in rows.texts.items():
                texts[own if own in known else f"{category}/{own}"] = text
        return Predictions(texts, converted=True)

    def write_submission(self, folder: Path, questions: Sequence[Question], predictions: Predictions) -> Path:
        """Write ``pope_answers/<category>.json`` (lines of question and answer) for ``evaluate.py``."""
        results = Path(folder) / self.submission_name
        results.mkdir(parents=True, exist_ok=True)
        for category in CATEGORIES:
            chosen = [q for q in questions if category in q.details["categories"]]
            rows = [
                {
                    "question_id": number_or_text(q.id.removeprefix(f"{category}/")),
                    "question": q.text,
                    "answer": predictions.texts[q.id],
                }
                for q in chosen
            ]
            if rows:
                write_jsonl(results / f"{category}.json", rows)
        return results


def read_answer(text: str, dialect: str) -> str:
    """What a tool takes an answer for: "yes", "no", or "other" (never so by the original rule).

    ``original``: in the first sentence, commas dropped, one of the words "No", "not", "no" between blanks is
    no; all else is yes, also "NO", "No!" and an empty answer. ``lmms``: the whole answer. ``vlmevalkit``:
    exactly one of the words yes and no.
    """
    if dialect == "vlmevalkit":
        return yes_no_words(text)
    if dialect == "lmms":
        answer = text.lower().strip()
        return answer if answer in ("yes", "no") else "other"
    words = text.split(".")[0].replace(",", "").split(" ")
    return "no" if {"No", "not", "no"} & set(words) else "yes"


def _rates(pairs: Sequence[tuple[str, str]], dialect: str) -> dict[str, Any]:
    true_yes = sum(gold == read == "yes" for gold, read in pairs)
    false_yes = sum(gold == "no" and read == "yes" for gold, read in pairs)
    # lmms-eval leaves answers that are neither yes nor no out of recall
    missed = sum(
        gold == "yes" and (read == "no" if dialect == "lmms" else read != "yes") for gold, read in pairs
    )
    precision, recall = _share(true_yes, true_yes + false_yes), _share(true_yes, true_yes + missed)
    return {
        "accuracy": percent([gold == read for gold, read in pairs]),
        "precision": precision,
        "recall": recall,
        "f1": 2 * precision * recall / (precision + recall) if precision + recall else 0.0,
        "yes_rate": percent([read == "yes" for _, read in pairs]),
        "gold_yes_rate": percent([gold == "yes" for gold, _ in pairs]),
        "num_neither_yes_nor_no": sum(read == "other" for _, read in pairs),
        "num_questions": len(pairs),
    }


def _share(part: int, whole: int) -> float:
    return 100.0 * part / whole if whole else 0.0


def _label_files(root: Path) -> dict[str, Path]:
    found = {
        category: find_file(root, f"coco_pope_{category}.json", f"coco/coco_pope_{category}.json")
        for category in CATEGORIES
    }
    return {category: path for category, path in found.items() if path is not None}


def _rows(path: Path, category: str) -> list[tuple[tuple[str, str, str], dict[str, Any]]]:
    rows = []
    for number, row in enumerate(read_jsonl(path), start=1):
        need(row, ("question_id", "image", "text"), path, number)
        if row.get("label") not in ("yes", "no"):
            raise DataError(
                f"{path}, question {row['question_id']}: no gold answer: expected label yes or no, "
                f"found {row.get('label')!r}"
            )
        rows.append(((category, row["image"], row["text"]), row))
    return rows


def _question(
    question_id: Any, image: Any, image_id: str, text: str, label: str, categories: Sequence[str]
) -> Question:
    answer = label.strip().lower()
    unknown = [category for category in categories if category not in CATEGORIES]
    if answer not in ("yes", "no") or unknown:
        raise DataError(
            f"question {question_id}: expected yes or no and categories of {', '.join(CATEGORIES)}, "
            f"found {label!r} and {name_some(categories)}"
        )
    return Question(
        id=str(question_id),
        image=image,
        text=text,
        answer=answer,
        image_id=image_id,
        kind=categories[0],
        details={"categories": tuple(categories)},
    )
