"""COCO captions with CHAIR (Rohrbach et al., 2018): objects that a caption names and the image does not
hold.

Sources: ``utils/chair.py`` of CHAIR; ``lmms_eval/tasks/coco_cap_chair/utils.py`` for the recall and for the
parquet. An image holds what COCO's instances and its human captions name. Lower is better for ``chair_s``
(captions with such an object) and ``chair_i`` (such objects of all named); the figure that intervals are of
is the share of captions without one. How words are read: :mod:`dyvte.tasks.answers.chair`.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dyvte.errors import DataError
from dyvte.readers.files import ImageFolder, find_file, find_folder, table_images
from dyvte.readers.rows import Row, read_rows, read_text
from dyvte.tasks.answers.chair import Objects
from dyvte.tasks.base import TASKS, Benchmark, Predictions, Question
from dyvte.tasks.metrics import percent
from dyvte.tasks.predictions import read_submitted
from dyvte.tasks.records import ImageSource
from dyvte.tasks.writing import number_or_text

_PROMPT = "Please describe this image in detail."
_HEAVY = ("segmentation", "bbox", "area", "license", "coco_url", "flickr_url", "date_captured")


@TASKS.register
class Chair(Benchmark):
    """Hallucinated objects in detailed descriptions."""

    name = "chair"
    title = "COCO captions (CHAIR)"
    suffix = ""
    max_new_tokens = 512
    dialects = ("original",)
    score_name = "captions without a hallucinated object, %"
    headline_metrics = ("chair_s", "chair_i", "recall")
    submission_name = "chair_captions.json"
    expected_tree = (
        "  <root>/                                     COCO's layout\n"
        "    annotations/captions_val2014.json, instances_val2014.json   (or *_all2014, *_val2017)\n"
        "    val2014/<file_name>                       (or images/)\n"
        "    synonyms.txt                              (CHAIR's; or data/synonyms.txt)\n"
        "  or <root>/data/test-*.parquet               (with gt_object), synonyms.txt"
    )
    shards = ("data/test-*.parquet", "*.parquet")
    columns = (("gt_object",),)

    def sources(self):
        """COCO's layout, the parquet of mscoco_chair."""
        return self._coco, self.table

    def _coco(self, root: Path) -> list[Question] | None:
        path = find_file(root, "annotations/captions_*.json", "captions_*.json")
        if path is None:
            return None
        objects, named = _objects(path.parent), path.name.removeprefix("captions_")
        about = path.with_name(f"instances_{named}")
        shown = read_rows(path, "images", _light)
        held = {row.identity("id"): set[str]() for row in shown}
        kinds = {row.identity("id"): row for row in read_rows(about, "categories", _light)}
        for row in read_rows(about, "annotations", _light):
            kind = kinds.get(row.identity("category_id"))
            if kind is None:
                raise row.error(f"no category {row.value('category_id')}")
            held.setdefault(row.identity("image_id"), set()).add(_object(kind, kind.text("name"), objects))
        for row in read_rows(path, "annotations", _light):
            held.setdefault(row.identity("image_id"), set()).update(objects.named(row.text("caption")))
        folder = find_folder(path.parent.parent, path.stem.split("_")[-1], "val2014", "images")
        images = ImageFolder(folder)
        ids = [row.identity("id") for row in shown]
        return [
            _question(identity, images.of(row, row.text("file_name")), held[identity], objects)
            for identity, row in zip(ids, shown, strict=True)
        ]

    def table(self, root: Path) -> list[Question] | None:
        """The objects of an image stand in its row."""
        questions = super().table(root)
        if questions is None:
            return None
        objects = _objects(root if root.is_dir() else root.parent)
        return [_question(q.id, q.image, q.details["objects"], objects) for q in questions]

    def table_question(self, row: Row, number: int, base: Path) -> Question:
        """An image and its objects."""
        images = table_images(row, base)
        held = {name.strip().lower() for name in row.several("gt_object") if name}
        identity = row.identity("question_id", "id", default=str(number))
        return _question(identity, images[0] if images else None, held, None)

    def hits(self, questions: Sequence[Question], predictions: Predictions, dialect: str) -> list[bool]:
        """No object is named that is not there."""
        return [_named(q, predictions) <= q.details["objects"] for q in questions]

    def metrics(
        self, questions: Sequence[Question], hits: Sequence[bool], predictions: Predictions, dialect: str
    ) -> dict[str, Any]:
        """CHAIR over captions and over objects, the recall of objects, and how long captions are."""
        num_named = num_wrong = num_found = num_there = 0
        for q in questions:
            named = q.details["synonyms"].named(predictions.texts[q.id])
            num_named += len(named)
            num_wrong += sum(name not in q.details["objects"] for name in named)
            num_found += len(q.details["objects"] & set(named))
            num_there += len(q.details["objects"])
        words = [len(predictions.texts[q.id].split()) for q in questions]
        return {
            "chair_s": 100.0 - percent(hits),
            "chair_i": 100.0 * num_wrong / max(num_named, 1),
            "recall": 100.0 * num_found / max(num_there, 1),
            "num_objects_named": num_named,
            "mean_words": sum(words) / max(len(words), 1),
        }

    def submission(self, questions: Sequence[Question], predictions: Predictions) -> Any:
        """COCO's list of captions."""
        return [
            {"image_id": number_or_text(q.id), "caption": predictions.texts[q.id].strip()} for q in questions
        ]

    def read_submission(self, path: Path, questions: Sequence[Question]) -> Predictions:
        """Rows of ``{"image_id", "caption"}``."""
        return read_submitted(path, "image_id", "caption")


def _light(items: list[tuple[str, Any]]) -> dict[str, Any]:
    """A record without what takes room and is not asked for."""
    return {key: value for key, value in items if key not in _HEAVY}


def _objects(folder: Path) -> Objects:
    names = ("synonyms.txt", "../synonyms.txt", "data/synonyms.txt", "../data/synonyms.txt")
    path = next((folder / name for name in names if (folder / name).is_file()), None)
    if path is None:
        raise DataError(
            f"{folder} has no synonyms.txt (nor the folder above): the objects to look for, one a line, each "
            "followed by its synonyms with commas between; CHAIR's repository has that of COCO"
        )
    lines = [[word for word in line.split(",") if word.strip()] for line in read_text(path).splitlines()]
    objects = Objects.of(line for line in lines if line)
    if not objects.name_of:
        raise DataError(f"{path} names no object")
    return objects


def _object(row: Row, name: str, objects: Objects) -> str:
    if name.strip().lower() not in objects.name_of:
        raise row.error(f"{name!r} is no object of synonyms.txt")
    return objects.name_of[name.strip().lower()]


def _named(question: Question, predictions: Predictions) -> set[str]:
    return set(question.details["synonyms"].named(predictions.texts[question.id]))


def _question(identity: str, image: ImageSource | None, held: set[str], objects: Objects | None) -> Question:
    return Question(
        id=identity,
        image=image,
        text=_PROMPT,
        answer=", ".join(sorted(held)),
        image_id=identity,
        kind="",
        details={"objects": frozenset(held), "synonyms": objects},
    )
