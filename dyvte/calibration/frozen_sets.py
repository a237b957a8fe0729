"""Static sets of frozen layers, chosen by what they do to the answer; ShortV's criterion as the baseline.

A candidate is one pass of the backbone with these layers frozen, over answers that the un-pruned model gave.
What passes over one batch have in common, the layers before the first that differs, is computed once.

Shape letters: B samples, N tokens, A answer positions, R those of all samples, V vocabulary, L layers.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from dyvte.backbones import Backbone, describe
from dyvte.errors import CalibrationError, ConfigError
from dyvte.reductions import FrozenLayers
from dyvte.runtime import VisualExit
from dyvte.runtime.frozen import check_can_freeze
from dyvte.runtime.replay import Replay
from dyvte.spans import visual_mask
from dyvte.teacher.exits import compare, per_row, positions_before
from dyvte.teacher.plain import predicted_logits
from dyvte.teacher.reduced import Turn, answer_logits

Layers = tuple[int, ...]
"""Frozen layers, counted from 0, ascending: as `--reduction frozen:LAYERS` has them."""
Objective = Literal["risk", "same_answer"]
OBJECTIVES: tuple[Objective, ...] = ("risk", "same_answer")
RULES = {
    "answer": "greedy, by the effect on the answer",
    "shortv": "ShortV's layer contribution",
    "last": "the last layers (freeze:F)",
}
"""Ways to choose a set of every size, and what tables call them."""


@dataclass(frozen=True)
class Effect:
    """What a set of frozen layers does to each of B answers.

    Attributes
    ----------
    layers
        The set.
    risk_B
        (B,) float32, nats: KL(full || frozen), mean over the sample's answer positions, closing EOS included.
    first_risk_B
        (B,) float32, nats: the same at the last prompt position alone, which predicts the first answer token.
    same_answer_B
        (B,) float32, 0 or 1: argmax equality at all answer positions.
    """

    layers: Layers
    risk_B: Tensor
    first_risk_B: Tensor
    same_answer_B: Tensor

    @property
    def risk(self) -> float:
        """Mean risk in nats."""
        return float(self.risk_B.double().mean())

    @property
    def first_risk(self) -> float:
        """Mean risk at the last prompt position, in nats."""
        return float(self.first_risk_B.double().mean())

    @property
    def same_answer(self) -> float:
        """Share of samples whose whole answer is the full model's."""
        return float(self.same_answer_B.double().mean())

    def loss(self, objective: Objective) -> tuple[float, float]:
        """What a greedy choice makes small; the second of equals decides."""
        return (self.risk, 0.0) if objective == "risk" else (1 - self.same_answer, self.risk)

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready; see `of_dict`."""
        columns = {name: getattr(self, name).tolist() for name in ("risk_B", "first_risk_B", "same_answer_B")}
        return {"layers": list(self.layers), **columns}

    @staticmethod
    def of_dict(record: Mapping[str, Any]) -> Effect:
        """From what `to_dict` made."""
        columns = {name: torch.tensor(values) for name, values in record.items() if name != "layers"}
        return Effect(layers=tuple(record["layers"]), **columns)


class Effects:
    """Effects of sets, each computed once.

    Parameters
    ----------
    measure
        Computes those of some sets, in their order.
    known
        Computed before.
    keep
        Called with all effects so far whenever some were computed, so that a killed search can go on.
    """

    def __init__(
        self,
        measure: Callable[[Sequence[Layers]], list[Effect]],
        known: Iterable[Effect] = (),
        keep: Callable[[list[Effect]], None] = lambda effects: None,
    ) -> None:
        self._measure, self._keep = measure, keep
        self._known = {one.layers: one for one in known}

    def __call__(self, sets: Sequence[Layers]) -> list[Effect]:
        """The effects of these sets, in their order."""
        if new := [layers for layers in dict.fromkeys(sets) if layers not in self._known]:
            self._known |= {one.layers: one for one in self._measure(new)}
            self._keep(list(self._known.values()))
        return [self._known[layers] for layers in sets]


class SetPasses:
    """Passes of one backbone, with sets of its layers frozen, over fixed samples.

    Parameters
    ----------
    model
        A supported backbone in eval mode.
    batches
        Pairs ``(inputs, answer_mask)`` of prompts and answers, as `dyvte.teacher.trace_exits` takes them. The
        full model passes over each once, at once. Samples without an image are omitted.
    advance
        Called with the number of samples that a set has passed over.

    Raises
    ------
    UnsupportedBackboneError
        If the backbone cannot freeze, by name.
    CalibrationError
        If no sample has an image.
    """

    def __init__(
        self,
        model: nn.Module,
        batches: Iterable[tuple[Mapping[str, Any], Tensor]],
        advance: Callable[[int], None] = lambda count: None,
    ) -> None:
        self.model, self.advance = model, advance
        self.backbone = describe(model)
        check_can_freeze(self.backbone)
        self._batches = [_Batch.of(model, self.backbone, *batch) for batch in batches]
        self.num_visual_B = torch.cat([one.num_visual_B for one in self._batches] or [torch.zeros(0)])
        if not len(self):
            raise CalibrationError("no sample with an image was given; frozen layers cannot be searched")

    def __len__(self) -> int:
        return len(self.num_visual_B)

    @torch.no_grad()
    def __call__(self, sets: Sequence[Layers]) -> list[Effect]:
        """The effects of these sets."""
        parts: dict[Layers, list[dict[str, Tensor]]] = {layers: [] for layers in sets}
        for batch in self._batches:
            replay, recorded = Replay(), None
            # The set that leaves the most first layers as they are goes first: the others begin with its.
            for layers in sorted(parts, key=lambda one: _is_frozen(one, self.backbone.num_layers)):
                exits = VisualExit(reductions=[FrozenLayers(layers)] if layers else [])
                exits.replay, replay.upto = replay, None
                if recorded is not None:
                    replay.upto = first_difference(recorded, layers)
                else:
                    recorded = layers
                logits_BAV = answer_logits(self.model, batch.turn, exits, sample_ids=batch.ids)
                parts[layers].append(batch.measure(logits_BAV, self.backbone))
                self.advance(len(batch.num_visual_B))
        found = {
            layers: {name: torch.cat([part[name] for part in of]) for name in of[0]}
            for layers, of in parts.items()
        }
        return [Effect(layers, **found[layers]) for layers in sets]


@dataclass(frozen=True)
class _Batch:
    """A batch as inference sees it, and what the full model says about it."""

    turn: Turn
    full_RV: Tensor
    has_image_B: Tensor
    num_visual_B: Tensor
    ids: list[str]

    @staticmethod
    @torch.no_grad()
    def of(model: nn.Module, backbone: Backbone, inputs: Mapping[str, Any], answer_BN: Tensor) -> _Batch:
        answer_BN = answer_BN.bool().to(inputs["input_ids"].device)
        ids = [f"row {row}" for row in range(len(answer_BN))]
        turn = Turn.of(inputs, answer_BN)
        full_BAV, _ = predicted_logits(model, inputs, positions_before(answer_BN, ids))
        num_visual_B = visual_mask(inputs["input_ids"], backbone.visual_token_ids).sum(1).cpu()
        has_image_B = num_visual_B > 0
        # There may be many samples, and a vocabulary is long.
        full_RV = full_BAV[turn.is_answer_BA].cpu()
        return _Batch(turn, full_RV, has_image_B, num_visual_B[has_image_B], ids)

    def measure(self, logits_BAV: Tensor, backbone: Backbone) -> dict[str, Tensor]:
        """The columns of an effect, for samples with an image."""
        valid_BA = self.turn.is_answer_BA
        visual_ids = torch.tensor(backbone.visual_token_ids, device=valid_BA.device)
        logits_RV = logits_BAV[valid_BA]
        labels_R = self.turn.answer_BA[valid_BA]
        values = compare(logits_RV[None], self.full_RV.to(logits_RV.device), labels_R, visual_ids)
        rows = {name: of_SB[0].cpu() for name, of_SB in per_row(values, valid_BA).items()}
        num_B = valid_BA.sum(1)
        first_B = values["risk"][0, num_B.cumsum(0) - num_B].cpu()
        columns = {"risk_B": rows["risk"], "first_risk_B": first_B, "same_answer_B": rows["same_answer"]}
        return {name: of_B[self.has_image_B].float() for name, of_B in columns.items()}


def first_difference(one: Layers, other: Layers) -> int:
    """The first layer that only one of two sets holds; equal sets: the layer behind both."""
    differing = set(one) ^ set(other)
    return min(differing) if differing else max((*one, *other), default=-1) + 1


def _is_frozen(layers: Layers, num_layers: int) -> tuple[bool, ...]:
    return tuple(index in layers for index in range(num_layers))


def greedy_sets(
    effects: Callable[[Sequence[Layers]], list[Effect]],
    num_layers: int,
    largest: int,
    objective: Objective = "risk",
) -> list[Effect]:
    """One set of each size 1..``largest``: the one before and the layer whose freezing then harms least.

    Of equals the deeper layer is taken. L (L + 1) / 2 sets are measured for all sizes.

    Parameters
    ----------
    effects
        What sets do; see `Effects`.
    num_layers
        L.
    largest
        Size of the last set.
    objective
        "risk": the mean risk; "same_answer": the share of answers that change, and of equals the mean risk.

    Raises
    ------
    ConfigError
        If there is no such objective.
    """
    if objective not in OBJECTIVES:
        raise ConfigError(f"objective {objective!r}: expected one of {', '.join(OBJECTIVES)}")
    found: list[Effect] = []
    chosen: Layers = ()
    for _ in range(largest):
        left = [index for index in reversed(range(num_layers)) if index not in chosen]
        tried = effects([tuple(sorted((*chosen, index))) for index in left])
        found.append(min(tried, key=lambda one: one.loss(objective)))
        chosen = found[-1].layers
    return found


def layer_contributions(effects: Callable[[Sequence[Layers]], list[Effect]], num_layers: int) -> list[float]:
    """ShortV's layer contribution (arXiv 2504.00502) of visual tokens, one for each layer, in nats.

    How far the model's next-token distribution moves if this layer alone does not change the visual tokens:
    KL(full || frozen) at the last position of the prompt, mean over samples.
    """
    return [one.first_risk for one in effects([(index,) for index in range(num_layers)])]


def contribution_sets(contributions: Sequence[float], largest: int) -> list[Layers]:
    """ShortV's sets of the sizes 1..``largest``: the layers that contribute least, whatever they do together.

    Of equals the deeper layer is taken.
    """
    order = sorted(range(len(contributions)), key=lambda index: (contributions[index], -index))
    return [tuple(sorted(order[:size])) for size in range(1, largest + 1)]


def last_sets(num_layers: int, largest: int) -> list[Layers]:
    """The last 1..``largest`` layers: what a freeze after layer F does."""
    return [tuple(range(num_layers - size, num_layers)) for size in range(1, largest + 1)]


@dataclass(frozen=True)
class FrozenSets:
    """Outcome of `search_frozen_sets`.

    Attributes
    ----------
    num_layers
        L.
    objective
        What the greedy choice made small.
    contributions
        ShortV's, one for each layer, in nats.
    sets
        Rule (a key of `RULES`) to the effects of its sets of size 1, 2, ...
    num_visual_B
        (B,) visual tokens of the samples.
    """

    num_layers: int
    objective: Objective
    contributions: tuple[float, ...]
    sets: Mapping[str, Sequence[Effect]]
    num_visual_B: Tensor

    def largest(self, rule: str, same_answer: float) -> Effect | None:
        """The largest set of a rule, such that it and all smaller ones keep this share of the answers."""
        best = None
        for one in self.sets[rule]:
            if one.same_answer < same_answer:
                break
            best = one
        return best


def search_frozen_sets(
    effects: Callable[[Sequence[Layers]], list[Effect]],
    num_layers: int,
    num_visual_B: Tensor,
    largest: int | None = None,
    objective: Objective = "risk",
    rules: Collection[str] = tuple(RULES),
) -> FrozenSets:
    """Sets of every size by each rule.

    Parameters
    ----------
    effects
        What sets do: `SetPasses`, within `Effects`.
    num_layers
        L.
    num_visual_B
        (B,) visual tokens of the samples.
    largest
        Size of the largest set, 1..L; None: L.
    objective
        See `greedy_sets`.
    rules
        Those wanted, of `RULES`; the greedy choice measures most sets.

    Raises
    ------
    ConfigError
        If ``largest`` is out of range.
    """
    largest, by_rule = check_largest(largest, num_layers), {}
    if "answer" in rules:
        by_rule["answer"] = greedy_sets(effects, num_layers, largest, objective)
    contributions = layer_contributions(effects, num_layers)
    if "shortv" in rules:
        by_rule["shortv"] = effects(contribution_sets(contributions, largest))
    if "last" in rules:
        by_rule["last"] = effects(last_sets(num_layers, largest))
    return FrozenSets(num_layers, objective, tuple(contributions), by_rule, num_visual_B)


def check_largest(largest: int | None, num_layers: int) -> int:
    """Size of the largest set, L where none is asked for; ConfigError out of 1..L."""
    if largest is None:
        return num_layers
    if not 1 <= largest <= num_layers:
        raise ConfigError(
            f"at most {largest} frozen layers: expected 1..{num_layers}, the backbone has {num_layers} layers"
        )
    return largest


def count_sets(num_layers: int, largest: int) -> int:
    """Sets that a search measures at most: the greedy choice's, and those of the other two rules."""
    return sum(num_layers - size for size in range(largest)) + 2 * (largest - 1)
