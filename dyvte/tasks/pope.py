"""POPE: does the model see objects that are not there (Li et al., 2023).

Yes/no questions about objects in COCO images, in three draws of the absent objects: random, popular,
adversarial. Sources: ``evaluate.py`` of AoiDragon/POPE, which LLaVA's ``eval_pope.py`` repeats per category
(``original``); ``lmms_eval/tasks/pope/utils.py`` (``lmms``); ``POPE_rating`` and ``YOrN_Extraction`` in
``vlmeval/dataset/utils/yorn.py``, exact matching (``vlmevalkit``). The official tool joins answers and labels
by line; here they are joined by id, and a missing answer is an error.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dyvte.formatting import name_some
from dyvte.readers.files import ImageFolder, find_file, find_folder, table_images
from dyvte.readers.rows import Row, read_jsonl
from dyvte.tasks.answers.yes_no import yes_no_words
from dyvte.tasks.base import TASKS, Benchmark, Predictions, Question
from dyvte.tasks.metrics import percent
from dyvte.tasks.predictions import collected
from dyvte.tasks.prompts import strip_suffix
from dyvte.tasks.records import ImageSource
from dyvte.tasks.statistics import Statistic, mean_over_parts
from dyvte.tasks.writing import number_or_text, write_jsonl

CATEGORIES = ("random", "popular", "adversarial")


@TASKS.register
class POPE(Benchmark):
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

    tables = ("POPE.tsv", "*pope*.tsv")
    shards = ("data/test-*.parquet", "Full/*.parquet", "*.parquet")
    columns = (("question",), ("answer",), ("category",))
    headline_metrics = ("f1", "accuracy")

    def sources(self):
        """LLaVA's question file, the release, tables."""
        return self._llava, self._release, self.table

    def _llava(self, root: Path) -> list[Question] | None:
        path = find_file(root, "llava_pope_test.jsonl")
        labels = _label_files(path.parent) if path is not None else {}
        if path is None or not labels:
            return None
        gold = {
            (category, row.text("image"), row.text("text")): row.value("label")
            for category, file in labels.items()
            for row in read_jsonl(file)
        }
        images = ImageFolder(find_folder(path, "val2014", "images"))
        questions = []
        for row in read_jsonl(path):
            category, image, text = row.text("category"), row.text("image"), strip_suffix(row.text("text"))
            label = gold.get((category, image, text))
            if label is None:
                raise row.error("no gold answer in coco_pope_*.json")
            labelled = Row({**row, "label": label}, row.where)
            identity = row.identity("question_id")
            questions.append(_question(labelled, identity, images.of(row, image), image, text, [category]))
        return questions

    def _release(self, root: Path) -> list[Question] | None:
        labels = _label_files(root)
        if not labels:
            return None
        images = ImageFolder(find_folder(root, "val2014", "images", "../val2014"))
        questions = []
        for category, path in labels.items():
            for row in read_jsonl(path):
                image, identity = row.text("image"), f"{category}/{row.identity('question_id')}"
                file = images.of(row, image)
                questions.append(_question(row, identity, file, image, row.text("text"), [category]))
        return questions

    def table_question(self, row: Row, number: int, base: Path) -> Question:
        """The parquet numbers each category from the start; the TSV holds a question once for them all."""
        categories = [name.strip() for name in row.text("category").lower().split(",")]
        own = row.identity("index", "question_id", default=str(number))
        images = table_images(row, base)
        source = row.text("image_source", "image_path", default=images[0].name if images else own)
        return _question(
            row,
            own if row.value("index") is not None else f"{categories[0]}/{own}",
            images[0] if images else None,
            source,
            row.text("question"),
            categories,
        )

    def hits(self, questions: Sequence[Question], predictions: Predictions, dialect: str) -> list[bool]:
        """Read answer equals gold."""
        return [
            read_answer(predictions.texts[q.id], dialect, predictions.converted) == q.answer
            for q in questions
        ]

    def metrics(
        self,
        questions: Sequence[Question],
        hits: Sequence[bool],
        predictions: Predictions,
        dialect: str,
    ) -> dict[str, Any]:
        """Accuracy, precision, recall, F1 and share of yes in percent, per category, and means over those.

        A share over nothing is 0, where the official tool divides by zero. VLMEvalKit's metrics over all rows
        are ``overall``; its own "Overall" is that F1. lmms-eval's ``yes_ratio`` is of the gold answers:
        ``gold_yes_rate``.
        """
        rows = [
            (category, q.answer, read_answer(predictions.texts[q.id], dialect, predictions.converted))
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
            metric: sum(own[metric] for own in per_category.values()) / len(per_category)
            for metric in ("accuracy", "precision", "recall", "f1", "yes_rate")
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

    def read_predictions(self, path: Path, questions: Sequence[Question]) -> Predictions:
        """Read raw answers or a folder of ``<category>.json`` (see :meth:`write_submission`)."""
        path = Path(path)
        if not path.is_dir():
            return super().read_predictions(path, questions)
        texts: dict[str, str] = {}
        known = {q.id for q in questions}
        for category in CATEGORIES:
            file = path / f"{category}.json"
            if not file.is_file():
                continue
            rows = collected(read_jsonl(file), ("question_id",), ("answer",), converted=True)
            for own, text in rows.texts.items():
                texts[own if own in known else f"{category}/{own}"] = text
        return Predictions(texts, converted=True)

    def write_submission(self, folder: Path, questions: Sequence[Question], predictions: Predictions) -> Path:
        """Write ``pope_answers/<category>.json`` (lines of question and answer) for ``evaluate.py``."""
        results = Path(folder) / self.submission_name
        for category in CATEGORIES:
            chosen = [q for q in questions if category in q.details["categories"]]
            rows = [
                {
                    "question_id": number_or_text(q.id.removeprefix(f"{category}/")),
                    "question": q.text,
                    "answer": _as_written(predictions.texts[q.id], predictions.converted),
                }
                for q in chosen
            ]
            if rows:
                write_jsonl(results / f"{category}.json", rows)
        return results


def read_answer(text: str, dialect: str, converted: bool = False) -> str:
    """What a tool takes an answer for: "yes", "no", or "other" (never so by the original rule).

    ``original``: in the first sentence, commas dropped, one of the words "No", "not", "no" between blanks is
    no; all else is yes, also "NO", "No!" and an empty answer. LLaVA writes answers without outer blanks and
    line breaks: so they are read, unless they come from a submission file. ``lmms``: the whole answer.
    ``vlmevalkit``: exactly one of the words yes and no.

    Parameters
    ----------
    text
        The answer.
    dialect
        Whose rule.
    converted
        Does it come from a submission file?
    """
    if dialect == "vlmevalkit":
        return yes_no_words(text)
    if dialect == "lmms":
        answer = text.lower().strip()
        return answer if answer in ("yes", "no") else "other"
    words = _as_written(text, converted).split(".")[0].replace(",", "").split(" ")
    return "no" if {"No", "not", "no"} & set(words) else "yes"


def _as_written(text: str, converted: bool) -> str:
    return text if converted else text.strip()


def _rates(pairs: Sequence[tuple[str, str]], dialect: str) -> dict[str, Any]:
    true_yes = sum(gold == read == "yes" for gold, read in pairs)
    false_yes = sum(gold == "no" and read == "yes" for gold, read in pairs)
    # lmms-eval excludes answers that are neither yes nor no from recall
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


def _question(
    row: Row, identity: str, image: ImageSource | None, image_id: str, text: str, categories: Sequence[str]
) -> Question:
    label = row.value("label", "answer")
    answer = label.strip().lower() if isinstance(label, str) else None
    unknown = [category for category in categories if category not in CATEGORIES]
    if answer not in ("yes", "no") or unknown:
        raise row.error(
            f"no gold answer of POPE: expected yes or no and categories of {', '.join(CATEGORIES)}, "
            f"found {label!r} and {name_some(categories)}"
        )
    return Question(
        id=identity,
        image=image,
        text=text,
        answer=answer,
        image_id=image_id,
        kind=categories[0],
        details={"categories": tuple(categories)},
    )
