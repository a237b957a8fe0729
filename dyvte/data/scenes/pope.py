"""Scenes as POPE (Li et al., 2023): does the model see things that are not there?

<root>/coco_pope_{random,popular,adversarial}.json   one question a line, as the release has them
<root>/val2014/*.png

The wording is the one that both embedded backbones were trained on: "Is there a red circle?".
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from dyvte.data.scenes.questions import View
from dyvte.data.scenes.render import save
from dyvte.data.scenes.world import COLORS, SHAPES, draw_scene

CATEGORIES = ("random", "popular", "adversarial")
Thing = tuple[str, str]
"""Colour and name of a shape."""
THINGS: tuple[Thing, ...] = tuple((color, name) for color in COLORS for name in SHAPES)


def write_pope(folder: Path, images: int, first: int, seed: int = 0, split: str = "test") -> Path:
    """A mini-POPE: of every image and category a shape that is there and one that is not.

    The absent ones are drawn as POPE's three categories draw them: from all that are absent (`random`), from
    the absent ones that most images show (`popular`), from those that go best with what is there
    (`adversarial`). Objects of photographs go together by what they are; here, where shapes and colours are
    drawn apart, a shape goes with an image that shows its form in another colour and its colour in
    another form.

    Parameters
    ----------
    folder
        Gets the three files and ``val2014``.
    images
        Six questions each.
    first
        Number of the first scene.
    seed, split
        Of the scenes.
    """
    scenes = [draw_scene(split, first + number, seed) for number in range(images)]
    shown = [sorted(set(zip(view.colors, view.names, strict=True))) for view in map(View, scenes)]
    known = Counter(thing for things in shown for thing in things)
    lines: dict[str, list[str]] = {category: [] for category in CATEGORIES}
    for number, (scene, there) in enumerate(zip(scenes, shown, strict=True)):
        name = f"COCO_val2014_{number + 1:012d}.png"
        save(scene, folder / "val2014" / name)
        rng = np.random.default_rng([seed, 303, first + number])
        for category, absent in _absent(there, known, rng):
            present = there[int(rng.integers(len(there)))]
            for (color, form), label in ((present, "yes"), (absent, "no")):
                record = {"question_id": len(lines[category]) + 1, "image": name}
                record |= {"text": f"Is there a {color} {form}?", "label": label}
                lines[category].append(json.dumps(record))
    for category, own in lines.items():
        path = folder / f"coco_pope_{category}.json"
        path.write_text("".join(f"{line}\n" for line in own), encoding="utf-8")
    return folder


def _absent(
    there: list[Thing], known: Counter[Thing], rng: np.random.Generator
) -> Iterator[tuple[str, Thing]]:
    """Category, and the absent thing that it asks about; ties are drawn."""
    absent = [thing for thing in THINGS if thing not in there]
    absent = [absent[int(i)] for i in rng.permutation(len(absent))]
    colors, forms = {color for color, _ in there}, {form for _, form in there}
    yield "random", absent[0]
    yield "popular", max(absent, key=lambda thing: known[thing])
    yield "adversarial", max(absent, key=lambda thing: (thing[0] in colors) + (thing[1] in forms))
