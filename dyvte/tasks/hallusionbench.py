"""HallusionBench: yes/no questions about images that mislead (Guan et al., 2024), those with an image.

The authors have a language model judge answers (``evaluation.py``); the counting is theirs, the reading
here is by rule: exactly one of the words yes and no (``original`` and ``vlmevalkit``, which is
``vlmeval/dataset/utils/yorn.py``), or "yes" anywhere (``lmms``: ``hb_aggregation_result_intern`` of
``lmms_eval/tasks/hallusion_bench/evaluate_hb.py``). Questions that are put without an image are excluded,
as both tools do.

Three metrics: questions right (aAcc), figures with all their questions right (fAcc), and questions right
about all figures of their set (qAcc).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dyvte.readers.files import ImageFolder, find_file, find_folder, table_images
from dyvte.readers.rows import Row, read_rows
from dyvte.tasks.answers.yes_no import yes_no_words
from dyvte.tasks.base import TASKS, Benchmark, Predictions, Question
from dyvte.tasks.metrics import breakdown, percent
from dyvte.tasks.predictions import answer_text, checked
from dyvte.tasks.records import ImageSource
from dyvte.tasks.statistics import Statistic, mean_statistic

_GOLDS = {"1": "yes", "0": "no", "yes": "yes", "no": "no"}


@TASKS.register
class HallusionBench(Benchmark):
    """Visual dependent and visual supplement questions."""

    name = "hallusionbench"
    title = "HallusionBench"
    unit = "set"
    score_name = "mean of aAcc, fAcc and qAcc, %"
    headline_metrics = ("aAcc", "fAcc", "qAcc")
    submission_name = "HallusionBench_result.json"
    expected_tree = (
        "  <root>/                                       release\n"
        "    HallusionBench.json\n"
        "    hallusion_bench/<VD|VS>/<subcategory>/<set>_<figure>.png   (or images/)\n"
        "  or <root>/data/image-*.parquet\n"
        "  or <root>/HallusionBench.tsv"
    )
    tables = ("HallusionBench.tsv", "*hallusion*.tsv")
    shards = ("data/image-*.parquet", "*.parquet")
    columns = (("question",), ("gt_answer", "answer"), ("category",), ("subcategory", "l2-category"))
    shard_columns = ("set_id", "figure_id")

    def sources(self):
        """The release, tables."""
        return self._release, self.table

    def _release(self, root: Path) -> list[Question] | None:
        path = find_file(root, "HallusionBench.json")
        if path is None:
            return None
        images = ImageFolder(find_folder(path, "hallusion_bench", "images"), (".png", ".jpg"))
        questions = []
        for row in read_rows(path):
            if row.identity("visual_input", default="1") != "0":
                named = "_".join((row.identity("set_id"), row.identity("figure_id")))
                name = "/".join((row.text("category"), row.text("subcategory"), named))
                questions.append(_question(row, images.of(row, name)))
        return questions

    def table_question(self, row: Row, number: int, base: Path) -> Question | None:
        """Parquet has the fields of the release; the TSV states set, figure and question in its index."""
        images = table_images(row, base)
        if row.identity("visual_input", default="1") == "0":
            return None
        if row.value("set_id") is None:
            parts = row.identity("index").split("_")
            if len(parts) < 3:
                raise row.error("its index does not end in _<set>_<figure>_<question>")
            ids = dict(zip(("set_id", "figure_id", "question_id"), parts[-3:], strict=True))
            row = Row({**row, **ids}, row.where)
        return _question(row, images[0] if images else None)

    def hits(self, questions: Sequence[Question], predictions: Predictions, dialect: str) -> list[bool]:
        """Read answer equals gold."""
        return [read_answer(predictions.texts[q.id], dialect) == q.answer for q in questions]

    def metrics(
        self, questions: Sequence[Question], hits: Sequence[bool], predictions: Predictions, dialect: str
    ) -> dict[str, Any]:
        """The three metrics in percent, their mean, and questions by category and subcategory."""
        both = {name: percent(_together(questions, hits, part, dialect)) for name, part in _PARTS.items()}
        shares = {"aAcc": percent(hits), **both}
        texts = [predictions.texts[q.id] for q in questions]
        return {
            **shares,
            "mean": sum(shares.values()) / 3,
            "num_neither_yes_nor_no": sum(read_answer(text, dialect) == "other" for text in texts),
            "per_category": breakdown([q.kind for q in questions], hits),
            "per_subcategory": breakdown([q.details["subcategory"] for q in questions], hits),
        }

    def statistic(self, questions: Sequence[Question], hits: Sequence[float]) -> Statistic:
        """The mean of the three metrics; a set is drawn with all its questions and figures."""
        parts = [mean_statistic([q.image_id for q in questions], hits)]
        for part in _PARTS.values():
            groups = _groups(questions, part, "original")
            units = [questions[own[0]].image_id for own in groups.values()]
            parts.append(mean_statistic(units, _together(questions, hits, part, "original")))
        return lambda weights_RG: sum(one(weights_RG) for one in parts) / len(parts)

    def submission(self, questions: Sequence[Question], predictions: Predictions) -> Any:
        """The release's records with ``model_prediction``, as ``evaluation.py`` reads them."""
        return [
            {**q.details["record"], "question": q.text, "model_prediction": predictions.texts[q.id].strip()}
            for q in questions
        ]

    def read_submission(self, path: Path, questions: Sequence[Question]) -> Predictions:
        """Records with ``model_prediction``; those without an image belong to no question here."""
        ids = {_identity(Row(q.details["record"], path)): q.id for q in questions}
        rows = {_identity(row): row for row in read_rows(path)}
        texts = {ids.get(key, key): answer_text(row, ("model_prediction",)) for key, row in rows.items()}
        return checked(texts, path, True)


_PARTS = {"fAcc": "figure_id", "qAcc": "question_id"}


def read_answer(text: str, dialect: str) -> str:
    """What a tool takes an answer for: "yes", "no", or "other" (never so by the rule of ``lmms``)."""
    if dialect == "lmms":
        return "yes" if "yes" in text.lower() else "no"
    return yes_no_words(text)


def _groups(questions: Sequence[Question], part: str, dialect: str) -> dict[tuple[str, ...], list[int]]:
    """Indices of the questions of one set that share a figure, or a question. VLMEvalKit tells sets by the
    subcategory alone, in which visual dependent and visual supplement ones may bear the same number."""
    groups: dict[tuple[str, ...], list[int]] = defaultdict(list)
    for n, q in enumerate(questions):
        record = q.details["record"]
        of_set = (q.details["subcategory"], record["set_id"]) if dialect == "vlmevalkit" else (q.image_id,)
        groups[(*of_set, record[part])].append(n)
    return groups


def _together(questions: Sequence[Question], hits: Sequence[float], part: str, dialect: str) -> list[bool]:
    return [all(hits[n] for n in own) for own in _groups(questions, part, dialect).values()]


def _identity(row: Row) -> str:
    names = ("category", "subcategory", "set_id", "figure_id", "question_id")
    return "_".join(row.identity(name) for name in names)


def _question(row: Row, image: ImageSource | None) -> Question:
    row = Row({**row, "subcategory": row.value("subcategory", "l2-category")}, row.where)
    gold = row.identity("gt_answer", "answer").strip().lower()
    if gold not in _GOLDS:
        raise row.error(f"no gold answer of HallusionBench: expected 0, 1, yes or no, found {gold!r}")
    ids = {name: row.identity(name) for name in ("set_id", "figure_id", "question_id")}
    kind, part = row.text("category"), row.text("subcategory")
    stated = {
        "category": kind,
        "subcategory": part,
        "visual_input": row.identity("visual_input", default="1"),
    }
    return Question(
        id=row.identity("index", default=_identity(row)),
        image=image,
        text=row.text("question"),
        answer=_GOLDS[gold],
        image_id="_".join((kind, part, ids["set_id"])),
        kind=kind,
        details={
            "subcategory": part,
            "record": {
                **stated,
                **ids,
                "gt_answer": "1" if _GOLDS[gold] == "yes" else "0",
                "gt_answer_details": row.text("gt_answer_details", default=""),
            },
        },
    )
