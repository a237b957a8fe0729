"""How the questions of a set of files are asked: in one fixed wording each, or in natural language.

Both styles go through the same writers (`writers`), and no scene of one is a scene of the other.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from dyvte.data.scenes.natural import LONG_TYPES, TAUGHT_TYPES, ask_natural, reword
from dyvte.data.scenes.questions import TYPES, Question, View, ask, ask_many
from dyvte.data.scenes.world import Scene
from dyvte.errors import ConfigError

Rng = np.random.Generator
# Instruction data asks both ways alike, so that gates meet enough yes/no forms of every type.
INSTRUCT_VERIFY_SHARE = 0.5
SHORT_TYPES = tuple(kind for kind in TAUGHT_TYPES if kind not in LONG_TYPES)


@dataclass(frozen=True, kw_only=True)
class Style:
    """A way to ask about scenes.

    Parameters
    ----------
    name
        In manifests; empty for the style of manifests that name none.
    types
        Question types of the instruction data.
    per_scene
        Questions about one scene in instruction data.
    first_scene
        Purpose of a set of files to the number of its first scene; far from each other, from those of other
        styles and from those that trained a backbone.
    instruct : (Scene, Rng, int) -> list of Question
        Questions for instruction data, so many of them.
    short : (Scene, Rng, int) -> list of Question
        Questions answered by a word or phrase, as GQA has them.
    verify : (View, str, Rng) -> Question or None
        A yes/no question of a type, as MME has them.
    unseen : (Scene, Rng, int) -> list of Question, optional
        Questions as `instruct` has them, in wordings that no training uses.
    """

    name: str
    types: tuple[str, ...]
    per_scene: int
    first_scene: Mapping[str, int]
    instruct: Callable[[Scene, Rng, int], list[Question]]
    short: Callable[[Scene, Rng, int], list[Question]]
    verify: Callable[[View, str, Rng], Question | None]
    unseen: Callable[[Scene, Rng, int], list[Question]] | None = None


def _verify_plain(view: View, kind: str, rng: Rng) -> Question | None:
    return ask(view, kind, rng, verify=True)


def _natural(**options) -> Callable[[Scene, Rng, int], list[Question]]:
    def questions(scene: Scene, rng: Rng, count: int) -> list[Question]:
        return ask_natural(
            scene, rng, count, **{"kinds": TAUGHT_TYPES, "verify_share": INSTRUCT_VERIFY_SHARE, **options}
        )

    return questions


def _verify_natural(view: View, kind: str, rng: Rng) -> Question | None:
    plain = ask(view, kind, rng, verify=True)
    return None if plain is None else reword(plain, rng, suffixes=False)


PLAIN = Style(
    name="",
    types=TYPES,
    per_scene=8,
    first_scene={"instruct": 20_000_000, "gqa": 30_000_000, "mme": 40_000_000, "pope": 130_000_000},
    instruct=lambda scene, rng, count: ask_many(scene, rng, count, INSTRUCT_VERIFY_SHARE),
    short=ask_many,
    verify=_verify_plain,
)
"""One wording per type, 101 words: what the embedded 10-layer backbone knows."""

NATURAL = Style(
    name="natural",
    types=TAUGHT_TYPES,
    per_scene=4,
    first_scene={
        "instruct": 70_000_000,
        "gqa": 80_000_000,
        "mme": 90_000_000,
        "refcoco": 100_000_000,
        "captions": 110_000_000,
        "pope": 120_000_000,
    },
    instruct=_natural(),
    short=_natural(kinds=SHORT_TYPES, verify_share=0.3, suffixes=False, sentences=False),
    verify=_verify_natural,
    unseen=_natural(unseen=True),
)
"""Several wordings per type, sentences, boxes, descriptions: what the embedded 30-layer backbone knows."""


def narrowed(types: Sequence[str], per_scene: int) -> Style:
    """The natural style with instruction data of some types only: long answers cost a teacher most of its
    time. Benchmarks stay as they are.

    Parameters
    ----------
    types
        Question types of the instruction data; none: all that were taught.
    per_scene
        Questions about one scene.

    Raises
    ------
    ConfigError
        A type is not one of those that the backbone was taught, or no question is asked.
    """
    kinds = tuple(types) or TAUGHT_TYPES
    if unknown := [kind for kind in kinds if kind not in TAUGHT_TYPES]:
        raise ConfigError(f"types {unknown}: expected some of {', '.join(TAUGHT_TYPES)}")
    if per_scene < 1:
        raise ConfigError(f"per-scene: expected at least 1 question about a scene, found {per_scene}")
    name = NATURAL.name if per_scene == NATURAL.per_scene else f"{NATURAL.name}, {per_scene} per scene"
    return replace(
        NATURAL,
        name=name,
        types=kinds,
        per_scene=per_scene,
        instruct=_natural(kinds=kinds),
        unseen=_natural(kinds=kinds, unseen=True),
    )
