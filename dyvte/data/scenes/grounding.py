"""Scenes as RefCOCO (which thing does an expression mean?) and as COCO captions with CHAIR's files.

<root>/refcoco_testA.jsonl, images/*.png
    One expression a line, as Qwen-VL and InternVL convert RefCOCO: ``image`` (path from the file), ``sent``,
    ``bbox`` ([x1, y1, x2, y2] in pixels), ``height``, ``width``.

<root>/annotations/{captions,instances}_val2014.json, val2014/*.png, synonyms.txt
    COCO's own layout, and CHAIR's list of objects: one a line, its name first, then its synonyms.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from dyvte.data.scenes.natural import boxed, description
from dyvte.data.scenes.questions import View
from dyvte.data.scenes.render import IMAGE_SIZE, item_box, save
from dyvte.data.scenes.world import ARROW, COLORS, DIGIT, SHAPE, SHAPES, START, Item, draw_scene

EXPRESSIONS_PER_SCENE = 4
_ARROWS = {START: "orange arrow", ARROW: "teal arrow"}
OBJECTS = (
    *(f"{color} {name}" for color in COLORS for name in SHAPES),
    *(f"{color} digit" for color in COLORS),
    *_ARROWS.values(),
)
"""What a description may name: COCO's categories of the scenes, numbered from 1."""


def object_name(item: Item) -> str:
    """The category of an item."""
    if item.kind in _ARROWS:
        return _ARROWS[item.kind]
    return f"{item.color} {item.name if item.kind == SHAPE else DIGIT}"


def _pixels(cell: int, item: Item) -> list[int]:
    return [round(v * IMAGE_SIZE) for v in item_box(cell, item)]


def write_refcoco(folder: Path, expressions: int, first: int, seed: int = 0, split: str = "test") -> Path:
    """A mini-RefCOCO of shapes that their name, or colour and name, tells from all others.

    Parameters
    ----------
    folder
        Gets ``refcoco_testA.jsonl`` and ``images``.
    expressions
        Lines of the file; at most four a scene.
    first
        Number of the first scene.
    seed, split
        Of the scenes.
    """
    lines: list[str] = []
    index = first
    while len(lines) < expressions:
        scene = draw_scene(split, index, seed)
        name = f"images/{index - first:06d}.png"
        index += 1
        targets = boxed(View(scene))[:EXPRESSIONS_PER_SCENE]
        if targets:
            save(scene, folder / name)
        for phrase, cell, item in targets:
            record = {"image": name, "sent": f"the {phrase}", "bbox": _pixels(cell, item)}
            lines.append(json.dumps({**record, "height": IMAGE_SIZE, "width": IMAGE_SIZE}))
    path = folder / "refcoco_testA.jsonl"
    path.write_text("".join(f"{line}\n" for line in lines[:expressions]), encoding="utf-8")
    return path


def write_captions(folder: Path, images: int, first: int, seed: int = 0, split: str = "test") -> Path:
    """Descriptions and objects of scenes in COCO's layout, and the objects' list for CHAIR.

    Parameters are those of `write_refcoco`; one description an image.
    """
    shown: list[dict[str, Any]] = []
    captions: list[dict[str, Any]] = []
    instances: list[dict[str, Any]] = []
    for number in range(1, images + 1):
        scene = draw_scene(split, first + number, seed)
        name = f"COCO_val2014_{number:012d}.png"
        save(scene, folder / "val2014" / name)
        shown.append({"id": number, "file_name": name, "height": IMAGE_SIZE, "width": IMAGE_SIZE})
        captions.append({"id": number, "image_id": number, "caption": description(scene)})
        for cell, item in enumerate(scene.cells):
            if item is None:
                continue
            x1, y1, x2, y2 = _pixels(cell, item)
            instances.append(
                {
                    "id": len(instances) + 1,
                    "image_id": number,
                    "category_id": OBJECTS.index(object_name(item)) + 1,
                    "bbox": [x1, y1, x2 - x1, y2 - y1],
                    "area": (x2 - x1) * (y2 - y1),
                    "iscrowd": 0,
                    "segmentation": [],
                }
            )
    categories = [
        {"id": i, "name": name, "supercategory": name.split(" ")[1]} for i, name in enumerate(OBJECTS, 1)
    ]
    annotations = folder / "annotations"
    annotations.mkdir(parents=True, exist_ok=True)
    path = annotations / "captions_val2014.json"
    path.write_text(json.dumps({"images": shown, "annotations": captions}, indent=0), encoding="utf-8")
    found = {"images": shown, "annotations": instances, "categories": categories}
    (annotations / "instances_val2014.json").write_text(json.dumps(found, indent=0), encoding="utf-8")
    (folder / "synonyms.txt").write_text("".join(f"{name}\n" for name in OBJECTS), encoding="utf-8")
    return path
