"""What RefCOCO, RefCOCO+ and RefCOCOg share: the thing that an expression means, answered by a box.

Right is an overlap of 0.5 or more (:mod:`dyvte.tasks.answers.boxes`). Every expression is a question. The
splits of a data set are scored apart, and their mean is the figure, as VLMEvalKit averages.

The release stores its expressions in Python pickles (``refs(unc).p``), which are not read here: they can
run any code. Their content as JSON is.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

from dyvte.errors import DataError
from dyvte.readers.files import ImageFolder, find_file, find_folder, is_file, table_images
from dyvte.readers.rows import Row, read_jsonl, read_rows
from dyvte.readers.tables import PackedImage
from dyvte.tasks.answers.boxes import (
    CONVENTIONS,
    Box,
    Size,
    find_box,
    lmms_box,
    original_box,
    overlap,
    vlmevalkit_box,
)
from dyvte.tasks.base import Benchmark, Predictions, Question
from dyvte.tasks.metrics import breakdown, percent
from dyvte.tasks.records import ImageSource, image_size
from dyvte.tasks.statistics import Statistic, mean_over_parts

REQUEST = "Please provide the bounding box coordinate of the region this sentence describes: "
"""LLaVA's, as in its instruction data."""
_SPLITS = {"val": "val", "test": "test", "testa": "testA", "testb": "testB"}
_FOLDERS = ("train2014", "images", "images/train2014", "../images/mscoco/images/train2014", "coco/train2014")


class GroundingBenchmark(Benchmark):
    """Boxes for expressions; a subclass says what its files are called.

    Attributes
    ----------
    refs : tuple of str
        Patterns of the release's expressions, as JSON.
    lines : str
        Pattern of Qwen-VL's files of lines.
    """

    refs: ClassVar[tuple[str, ...]] = ()
    lines: ClassVar[str] = ""

    suffix: ClassVar[str] = ""
    max_new_tokens: ClassVar[int] = 64
    score_name: ClassVar[str] = "overlap of 0.5, %"
    shards: ClassVar[tuple[str, ...]] = ("data/*.parquet", "*.parquet")
    columns: ClassVar[tuple[tuple[str, ...], ...]] = (("answer",),)
    shard_columns: ClassVar[tuple[str | tuple[str, ...], ...]] = ("bbox", "file_name")

    def sources(self):
        """Qwen-VL's lines, the release as JSON, tables."""
        return self._lines, self._release, self.table

    def layout_error(self, root: Path, problem: str) -> DataError:
        """Also says what to do about a release of pickles."""
        if root.is_dir() and any(root.glob("refs(*).p")):
            problem += (
                ". Its refs(...).p is a Python pickle, which is not read: it can run any code. If you trust "
                'it, write its content as JSON: python -c "import json, pickle, sys; '
                "json.dump(pickle.load(open(sys.argv[1], 'rb')), open(sys.argv[1] + '.json', 'w'))\" FILE"
            )
        return super().layout_error(root, problem)

    def _lines(self, root: Path) -> list[Question] | None:
        files = [root] if root.is_file() else sorted(root.glob(self.lines))
        files = [path for path in files if path.suffix == ".jsonl" and path.is_file()]
        if not files:
            return None
        questions = []
        for path in files:
            split = path.stem.rsplit("_", 1)[-1]
            beside = ImageFolder(find_folder(path, *_FOLDERS))
            for number, row in enumerate(read_jsonl(path)):
                name = row.text("image")
                bare = name.rsplit("/", 1)[-1]
                # as the file names it, else, as on the machine of whoever made it, by its last part
                here = not name.startswith("/") and is_file(path.parent / name)
                image = ImageFolder(path.parent).of(row, name) if here else beside.of(row, bare)
                size, box = _stated_size(row), _box(row, row.need("bbox"))
                identity = f"{split}_{number}"
                questions.append(_question(row, identity, row.text("sent"), image, bare, split, box, size))
        return questions

    def _release(self, root: Path) -> list[Question] | None:
        path = find_file(root, *self.refs)
        if path is None:
            return None
        about = path.with_name("instances.json")
        shown = {row.identity("id"): row for row in read_rows(about, "images")}
        boxes = {row.identity("id"): row for row in read_rows(about, "annotations")}
        images = ImageFolder(find_folder(path, *_FOLDERS))
        questions = []
        for row in read_rows(path):
            if row.text("split") not in _SPLITS.values():
                continue
            image, found = shown.get(row.identity("image_id")), boxes.get(row.identity("ann_id"))
            if image is None or found is None:
                raise row.error(f"{about} lacks its image or its annotation")
            name, box = image.text("file_name"), _corners(_box(found, found.need("bbox")))
            size = image.integer("width"), image.integer("height")
            for sentence in row.rows("sentences"):
                identity, text = sentence.identity("sent_id"), sentence.text("sent")
                where = images.of(image, name)
                questions.append(_question(row, identity, text, where, name, row.text("split"), box, size))
        return questions

    def table(self, root: Path) -> list[Question] | None:
        """A row of parquet holds all expressions of a thing, one of the TSV one."""
        questions = super().table(root)
        if questions is None:
            return None
        return [one for q in questions for one in q.details.get("expressions", [q])]

    def table_question(self, row: Row, number: int, base: Path) -> Question | None:
        """Of this data set; VLMEvalKit's table holds three."""
        images = table_images(row, base)
        image = images[0] if images else None
        if row.value("bbox") is not None and row.value("file_name") is not None:
            return self._of_parquet(row, number, image)
        stated = row.text("split", "category", default=self.title)
        name, *rest = re.split(r"[\s_]+", stated.strip(), maxsplit=1)
        if name != self.title:
            return None
        split = _SPLITS.get(re.sub(r"[\s_-]+", "", "".join(rest)).lower(), "".join(rest))
        size = _stated_size(row)
        gold = vlmevalkit_gold(row, size or (1, 1))
        index = row.identity("index", default=str(number))
        identity, text = (f"{name}_{split}_{index}" if split else index), row.text("question")
        image_id = row.identity("image_path", default=images[0].name if images else index)
        return _question(row, identity, text, image, image_id, split, gold, size, request="")

    def _of_parquet(self, row: Row, number: int, image: ImageSource | None) -> Question:
        name, box = row.text("file_name"), _corners(_box(row, row.need("bbox")))
        split = row.text("split", default="")
        if isinstance(image, PackedImage) and not split:
            split = image.file.name.split("-")[0]  # val-00000-of-00002.parquet
        identity, size = row.identity("question_id", default=str(number)), _stated_size(row)
        bare = re.sub(r"(COCO_\w+_\d{12})_\d+", r"\1", name)  # the same image for every thing on it
        own = [
            _question(row, f"{identity}_{n}", text, image, bare, split, box, size)
            for n, text in enumerate(row.several("answer"))
            if text is not None
        ]
        if not own:
            raise row.error("no expression")
        return replace(own[0], details={**own[0].details, "expressions": own})

    # --- scores -------------------------------------------------------------------------------------

    def overlaps(self, questions: Sequence[Question], predictions: Predictions, dialect: str) -> list[float]:
        """The overlap of every answer's box with the gold box, as the tool of ``dialect`` reads it."""
        sizes: dict[str, Size] = {}
        return [
            _overlap(predictions.texts[q.id], q.details["box"], _size(q, sizes), dialect) for q in questions
        ]

    def hits(self, questions: Sequence[Question], predictions: Predictions, dialect: str) -> list[bool]:
        """An overlap of 0.5 or more."""
        return [value >= 0.5 for value in self.overlaps(questions, predictions, dialect)]

    def metrics(
        self, questions: Sequence[Question], hits: Sequence[bool], predictions: Predictions, dialect: str
    ) -> dict[str, Any]:
        """The mean over splits, each split, the mean overlap, and what the score would be if every number
        were of one convention."""
        per_split = breakdown([q.kind for q in questions], hits)
        texts = [predictions.texts[q.id] for q in questions]
        return {
            "accuracy": sum(one["accuracy"] for one in per_split.values()) / max(len(per_split), 1),
            "per_split": per_split,
            "mean_overlap": percent(self.overlaps(questions, predictions, dialect)),
            "num_without_box": sum(find_box(text) is None for text in texts),
            "accuracy_by_convention": self._by_convention(questions, texts),
        }

    def _by_convention(self, questions: Sequence[Question], texts: Sequence[str]) -> dict[str, float]:
        sizes: dict[str, Size] = {}
        right: dict[str, list[bool]] = {name: [] for name in CONVENTIONS}
        for q, text in zip(questions, texts, strict=True):
            found = find_box(text)
            for name, pixels in CONVENTIONS.items():
                box = pixels(found[0], _size(q, sizes)) if found else None
                right[name].append(box is not None and overlap(box, q.details["box"]) >= 0.5)
        return {name: percent(hits) for name, hits in right.items()}

    def statistic(self, questions: Sequence[Question], hits: Sequence[float]) -> Statistic:
        """The mean over splits; an image is drawn with all its expressions."""
        return mean_over_parts([q.image_id for q in questions], hits, [q.kind for q in questions])

    def stratum(self, question: Question) -> str:
        """Splits share no image."""
        return question.kind

    def submission(self, questions: Sequence[Question], predictions: Predictions) -> Any:
        """What Qwen-VL's ``evaluate_grounding.py`` collects, and the question's id."""
        sizes: dict[str, Size] = {}
        return [
            {
                "question_id": q.id,
                "answer": predictions.texts[q.id].strip(),
                "gt_bbox": list(q.details["box"]),
                "hw": list(reversed(_size(q, sizes))),
            }
            for q in questions
        ]


def _overlap(text: str, gold: Box, size: Size, dialect: str) -> float:
    if dialect == "lmms":
        width, height = size
        shares = gold[0] / width, gold[1] / height, gold[2] / width, gold[3] / height
        return overlap(lmms_box(text), shares)
    box = vlmevalkit_box(text, size) if dialect == "vlmevalkit" else original_box(text, size)
    return 0.0 if box is None else overlap(box, gold)


def vlmevalkit_gold(row: Row, size: Size) -> Box:
    """The gold box of VLMEvalKit's table: columns of corners, else an answer in shares or pixels."""
    corners = ("bbox_x1", "bbox_y1", "bbox_x2", "bbox_y2")
    if all(row.value(name) is not None for name in corners):
        return _box(row, [row.text(name) for name in corners])
    found = re.findall(r"[-+]?\d*\.?\d+(?:[eE][-+]?\d+)?", row.text("answer"))[:4]
    box = _box(row, found)
    if max(map(abs, box)) > 1.5:
        return box
    return box[0] * size[0], box[1] * size[1], box[2] * size[0], box[3] * size[1]


def _box(row: Row, value: Any) -> Box:
    """Four finite numbers."""
    try:
        left, top, third, fourth = (float(number) for number in value if not isinstance(value, str))
        box = left, top, third, fourth
        if all(abs(number) < 1e9 for number in box):
            return box
    except (TypeError, ValueError, OverflowError):
        pass
    raise row.error(f"{value!r} is no box: expected four numbers")


def _corners(box: Box) -> Box:
    """Of a box that is stored as corner, width and height."""
    return box[0], box[1], box[0] + box[2], box[1] + box[3]


def _stated_size(row: Row) -> Size | None:
    if row.value("width") is None or row.value("height") is None:
        return None
    return row.integer("width"), row.integer("height")


def _size(question: Question, known: dict[str, Size]) -> Size:
    """Width and height: as stated, else of the image."""
    stated = question.details["size"]
    if stated is not None:
        return stated
    if question.image_id not in known:
        known[question.image_id] = image_size(
            question,
            "boxes are scored in pixels, and its table states neither the width and height of the image nor "
            "holds it",
        )
    return known[question.image_id]


def _question(
    row: Row,
    identity: str,
    expression: str,
    image: ImageSource | None,
    image_id: str,
    split: str,
    box: Box,
    size: Size | None,
    request: str = REQUEST,
) -> Question:
    if size is not None and min(size) <= 0:
        raise row.error(f"an image of {size[0]} x {size[1]} pixels")
    return Question(
        id=identity,
        image=image,
        text=f"{request}{expression.strip()}",
        answer="[{:.2f}, {:.2f}, {:.2f}, {:.2f}]".format(*box),
        image_id=f"{split}/{image_id}",
        kind=split,
        details={"box": box, "size": size, "expression": expression},
    )
