"""One row for each policy and each reduction: what it decides or leaves undone, by its rule.

A policy's row is a function of a `Subject`; a reduction's row says how it is played on the stock model
(`tests.helpers.rules`). `tests/runtime/test_matrix.py` requires a row of every one.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from dyvte.gates import GateConfig, GateStack
from dyvte.reductions import InactiveHeads, RandomTokens, Reduction, TokenRows, parse_reductions
from dyvte.spans import find_spans
from tests.helpers.rules import ACTIVE, LAYERS, averages_windows, draws, fastv_rule, keeps_farthest


class Subject(Protocol):
    """A batch before a tiny model of four layers: what a policy may look at, and a folder for its files."""

    ids: Sequence[str]
    has_image: Sequence[bool]
    folder: Path

    def prompt_states(self) -> Tensor:
        """(B, L, 64): mean over the prompt text without its last token, and its last token, by layer."""
        ...


@dataclass(frozen=True)
class Decided:
    """What a policy decides for each row; ``freezes`` None: at the exit."""

    policy: str
    exits: list[int]
    freezes: list[int] | None = None


def everywhere(policy: str, exit_layer: int, freeze_layer: int | None = None) -> Callable[[Subject], Decided]:
    """The same for every row."""

    def decide(subject: Subject) -> Decided:
        count = len(subject.ids)
        freezes = None if freeze_layer is None else [freeze_layer] * count
        return Decided(policy, imageless(subject, [exit_layer] * count), freezes)

    return decide


def imageless(subject: Subject, exits: Sequence[int]) -> list[int]:
    """-1 for rows without an image."""
    return [k if image else -1 for k, image in zip(exits, subject.has_image, strict=True)]


def drawn(seed: int, low: int, high: int, sample_id: str) -> int:
    """The published draw: the first eight bytes of a SHA-256, modulo the range."""
    digest = hashlib.sha256(f"{seed}\0{sample_id}".encode()).hexdigest()
    return low + int(digest[:16], 16) % (high - low + 1)


def by_draw(subject: Subject) -> Decided:
    """VTW's control."""
    return Decided("random:1-3:7", imageless(subject, [drawn(7, 1, 3, one) for one in subject.ids]))


def by_file(subject: Subject) -> Decided:
    """Layers out of a file, by sample id."""
    given = dict(zip(subject.ids, [3, 0, 1, 4, 2, 2], strict=False))
    path = subject.folder / "given.json"
    path.write_text(json.dumps(given))
    return Decided(f"oracle:{path}", imageless(subject, list(given.values())))


def by_gates(subject: Subject) -> Decided:
    """The first layer from 2 on whose gate is above the threshold; offsets put it amid each layer's rows."""
    threshold, rows = 0.75, torch.tensor(subject.has_image)
    cut = math.log(threshold / (1 - threshold))
    shape = {"num_layers": LAYERS, "hidden_size": 32, "architecture": "compact", "gate_hidden_size": 8}
    logits_BL = GateStack.init(GateConfig(**shape), seed=3)(subject.prompt_states()).detach()
    seen_RL = logits_BL[rows]
    offsets_L = cut - (seen_RL.max(0).values + seen_RL.min(0).values) / 2
    offsets_L[0] = cut - seen_RL[:, 0].max() - 1
    above_BL = logits_BL + offsets_L - cut
    assert (above_BL[rows, : LAYERS - 1].abs() > 1e-4).all(), "no row may lie on the threshold"
    config = GateConfig(**shape, offsets=tuple(offsets_L.tolist()))
    GateStack.init(config, seed=3).save_pretrained(subject.folder / "gates")
    exits = [next((k for k in range(1, LAYERS) if row[k - 1] > 0), LAYERS) for row in above_BL]
    assert len({k for k, image in zip(exits, subject.has_image, strict=True) if image}) > 1
    return Decided(f"gates:{subject.folder / 'gates'}@{threshold}", imageless(subject, exits))


POLICY_ROWS: dict[str, Callable[[Subject], Decided]] = {
    "never": everywhere("never", LAYERS),
    "blind": everywhere("blind", 0),
    "fixed": everywhere("fixed:2", 2),
    "freeze": everywhere("freeze:1:3", 3, 1),
    "random": by_draw,
    "oracle": by_file,
    "gates": by_gates,
}


@dataclass(frozen=True)
class Row:
    """A reduction and how it is played.

    Attributes
    ----------
    reductions
        Command line form, or objects.
    less
        What `less_work` does not compute.
    drop, after
        What leaves before the layer of index ``after``; ``drop(inputs, visual_ids, ids, exits)`` is its rule.
    enter
        What becomes of a prompt before the first layer: a rule of `tests.helpers.rules`, by family.
    frozen
        Indices of layers that do not update visual tokens.
    needs_grid
        Only families whose grids are written down can be held to it.
    """

    reductions: str | list[Reduction]
    less: dict[str, Any] = field(default_factory=dict)
    drop: Callable[..., Callable[..., Tensor]] | None = None
    after: int | None = None
    enter: Callable[[str], Callable[..., Any]] | None = None
    frozen: tuple[int, ...] = ()
    needs_grid: bool = False

    def made(self) -> list[Reduction]:
        """The reductions."""
        if isinstance(self.reductions, str):
            return list(parse_reductions(self.reductions))
        return self.reductions


def drawn_tokens(inputs, visual_ids, ids, exits):
    """After layer 2, of what is still there: visual tokens of rows that left before are not."""
    reduction = RandomTokens(2, seed=5)
    spans, _ = draws(reduction, inputs, visual_ids, ids)
    here_BN = spans.valid_BN & ~(spans.visual_BN & (torch.tensor(exits) < 2)[:, None])
    kept_BN = reduction.start(TokenRows(LAYERS, spans, ids)).keep(2, here_BN, None)
    return lambda *_: here_BN & ~kept_BN


def drawn_visual(inputs, visual_ids, ids, exits):
    """A third of each row's visual tokens, rounded up: the last of an order drawn from seed and id."""
    spans = find_spans(inputs["input_ids"], visual_ids, inputs["attention_mask"])
    gone_BN = torch.zeros_like(spans.visual_BN)
    for row, one in enumerate(ids):
        columns = spans.visual_BN[row].nonzero().flatten()
        seed = int.from_bytes(hashlib.sha256(f"9\0{one}".encode()).digest()[:7], "big")
        order = torch.randperm(len(columns), generator=torch.Generator().manual_seed(seed))
        gone_BN[row, columns[order[math.floor(len(columns) * 2 / 3 + 1e-6) :]]] = True
    return lambda *_: gone_BN


HALF_FFN = {"neurons": [slice(32)] * LAYERS}
REDUCTION_ROWS = {
    "none": Row("none"),
    "fastv": Row("fastv:2:0.5", drop=lambda *_: fastv_rule(0.5), after=2),
    "random_tokens": Row("random_tokens:2:5", drop=drawn_tokens, after=2),
    "random_visual": Row("random_visual:2:0.333333333:9", drop=drawn_visual, after=2),
    "divprune": Row("divprune:0.4", enter=lambda family: keeps_farthest(0.4), after=0),
    "pool": Row("pool:2", enter=lambda family: averages_windows(family, 2), after=0, needs_grid=True),
    "neighbours": Row("neighbours:1", less={"radius": 1}, needs_grid=True),
    "heads": Row([InactiveHeads(ACTIVE)], less={"active_LH": ACTIVE}),
    "ffn": Row("ffn:0.5", less=HALF_FFN),
    "frozen": Row("frozen:1,3", frozen=(1, 3)),
    "several": Row(
        [*parse_reductions("fastv:1:0.5+neighbours:1+ffn:0.5+frozen:3"), InactiveHeads(ACTIVE)],
        less={"radius": 1, "active_LH": ACTIVE, **HALF_FFN},
        drop=lambda *_: fastv_rule(0.5),
        after=1,
        frozen=(3,),
        needs_grid=True,
    ),
}
