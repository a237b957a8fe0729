"""ReasonSeg: segment what a question that must be reasoned about means (Lai et al., 2023, LISA).

Sources: ``utils/data_processing.py`` (masks of polygons), ``utils/dataset.py`` (``ValDataset``: prompts, the
first text of an image) and ``train_ds.py`` (``validate``: gIoU, cIoU) of LISA. Polygons are painted from the
largest to the smallest, "ignore" as 255, "flag" not at all, everything else as the target; pixels of 255
count nowhere. gIoU is the mean of the images' overlaps, 1 where neither mask nor target has a pixel; cIoU the
sum of the intersections over the sum of the unions.

An answer holds its mask as COCO's run lengths (:mod:`dyvte.tasks.answers.masks`); an answer without one is an
empty mask.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dyvte.errors import DataError, ScoreError
from dyvte.readers.files import IMAGE_EXTENSIONS
from dyvte.readers.rows import Row, read_json, shown
from dyvte.tasks.answers.masks import FARTHEST, filled_polygon, find_mask
from dyvte.tasks.base import TASKS, Benchmark, Predictions, Question
from dyvte.tasks.metrics import percent
from dyvte.tasks.records import image_size
from dyvte.tasks.statistics import Statistic, group_index

REQUEST = " Please output segmentation mask."
_IGNORED = 255


@TASKS.register
class ReasonSeg(Benchmark):
    """Validation or test, one query for each image."""

    name = "reasonseg"
    title = "ReasonSeg"
    suffix = REQUEST
    dialects = ("original",)
    max_new_tokens = 32
    wants_masks = True
    score_name = "gIoU, %"
    headline_metrics = ("giou", "ciou")
    submission_name = "reasonseg_masks.json"
    expected_tree = (
        "  <root>/val/<image>.jpg, <image>.json       release (shapes, text, is_sentence); or test/\n"
        "  or <root>/<image>.jpg, <image>.json        one split's folder"
    )

    def sources(self):
        """The release."""
        return (self._release,)

    def _release(self, root: Path) -> list[Question] | None:
        if not root.is_dir():
            return None
        splits = [root / name for name in ("val", "test") if any((root / name).glob("*.json"))]
        if len(splits) > 1:
            raise DataError(f"{root} holds val and test, which are scored apart: name the folder of one")
        folder = splits[0] if splits else root
        questions = []
        for path in sorted(folder.glob("*.json")):
            row = _annotation(path)
            if "shapes" in row:
                questions.append(_question(row, path))
        return questions or None

    def prompt(self, question: Question, suffix: str | None = None) -> str:
        """The sentence, or "What is ... in this image?" around a phrase; with a suffix, the query as it is.

        Parameters
        ----------
        question
            Of this benchmark.
        suffix
            Appended to the query; None: LISA's request.
        """
        if suffix is not None:
            return question.text + suffix
        asked = question.text if question.kind == "long" else f"What is {question.text} in this image?"
        return asked + self.suffix

    # --- scores -------------------------------------------------------------------------------------

    def areas(self, questions: Sequence[Question], predictions: Predictions) -> np.ndarray:
        """(B, 2) pixels of intersection and of union, those to be ignored left out.

        Parameters
        ----------
        questions, predictions
            As for `hits`.

        Raises
        ------
        ScoreError
            An answer's mask that is none, or of another size than its image; it is named.
        """
        found = []
        for question in questions:
            truth = true_mask(question)
            mask = _mask(question, predictions.texts[question.id], truth.shape)
            counted = truth != _IGNORED
            target, own = (truth == 1) & counted, mask & counted
            found.append(((target & own).sum(), (target | own).sum()))
        return np.array(found, dtype=np.float64).reshape(-1, 2)

    def hits(self, questions: Sequence[Question], predictions: Predictions, dialect: str) -> list[float]:
        """The overlap of every image's mask; as in LISA, over the union and 1e-5."""
        shared_B, union_B = self.areas(questions, predictions).T
        return np.where(union_B == 0, 1.0, shared_B / (union_B + 1e-5)).tolist()

    def metrics(
        self, questions: Sequence[Question], hits: Sequence[float], predictions: Predictions, dialect: str
    ) -> dict[str, Any]:
        """gIoU and cIoU over all, and of short and long queries."""
        areas_B2 = self.areas(questions, predictions)
        kinds = np.array([q.kind for q in questions])
        scored = {
            kind: {
                "giou": percent([hit for hit, own in zip(hits, kinds, strict=True) if own == kind]),
                "ciou": _cumulative(areas_B2[kinds == kind]),
                "num_questions": int((kinds == kind).sum()),
            }
            for kind in dict.fromkeys(kinds.tolist())
        }
        without = sum(find_mask(predictions.texts[q.id]) is None for q in questions)
        ciou = _cumulative(areas_B2)
        return {"giou": percent(hits), "ciou": ciou, "per_kind": scored, "num_without_mask": without}

    def cumulative_statistic(self, questions: Sequence[Question], predictions: Predictions) -> Statistic:
        """cIoU as a function of how often each image was drawn (:meth:`statistic` is that of gIoU).

        Parameters
        ----------
        questions, predictions
            As for `hits`.
        """
        groups_B, num_units = group_index([q.image_id for q in questions])
        areas_G2 = np.zeros((num_units, 2))
        np.add.at(areas_G2, groups_B, self.areas(questions, predictions))

        def statistic(weights_RG: np.ndarray) -> np.ndarray:
            shared_R, union_R = (weights_RG @ areas_G2).T
            return 100.0 * shared_R / (union_R + 1e-10)

        return statistic


def true_mask(question: Question) -> np.ndarray:
    """(H, W) uint8: 1 the target, 255 to be ignored, else 0.

    Parameters
    ----------
    question
        Of this benchmark; its image says how large the mask is.
    """
    width, height = image_size(question, "masks have the size of their image, which is not there")
    painted = [
        (ignored, filled_polygon(points, (height, width))) for ignored, points in question.details["shapes"]
    ]
    areas = [int(mask.sum()) for _, mask in painted]
    truth = np.zeros((height, width), dtype=np.uint8)
    for index in np.argsort(areas)[::-1]:
        ignored, mask = painted[index]
        truth[mask] = _IGNORED if ignored else 1
    return truth


def _cumulative(areas_B2: np.ndarray) -> float:
    shared, union = areas_B2.sum(0)
    return float(100.0 * shared / (union + 1e-10))


def _mask(question: Question, text: str, size: tuple[int, ...]) -> np.ndarray:
    try:
        mask = find_mask(text)
    except ValueError as problem:
        raise ScoreError(f"question {question.id}: {problem}") from problem
    if mask is not None and mask.shape != size:
        raise ScoreError(
            f"question {question.id}: a mask of {mask.shape[0]} x {mask.shape[1]} pixels (height, width), "
            f"its image has {size[0]} x {size[1]}"
        )
    return np.zeros(size, dtype=bool) if mask is None else mask


def _annotation(path: Path) -> Row:
    """A file of the release; some are not UTF-8 but Windows-1252, as LISA reads them then."""
    try:
        content = read_json(path)
    except DataError:
        try:
            content = json.loads(path.read_bytes().decode("cp1252"))
        except ValueError:
            content = None
        if content is None:
            raise
    if not isinstance(content, dict):
        raise DataError(f"{path}: expected an object, found {shown(content)}")
    return Row(content, path)


def _question(row: Row, path: Path) -> Question:
    files = [path.with_suffix(ending) for ending in IMAGE_EXTENSIONS]
    texts = [text for text in row.several("text") if text is not None]
    if not texts:
        raise row.error("no text")
    shapes = []
    for shape in row.rows("shapes"):
        label = shape.text("label").lower()
        if label != "flag":
            shapes.append(("ignore" in label, _points(shape)))
    return Question(
        id=path.stem,
        image=next((file for file in files if file.is_file()), files[0]),
        text=texts[0].strip(),
        answer=json.dumps(row["shapes"]),
        image_id=path.stem,
        kind="long" if row.value("is_sentence") else "short",
        details={"shapes": shapes},
    )


def _points(shape: Row) -> list[list[float]]:
    """One or more finite points (x, y)."""
    value = shape.need("points")
    try:
        points = [[float(x), float(y)] for x, y in value]
        if points and all(abs(number) <= FARTHEST for point in points for number in point):
            return points
    except (TypeError, ValueError):
        pass
    raise shape.error(
        f"'points' is {shown(value)}: expected a list of points [x, y] within {FARTHEST} pixels"
    )
