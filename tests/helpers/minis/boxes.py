"""Minis of boxes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.helpers.benchmark_parts import (
    SIZE,
    lines,
    picture,
    put,
    put_parquet,
    put_tsv,
)

THINGS = (
    ("the dog on the left", (1, 2, 9, 12), "val"),
    ("a dog", (1, 2, 9, 12), "val"),
    ("red cup", (0, 0, 4, 4), "testA"),
    ("the last one", (8, 8, 16, 15), "testA"),
)

"""Expression, corners in pixels of images of ``SIZE`` by ``SIZE``, split."""

_BOX = "Please provide the bounding box coordinate of the region this sentence describes: "


def coco(n: int) -> str:
    return f"COCO_train2014_{n:012d}.jpg"


def _grounding(title: str, refs: str) -> dict[str, Callable[[Path], None]]:
    def jsonl(root: Path) -> None:
        """As Qwen-VL converts it: image paths of another machine."""
        for split in ("val", "testA"):
            rows = [
                {"image": f"data/coco/train2014/{coco(n // 2)}", "sent": sent, "bbox": list(box)}
                | {"height": SIZE, "width": SIZE}
                for n, (sent, box, own) in enumerate(THINGS)
                if own == split
            ]
            put(root / f"{title.lower()}_{split}.jsonl", lines(rows))
        for n in range(2):
            put(root / "train2014" / coco(n), picture(n))

    def release(root: Path) -> None:
        """The content of the pickle, as JSON."""
        rows, boxes = [], []
        for n, (sent, (x1, y1, x2, y2), split) in enumerate(THINGS):
            rows.append({"ref_id": n, "ann_id": n, "image_id": n // 2, "split": split, "file_name": "x"})
            rows[-1] |= {"sentences": [{"sent": sent, "sent_id": 10 + n, "raw": sent.upper()}]}
            boxes.append({"id": n, "image_id": n // 2, "bbox": [x1, y1, x2 - x1, y2 - y1]})
        train = {**rows[0], "split": "train", "sentences": [{"sent": "taught", "sent_id": 99}]}
        shown = [{"id": n, "file_name": coco(n), "width": SIZE, "height": SIZE} for n in range(2)]
        put(root / f"refs({refs}).json", [*rows, train])
        put(root / "instances.json", {"images": shown, "annotations": boxes})
        for n in range(2):
            put(root / "train2014" / coco(n), picture(n))

    def parquet(root: Path) -> None:
        """One row for each thing, with all its expressions."""
        for split, things in (("val", THINGS[:2]), ("testA", THINGS[2:])):
            rows: dict[tuple[int, ...], dict[str, Any]] = {}
            for sent, (x1, y1, x2, y2), _ in things:
                n = 0 if split == "val" else 1
                row = {"question_id": f"{split}{x1}", "image": picture(n), "answer": []}
                row |= {"bbox": [float(v) for v in (x1, y1, x2 - x1, y2 - y1)], "question": "?"}
                row |= {"file_name": coco(n).replace(".jpg", f"_{x1}.jpg"), "iscrowd": 0}
                rows.setdefault((x1, y1), row)["answer"].append(sent)
            put_parquet(root / "data" / f"{split}-00000-of-00001.parquet", [*rows.values()])

    def tsv(root: Path) -> None:
        """VLMEvalKit's one table of all three data sets."""
        rows = [
            {"index": 2 * n + (own != title), "image": picture(n // 2), "question": f"{_BOX}{sent}"}
            | {"answer": str([v / SIZE for v in box]), "category": f"{own} {split}"}
            | {"width": SIZE, "height": SIZE}
            for n, (sent, box, split) in enumerate(THINGS)
            for own in (title, "RefCOCOx")
        ]
        put_tsv(root / "RefCOCO.tsv", rows)

    return {"jsonl": jsonl, "release": release, "parquet": parquet, "tsv": tsv}


MEANT = (
    ("the cup", False, [[2, 2], [9, 2], [9, 9], [2, 9]]),
    ("Where would one drink from?", True, [[4, 4], [12, 4], [8, 12]]),
    ("the dark corner", False, [[0, 0], [5, 0], [0, 5]]),
)
"""A query, whether it is a sentence, the polygon that it means."""


def _reasonseg_release(root: Path) -> None:
    for n, (text, sentence, points) in enumerate(MEANT):
        shapes = [{"label": "target", "points": points, "shape_type": "polygon"}]
        put(root / "val" / f"{n}.json", {"text": [text], "is_sentence": sentence, "shapes": shapes})
        put(root / "val" / f"{n}.jpg", picture(n))


WRITERS: dict[str, dict[str, Callable[[Path], None]]] = {
    "refcoco": _grounding("RefCOCO", "unc"),
    "refcocoplus": _grounding("RefCOCO+", "unc"),
    "refcocog": _grounding("RefCOCOg", "umd"),
    "reasonseg": {"release": _reasonseg_release},
}
