"""Small benchmarks on disk in their own layouts, with questions that the tiny tokenizer knows."""

from __future__ import annotations

import json
from pathlib import Path

from tests.helpers.models import random_image

QUESTIONS = (
    "what color is the circle ?",
    "how many objects are there ?",
    "is there a red circle left of the blue square in this image ?",
)


def write_mini_gqa(root: Path, questions: int = 24, images: int = 6) -> Path:
    """GQA layout with noise images."""
    (root / "images").mkdir(parents=True)
    for n in range(images):
        random_image(n).save(root / "images" / f"{n}.png")
    entries = {
        f"{n:05d}": {
            "question": QUESTIONS[n % 3],
            "imageId": str(n % images),
            "answer": "red",
            "isBalanced": True,
            "groups": {"global": "color", "local": None},
            "types": {"structural": "query", "semantic": "attr", "detailed": f"type{n % 3}"},
            "semantic": [{"operation": "select", "argument": "circle", "dependencies": []}],
        }
        for n in range(questions)
    }
    (root / "testdev_balanced_questions.json").write_text(json.dumps(entries))
    return root


def write_mini_mme(root: Path, images: int = 3) -> Path:
    """MME layout with two flat subtasks."""
    for subtask in ("color", "code_reasoning"):
        (root / subtask).mkdir(parents=True)
        for n in range(images):
            random_image(100 + n).save(root / subtask / f"{n}.png")
            lines = (f"is the {shape} red ? Please answer yes or no.\t{a}" for shape, a in SHAPES)
            (root / subtask / f"{n}.txt").write_text("\n".join(lines))
    return root


SHAPES = (("circle", "Yes"), ("square", "No"))
