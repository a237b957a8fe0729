"""Questions about a scene, with their answers, GQA-style programs and types.

Sixteen types. Five are simple (background, existence, color, shape, cell), seven are hard (count, where,
relation, compare, read, sum, and the trail of arrows), and four put the image in charge of the depth:
`skip_*` asks for something only if the background is not the named colour, and `arrow` asks what the
direction of the orange arrow stands for. One wording, several depths: only the image tells which.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from dyvte.data.scenes.world import (
    BACKGROUNDS,
    COLORS,
    DIGIT,
    EMPTY,
    NUM_CELLS,
    PLURALS,
    SHAPE,
    SHAPES,
    START,
    Item,
    Scene,
    cell_of,
)

SIMPLE_TYPES = ("background", "existence", "color", "shape", "cell")
HARD_TYPES = ("count", "where", "relation", "compare", "read", "sum", "trail")
IMAGE_TYPES = ("skip_color", "skip_count", "skip_read", "skip_where", "arrow")
TYPES = SIMPLE_TYPES + HARD_TYPES + IMAGE_TYPES
SKIPPED = "skipped"
MAX_COUNT = 7


@dataclass(frozen=True, kw_only=True)
class Question:
    """One question: `type` is ours, `structural`/`semantic` and `program` follow GQA's vocabulary."""

    type: str
    text: str
    answer: str
    structural: str
    semantic: str
    program: tuple[tuple[str, str], ...]


class View:
    """Look-ups on one scene that several question makers share."""

    def __init__(self, scene: Scene):
        self.scene = scene
        self.shapes = [(i, c) for i, c in enumerate(scene.cells) if c is not None and c.kind == SHAPE]
        self.digits = [c for c in scene.cells if c is not None and c.kind == DIGIT]
        names = [c.name for _, c in self.shapes]
        colors = [c.color for _, c in self.shapes]
        self.names, self.colors = names, colors
        self.unique_names = [n for n in SHAPES if names.count(n) == 1]
        self.unique_colors = [n for n in COLORS if colors.count(n) == 1]

    def one(self, name: str) -> tuple[int, Item]:
        """Cell and item of the only shape called `name`."""
        return next((i, c) for i, c in self.shapes if c.name == name)


def _pick(rng: np.random.Generator, options):
    return options[int(rng.integers(len(options)))]


def _other(rng: np.random.Generator, options, wrong):
    return _pick(rng, [o for o in options if o != wrong])


def _yes(value: bool) -> str:
    return "yes" if value else "no"


def place(cell: int) -> str:
    """How a cell is named in answers: rows and columns count from 1."""
    row, col = cell_of(cell)
    return f"row {row + 1} column {col + 1}"


def content(item: Item | None) -> str:
    """How a cell's content is named in answers."""
    if item is None:
        return EMPTY
    if item.kind == SHAPE:
        return f"{item.color} {item.name}"
    if item.kind == DIGIT:
        return f"{item.color} {item.name}"
    return f"arrow {item.name}"


def _about(rng: np.random.Generator, value: int, low: int, high: int) -> int:
    """`value` half of the time, else a number near it."""
    if rng.random() < 0.5:
        return value
    near = [v for v in range(max(low, value - 3), min(high, value + 3) + 1) if v != value]
    return _pick(rng, near)


def _background(view: View, rng, verify: bool):
    bg = view.scene.background
    program = (("select", "background"),)
    if verify:
        asked = bg if rng.random() < 0.5 else _other(rng, list(BACKGROUNDS), bg)
        steps = (*program, ("verify color", asked))
        return f"Is the background {asked}?", _yes(asked == bg), "verify", "global", steps
    return "What color is the background?", bg, "query", "global", (*program, ("query", "color"))


def _existence(view: View, rng, verify: bool):
    if rng.random() < 0.5:
        _, item = _pick(rng, view.shapes)
        color, name = item.color, item.name
    else:
        present = set(zip(view.colors, view.names, strict=True))
        options = [(c, n) for c in COLORS for n in SHAPES if (c, n) not in present]
        # near misses: the shape is there in another colour, or the colour on another shape
        near = [(c, n) for c, n in options if c in view.colors and n in view.names]
        color, name = _pick(rng, near or options)
    there = (color, name) in set(zip(view.colors, view.names, strict=True))
    program = (("select", name), ("filter color", color), ("exist", "?"))
    return f"Is there a {color} {name}?", _yes(there), "verify", "obj", program


def _color(view: View, rng, verify: bool):
    if not view.unique_names:
        return None
    name = _pick(rng, view.unique_names)
    color = view.one(name)[1].color
    if verify:
        asked = color if rng.random() < 0.5 else _other(rng, list(COLORS), color)
        steps = (("select", name), ("verify color", asked))
        return f"Is the {name} {asked}?", _yes(asked == color), "verify", "attr", steps
    return f"What color is the {name}?", color, "query", "attr", (("select", name), ("query", "color"))


def _shape(view: View, rng, verify: bool):
    if not view.unique_colors:
        return None
    color = _pick(rng, view.unique_colors)
    name = next(c.name for _, c in view.shapes if c.color == color)
    steps = (("select", "shape"), ("filter color", color), ("query", "name"))
    return f"What shape is {color}?", name, "query", "cat", steps


def _cell(view: View, rng, verify: bool):
    full = [i for i in range(NUM_CELLS) if view.scene.cells[i] is not None]
    cell = _pick(rng, full) if rng.random() < 0.85 else int(rng.integers(NUM_CELLS))
    steps = (("select", f"cell {place(cell)}"), ("query", "name"))
    return f"What is in {place(cell)}?", content(view.scene.cells[cell]), "query", "cat", steps


def _count(view: View, rng, verify: bool):
    # asked about what is there three times in four, or "0" would be the best guess
    by_name = rng.random() < 0.6
    pool, options = (view.names, list(SHAPES)) if by_name else (view.colors, list(COLORS))
    what = _pick(rng, pool) if rng.random() < 0.75 else _pick(rng, options)
    number = pool.count(what)
    noun = PLURALS[what] if by_name else f"{what} shapes"
    steps = (("select", what), ("count", "?"))
    if verify:
        asked = _about(rng, number, 0, MAX_COUNT)
        return f"Are there {asked} {noun}?", _yes(asked == number), "verify", "obj", steps
    return f"How many {noun} are there?", str(number), "query", "obj", steps


def _where(view: View, rng, verify: bool):
    if not view.unique_names:
        return None
    name = _pick(rng, view.unique_names)
    return (
        f"Where is the {name}?",
        place(view.one(name)[0]),
        "query",
        "rel",
        (("select", name), ("query", "position")),
    )


_RELATIONS: dict[str, Callable[[int, int], bool]] = {
    "above": lambda a, b: cell_of(a)[0] < cell_of(b)[0],
    "below": lambda a, b: cell_of(a)[0] > cell_of(b)[0],
    "left of": lambda a, b: cell_of(a)[1] < cell_of(b)[1],
    "right of": lambda a, b: cell_of(a)[1] > cell_of(b)[1],
}


def _relation(view: View, rng, verify: bool):
    if len(view.unique_names) < 2:
        return None
    first, second = (view.unique_names[int(i)] for i in rng.permutation(len(view.unique_names))[:2])
    a, b = view.one(first)[0], view.one(second)[0]
    wanted = bool(rng.random() < 0.5)
    words = [w for w, holds in _RELATIONS.items() if holds(a, b) == wanted]
    word = _pick(rng, words)
    steps = (("select", second), ("relate", word), ("verify rel", first))
    return f"Is the {first} {word} the {second}?", _yes(wanted), "verify", "rel", steps


def _compare(view: View, rng, verify: bool):
    counts = {n: view.names.count(n) for n in SHAPES}
    pairs = [(a, b) for a in SHAPES for b in SHAPES if a != b and counts[a] + counts[b] > 0]
    wanted = bool(rng.random() < 0.5)
    fitting = [(a, b) for a, b in pairs if (counts[a] > counts[b]) == wanted]
    if not fitting:
        return None
    first, second = _pick(rng, fitting)
    steps = (("select", first), ("select", second), ("more than", "?"))
    text = f"Are there more {PLURALS[first]} than {PLURALS[second]}?"
    return text, _yes(wanted), "compare", "obj", steps


def _read(view: View, rng, verify: bool):
    digit = _pick(rng, view.digits)
    steps = (("select", f"{digit.color} digit"), ("query", "value"))
    if verify:
        value = int(digit.name)
        asked = value if rng.random() < 0.5 else _other(rng, list(range(10)), value)
        return f"Is the {digit.color} digit {asked}?", _yes(asked == value), "verify", "attr", steps
    return f"What is the {digit.color} digit?", digit.name, "query", "attr", steps


def digit_sum(view: View) -> int:
    """The sum of the scene's two digits."""
    return sum(int(d.name) for d in view.digits)


def _sum(view: View, rng, verify: bool):
    total = digit_sum(view)
    steps = (("select", "digits"), ("sum", "?"))
    if verify:
        asked = _about(rng, total, 0, 18)
        return f"Is the sum of the digits {asked}?", _yes(asked == total), "verify", "attr", steps
    return "What is the sum of the digits?", str(total), "query", "attr", steps


def trail_end(view: View) -> Item:
    """The shape at the end of the arrows."""
    return view.scene.cells[view.scene.trail[-1]]


def _trail(view: View, rng, verify: bool):
    steps = (("select", "orange arrow"), ("follow", "arrows"), ("query", "name"))
    return "Where does the orange arrow lead?", content(trail_end(view)), "query", "rel", steps


def _skip(inner: Callable) -> Callable:
    def make(view: View, rng, verify: bool):
        made = inner(view, rng, False)
        if made is None:
            return None
        text, answer, _, semantic, steps = made
        bg = view.scene.background
        asked = bg if rng.random() < 0.5 else _other(rng, list(BACKGROUNDS), bg)
        worded = f"Skip if {asked}, {text[0].lower()}{text[1:]}"
        branch = (("select", "background"), ("verify color", asked), *steps)
        return worded, SKIPPED if asked == bg else answer, "logical", semantic, branch

    return make


def _arrow(view: View, rng, verify: bool):
    start = next(c for c in view.scene.cells if c is not None and c.kind == START)
    answer = {
        "up": view.scene.background,
        "down": str(len(view.shapes)),
        "left": str(digit_sum(view)),
        "right": content(trail_end(view)),
    }[start.name]
    steps = (("select", "orange arrow"), ("query", "direction"), ("choose", "up|down|left|right"))
    return "What does the orange arrow ask?", answer, "choose", "global", steps


_MAKERS: dict[str, Callable] = {
    "background": _background,
    "existence": _existence,
    "color": _color,
    "shape": _shape,
    "cell": _cell,
    "count": _count,
    "where": _where,
    "relation": _relation,
    "compare": _compare,
    "read": _read,
    "sum": _sum,
    "trail": _trail,
    "skip_color": _skip(_color),
    "skip_count": _skip(_count),
    "skip_read": _skip(_read),
    "skip_where": _skip(_where),
    "arrow": _arrow,
}
# Types that also have a yes/no form ("Is the star red?"), as MME asks them.
VERIFIABLE = ("background", "color", "count", "read", "sum")
VERIFY_SHARE = 0.3


def ask(
    view: View,
    kind: str,
    rng: np.random.Generator,
    *,
    verify: bool | None = None,
    verify_share: float = VERIFY_SHARE,
) -> Question | None:
    """A random question of type `kind`, or None where the scene has none.

    `verify` forces (True) or forbids (False) the yes/no form; None takes it in `verify_share` of the cases.

    Parameters
    ----------
    view
        The scene and what is in it.
    kind
        One of `TYPES`.
    rng
        Draws.
    verify
        The yes/no form.
    verify_share
        Of questions in that form.
    """
    if verify is None:
        verify = kind in VERIFIABLE and bool(rng.random() < verify_share)
    made = _MAKERS[kind](view, rng, verify)
    if made is None:
        return None
    text, answer, structural, semantic, program = made
    return Question(
        type=kind, text=text, answer=answer, structural=structural, semantic=semantic, program=program
    )


def ask_many(
    scene: Scene, rng: np.random.Generator, count: int, verify_share: float = VERIFY_SHARE
) -> list[Question]:
    """`count` different questions about one scene, their types as even as the scene allows.

    Parameters
    ----------
    scene
        What is asked about.
    rng
        Draws.
    count
        Of questions.
    verify_share
        Share of questions in yes/no form.
    """
    view, seen, questions = View(scene), set(), []
    order = [TYPES[int(i)] for i in rng.permutation(len(TYPES))]
    misses = 0
    while len(questions) < count and misses < 200:
        kind = order[(len(questions) + misses) % len(order)]
        question = ask(view, kind, rng, verify_share=verify_share)
        if question is None or question.text in seen:
            misses += 1
            continue
        seen.add(question.text)
        questions.append(question)
    return questions


def all_words() -> list[str]:
    """Every lower-case word and mark that questions and answers use, in a fixed order."""
    words = ["user", "assistant", "?", ",", ".", "yes", "no", SKIPPED, "skip", "if", EMPTY]
    words += [*SHAPES, *PLURALS.values(), "shapes", "shape", *COLORS, *BACKGROUNDS]
    words += ["orange", "arrow", "lead", "does", "ask", "up", "down", "left", "right", "above", "below", "of"]
    words += ["what", "where", "how", "many", "is", "are", "there", "the", "a", "in", "more", "than"]
    words += ["color", "background", "row", "column", "digit", "digits", "sum", "this", "image", "picture"]
    words += ["please", "answer", "or", "describe", "question", "using", "single", "word", "phrase"]
    words += [str(n) for n in range(19)]
    return list(dict.fromkeys(words))
