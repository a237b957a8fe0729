"""Scenes as ReasonSeg: which thing does a question mean, as a polygon (``<n>.png`` beside ``<n>.json``).

Short queries name the shape ("Where is the star?", "What color is the star?"), long ones must be reasoned out
("Where does the orange arrow lead?": the shape at the end of the trail).
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from dyvte.data.scenes.questions import Question, View, ask
from dyvte.data.scenes.render import item_outline, save
from dyvte.data.scenes.world import Scene, draw_scene

KINDS = ("where", "color", "trail")
LONG = ("trail",)


def target(scene: Scene, question: Question) -> int:
    """The cell of the shape that a question of `KINDS` means."""
    if question.type == "trail":
        return scene.trail[-1]
    return View(scene).one(question.program[0][1])[0]


def ask_target(scene: Scene, kind: str, rng: np.random.Generator) -> tuple[Question, list] | None:
    """A question of a kind and the outline that answers it; None where the scene has none.

    Parameters
    ----------
    scene
        What is asked about.
    kind
        Of `KINDS`.
    rng
        Draws.
    """
    question = ask(View(scene), kind, rng, verify=False)
    if question is None:
        return None
    cell = target(scene, question)
    item = scene.cells[cell]
    return None if item is None else (question, item_outline(cell, item))


def write_reasonseg(folder: Path, questions: int, first: int, seed: int = 0, split: str = "test") -> Path:
    """A mini-ReasonSeg: one question a scene, the kinds in turn.

    Parameters
    ----------
    folder
        Gets ``val/``.
    questions
        How many.
    first
        Number of the first scene.
    seed, split
        Of the scenes.
    """
    place = folder / "val"
    place.mkdir(parents=True, exist_ok=True)
    index, made = first, 0
    while made < questions:
        scene, rng = draw_scene(split, index, seed), np.random.default_rng([seed, 303, index])
        index += 1
        asked = ask_target(scene, KINDS[made % len(KINDS)], rng)
        if asked is None:
            continue
        question, points = asked
        save(scene, place / f"{made:06d}.png")
        record = {
            "text": [question.text],
            "is_sentence": question.type in LONG,
            "shapes": [{"label": "target", "points": [[round(v, 2) for v in point] for point in points]}],
        }
        (place / f"{made:06d}.json").write_text(json.dumps(record), encoding="utf-8")
        made += 1
    return place
