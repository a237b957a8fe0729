"""Questions about a scene in natural language: more types, several wordings, words, sentences, long answers.

The embedded 10-layer backbone has one wording per type (`questions`). A decoder with a real vocabulary can
be asked in many; here every question of that module is reworded, and six types are added: what a `row` or
`column` holds, what is `beside` a shape, which digit is `larger`, the `box` of a shape, and a long answer,
`describe`. Truth always comes from the scene.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np

from dyvte.data.scenes.questions import SKIPPED, TYPES, View, ask, content, place
from dyvte.data.scenes.questions import Question as Question
from dyvte.data.scenes.render import item_box
from dyvte.data.scenes.wordings import (
    QUERIES,
    SHORT_SUFFIX,
    SKIPS,
    VERIFICATIONS,
    YES_NO_SUFFIX,
    Wordings,
)
from dyvte.data.scenes.world import DIGIT, DIRECTIONS, GRID, PLURALS, SHAPE, START, Item, Scene, cell_of

EXTRA_TYPES = ("row", "column", "beside", "larger", "box", "describe")
NATURAL_TYPES = TYPES + EXTRA_TYPES
LONG_TYPES = ("row", "column", "box", "describe")
"""Types whose answer is no short phrase: no suffix asks for one."""
UNTAUGHT_TYPES = ("skip_count", "skip_read", "arrow")
"""Types that the embedded 30-layer backbone never met in its training."""
TAUGHT_TYPES = tuple(kind for kind in NATURAL_TYPES if kind not in UNTAUGHT_TYPES)
_BESIDE = {"above": "up", "below": "down", "left of": "left", "right of": "right"}


def phrase(item: Item) -> str:
    """An item in running text, with its article."""
    if item.kind == SHAPE:
        return f"a {item.color} {item.name}"
    if item.kind == DIGIT:
        return f"a {item.color} digit {item.name}"
    return f"{'an orange' if item.kind == START else 'a teal'} arrow pointing {item.name}"


def description(scene: Scene) -> str:
    """The whole scene in 30 to 80 words: the background, then each row from left to right."""
    sentences = [f"The background is {scene.background}."]
    for row in range(GRID):
        items = [phrase(c) for c in scene.cells[row * GRID : (row + 1) * GRID] if c is not None]
        if not items:
            sentences.append(f"Row {row + 1} is empty.")
            continue
        listed = items[0] if len(items) == 1 else f"{', '.join(items[:-1])} and {items[-1]}"
        sentences.append(f"Row {row + 1} has {listed}.")
    return " ".join(sentences)


def box_text(box: Sequence[float]) -> str:
    """A box as LLaVA writes it: ``[x1, y1, x2, y2]``, two decimals, corners in [0, 1]."""
    return f"[{', '.join(f'{v:.2f}' for v in box)}]"


def _pick(rng: np.random.Generator, options):
    return options[int(rng.integers(len(options)))]


def _line(kind: str, cells: Callable[[int], slice]):
    def make(view: View, rng):
        number = int(rng.integers(GRID))
        answer = ", ".join(content(c) for c in view.scene.cells[cells(number)])
        steps = (("select", f"{kind} {number + 1}"), ("query", "cells"))
        return f"Describe {kind} {number + 1}.", answer, "query", "cat", steps

    return make


def _beside(view: View, rng):
    options = []
    for name in view.unique_names:
        row, col = cell_of(view.one(name)[0])
        for word, direction in _BESIDE.items():
            r, c = row + DIRECTIONS[direction][0], col + DIRECTIONS[direction][1]
            if 0 <= r < GRID and 0 <= c < GRID:
                options.append((name, word, view.scene.cells[r * GRID + c]))
    # neighbours that are there, three times in four
    full = [o for o in options if o[2] is not None]
    pool = full if full and rng.random() < 0.75 else options
    if not pool:
        return None
    name, word, item = _pick(rng, pool)
    steps = (("select", name), ("relate", word), ("query", "name"))
    return f"What is directly {word} the {name}?", content(item), "query", "rel", steps


def _larger(view: View, rng):
    first, second = (view.digits[int(i)] for i in rng.permutation(2))
    if first.name == second.name:
        return None
    answer = max(first, second, key=lambda d: int(d.name)).color
    steps = (("select", f"{first.color} digit"), ("select", f"{second.color} digit"), ("choose larger", "?"))
    text = f"Which digit is larger, the {first.color} one or the {second.color} one?"
    return text, answer, "compare", "attr", steps


def boxed(view: View) -> list[tuple[str, int, Item]]:
    """Shapes that a phrase tells from all others: the phrase, the cell, the item."""
    options = [(n, *view.one(n)) for n in view.unique_names]
    pairs = list(zip(view.colors, view.names, strict=True))
    options += [(f"{i.color} {i.name}", c, i) for c, i in view.shapes if pairs.count((i.color, i.name)) == 1]
    return options


def _box(view: View, rng):
    options = boxed(view)
    if not options:
        return None
    name, cell, item = _pick(rng, options)
    steps = (("select", name), ("query", "box"))
    return f"Where is the {name}? Answer with a box.", box_text(item_box(cell, item)), "query", "rel", steps


def _describe(view: View, rng):
    return (
        "Describe the image.",
        description(view.scene),
        "query",
        "global",
        (("select", "scene"), ("describe", "?")),
    )


_MAKERS: dict[str, Callable] = {
    "row": _line("row", lambda n: slice(n * GRID, (n + 1) * GRID)),
    "column": _line("column", lambda n: slice(n, None, GRID)),
    "beside": _beside,
    "larger": _larger,
    "box": _box,
    "describe": _describe,
}


def ask_plain(view: View, kind: str, rng: np.random.Generator, verify_share: float) -> Question | None:
    """A question of any natural type in its first wording, or None where the scene has none.

    Parameters
    ----------
    view
        The scene and what is in it.
    kind
        Of question.
    rng
        Draws.
    verify_share
        Share of questions in yes/no form.
    """
    if kind not in _MAKERS:
        return ask(view, kind, rng, verify_share=verify_share)
    made = _MAKERS[kind](view, rng)
    if made is None:
        return None
    text, answer, structural, semantic, program = made
    return Question(
        type=kind, text=text, answer=answer, structural=structural, semantic=semantic, program=program
    )


def _slots(kind: str, question: Question, program: tuple[tuple[str, str], ...]) -> dict[str, str]:
    """What a wording of `kind` may name, from the question's program."""
    first = program[0][1]
    named = {
        "name": first,
        "noun": PLURALS.get(first, f"{first} shapes"),
        "place": first.removeprefix("cell "),
    }
    for step, argument in program:
        if step in ("filter color", "verify color"):
            named["color"] = named["asked"] = argument
        if step == "relate":
            named["word"] = argument
    if kind in ("row", "column"):
        named[kind] = first.rsplit(" ", 1)[1]
    if kind == "relation":
        named |= {"first": program[2][1], "second": first}
    if kind == "compare":
        named |= {"first": PLURALS[first], "second": PLURALS[program[1][1]]}
    if kind in ("read", "larger"):
        named |= {
            "color": first.split(" ")[0],
            "first": first.split(" ")[0],
            "second": program[1][1].split(" ")[0],
        }
    if kind in ("count", "read", "sum") and (number := re.search(r"\d+", question.text)):
        named["asked"] = number[0]
    return named


def _wording(
    table: Wordings, original: str, rng: np.random.Generator, unseen: bool, sentences: bool
) -> tuple[str, str]:
    """Template and answer template; the original wording counts as one that asks for a phrase."""
    if unseen:
        return _pick(rng, table.unseen), "{answer}"
    if sentences and table.sentence and rng.random() < 0.25:
        return _pick(rng, table.sentence)
    return _pick(rng, (original, *table.phrase)), "{answer}"


def reword(
    question: Question,
    rng: np.random.Generator,
    *,
    unseen: bool = False,
    suffixes: bool = True,
    sentences: bool = True,
) -> Question:
    """The same question in a random natural wording, with the answer in the form that the wording asks for.

    Parameters
    ----------
    question
        From `ask_plain`, in its first wording.
    rng
        Decides the wording.
    unseen
        Take one of the wordings that are kept from training.
    suffixes
        Now and then append what evaluations append ("Please answer yes or no.").
    sentences
        Now and then ask for a sentence.
    """
    kind, program = question.type, question.program
    inner = kind.removeprefix("skip_")
    if inner != kind:
        asked, program = program[1][1], program[2:]
        bare = question.text.split(", ", 1)[1]
        bare = bare[0].upper() + bare[1:]
        template, _ = _wording(QUERIES[inner], bare, rng, False, False)
        worded = template.format(**_slots(inner, question, program))
        outer, _ = _wording(SKIPS, question.text, rng, unseen, False)
        return replace(question, text=outer.format(asked=asked, inner=worded))
    verify = question.answer in ("yes", "no")
    table = VERIFICATIONS.get(kind, QUERIES[kind]) if verify else QUERIES[kind]
    template, answer = _wording(table, question.text, rng, unseen, sentences and not verify)
    slots = _slots(kind, question, program)
    text = template.format(**slots)
    answer = answer.format(answer=_in_sentence(question.answer, answer), **slots)
    if suffixes and kind not in LONG_TYPES and answer == question.answer:
        if verify and rng.random() < 0.3:
            text += YES_NO_SUFFIX
        elif rng.random() < 0.1:
            text += SHORT_SUFFIX
    return replace(question, text=text, answer=answer)


def _in_sentence(answer: str, template: str) -> str:
    """Contents get an article where a sentence goes around them."""
    if not template.startswith(("There is", "Directly")):
        return answer
    if answer.startswith("arrow"):
        return f"an {answer}"
    return answer if answer == "nothing" else f"a {answer}"


def ask_natural(
    scene: Scene,
    rng: np.random.Generator,
    count: int,
    kinds: Sequence[str] = NATURAL_TYPES,
    *,
    verify_share: float = 0.3,
    unseen: bool = False,
    suffixes: bool = True,
    sentences: bool = True,
) -> list[Question]:
    """`count` different questions about one scene, types as even as the scene allows.

    At most one is a description, and fewer come back where the scene has no more. A function of its
    arguments alone; the last three are `reword`'s.

    Parameters
    ----------
    scene
        What is asked about.
    rng
        Draws.
    count
        Of questions.
    kinds
        Types to choose from.
    verify_share
        Share of questions in yes/no form.
    unseen, suffixes, sentences
        See `reword`.
    """
    view, seen, questions = View(scene), set(), []
    order = [kinds[int(i)] for i in rng.permutation(len(kinds))]
    misses = 0
    while len(questions) < count and misses < 200:
        kind = order[(len(questions) + misses) % len(order)]
        question = None
        if kind != "describe" or not any(q.type == kind for q in questions):
            question = ask_plain(view, kind, rng, verify_share)
        if question is None or question.text in seen:
            misses += 1
            continue
        seen.add(question.text)
        questions.append(reword(question, rng, unseen=unseen, suffixes=suffixes, sentences=sentences))
    return questions


__all__ = [
    "EXTRA_TYPES",
    "LONG_TYPES",
    "NATURAL_TYPES",
    "SKIPPED",
    "TAUGHT_TYPES",
    "Question",
    "ask_natural",
    "ask_plain",
    "box_text",
    "boxed",
    "description",
    "phrase",
    "place",
    "reword",
]
