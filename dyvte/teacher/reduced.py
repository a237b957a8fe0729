"""Traces of a backbone whose visual tokens are fewer or cheaper: its exits beside the un-pruned model.

A reduction may read the prompt as it is in inference, so the prompt is prefilled alone and the answer follows
on its cache, once per schedule; what the prefills have in common is computed once. The teacher stays the
un-pruned full model.

Shape letters: B rows, N tokens, P prompt tokens, A answer positions, R those of all rows, V vocabulary,
F features.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from dyvte.backbones import Backbone, describe
from dyvte.backbones.sizes import decoder_shape
from dyvte.costs.schedules import kv_share
from dyvte.gates import DEFAULT_FEATURES
from dyvte.policies import FixedPolicy, FreezePolicy, Plan, Policy, Rows
from dyvte.reductions import Reduction
from dyvte.runtime import VisualExit
from dyvte.runtime.frozen import check_can_freeze
from dyvte.runtime.replay import Replay
from dyvte.spans import visual_mask
from dyvte.teacher.exits import compare, per_row, positions_before
from dyvte.teacher.freeze_grid import FreezeGrid
from dyvte.teacher.plain import forward_inputs, predicted_logits
from dyvte.teacher.schedules import Schedules
from dyvte.teacher.trace import Trace


@dataclass(frozen=True)
class Turn:
    """A batch as inference sees it: prompts, padded on the left, then answers, padded on the right."""

    prompt: dict[str, Any]
    answer_BA: Tensor
    is_answer_BA: Tensor

    @staticmethod
    def of(inputs: Mapping[str, Any], answer_BN: Tensor) -> Turn:
        """Take prompts and answers apart; inputs of (B, N) go with the prompts.

        Parameters
        ----------
        inputs
            Of prompts and answers.
        answer_BN
            (B, N) bool: answer tokens.
        """
        ids_BN = inputs["input_ids"]
        mask_BN = inputs.get("attention_mask")
        valid_BN = torch.ones_like(answer_BN) if mask_BN is None else mask_BN.bool()
        prompt_BN = valid_BN & ~answer_BN
        width, longest = int(prompt_BN.sum(1).max()), int(answer_BN.sum(1).max())
        # Stable sorts: prompts move to the right, answers to the left, both in order.
        to_right_BP = torch.argsort(prompt_BN.to(torch.uint8), dim=1, stable=True)[:, -width:]
        to_left_BA = torch.argsort((~answer_BN).to(torch.uint8), dim=1, stable=True)[:, :longest]
        prompt = {
            name: value.gather(1, to_right_BP)
            if isinstance(value, Tensor) and value.shape == ids_BN.shape
            else value
            for name, value in inputs.items()
        }
        prompt["attention_mask"] = prompt_BN.gather(1, to_right_BP).long()
        return Turn(prompt, ids_BN.gather(1, to_left_BA), answer_BN.gather(1, to_left_BA))


@torch.no_grad()
def trace_reduced_exits(
    model: nn.Module,
    inputs: Mapping[str, Any],
    answer_mask: Tensor,
    reductions: Sequence[Reduction],
    *,
    sample_ids: Sequence[str] | None = None,
    exits: Sequence[int] | None = None,
    freezes: Sequence[int] = (),
    features: Sequence[str] = DEFAULT_FEATURES,
    reference_BAV: Tensor | None = None,
) -> tuple[Trace, Tensor]:
    """:func:`~dyvte.teacher.trace_exits` for a reduced backbone; column L is computed, not 0.

    Images are encoded once, and layers that update visual tokens run once; behind each freeze layer they are
    read, and what follows each exit is text. Features are those of the reduced model, as gates will read
    them.

    Parameters
    ----------
    reductions
        What is spent on visual tokens before they leave.
    exits, freezes
        Schedules to label, as for `trace_exits`.
    reference_BAV
        Stands in for the full model's logits, see :func:`~dyvte.teacher.exits.trace_checked`.

    Returns
    -------
    trace, greedy_B
        And (B,) bool: the answer is the full model's argmax at every position.
    """
    backbone = describe(model)
    answer_BN = answer_mask.bool().to(inputs["input_ids"].device)
    ids = tuple(sample_ids) if sample_ids is not None else tuple(map(str, range(len(answer_BN))))
    schedules = Schedules.of(exits, freezes, backbone.num_layers)
    if schedules.freezes:
        check_can_freeze(backbone)
    turn = Turn.of(inputs, answer_BN)
    valid_BA = turn.is_answer_BA
    if reference_BAV is None:
        reference_BAV, _ = predicted_logits(model, inputs, positions_before(answer_BN, ids))
    visual_ids = torch.tensor(backbone.visual_token_ids, device=valid_BA.device)
    full_RV, labels_R = reference_BAV[valid_BA], turn.answer_BA[valid_BA]

    def measured(policy: Policy, replay: Replay) -> dict[str, Tensor]:
        one = VisualExit.from_policy(policy, reductions=reductions)
        one.replay = replay
        logits_RV = answer_logits(model, turn, one, sample_ids=ids)[valid_BA]
        return compare(logits_RV[None], full_RV, labels_R, visual_ids)

    last, plain = backbone.num_layers, Replay()
    probes = {last: _Probe(features, last)}
    # Without an exit first: it runs every layer, and the others take their first k from it.
    of = {(last, last): measured(probes[last], plain)}
    for k in reversed(schedules.exits[:-1]):
        plain.upto = k
        of[k, k] = measured(FixedPolicy(k), plain)
    for f in schedules.freezes:
        frozen = plain.branch(f)
        probes[f] = _Probe(features, f)
        of[f, last] = measured(probes[f], frozen)
        for k in reversed([k for k in schedules.exits if f < k < last]):
            frozen.upto = k
            of[f, k] = measured(FreezePolicy(f, k), frozen)
    names = [name for name in of[last, last] if name != "greedy"]
    rows = per_row(
        {name: torch.cat([of[pair][name] for pair in schedules.pairs]) for name in names}, valid_BA
    )
    visual_BN = visual_mask(inputs["input_ids"], backbone.visual_token_ids)
    trace = Trace(
        **{name: schedules.columns(rows_SB) for name, rows_SB in rows.items()},
        features=probes[last].features_BLF(),
        sample_ids=ids,
        num_visual=visual_BN.sum(1),
        exits=schedules.exits,
        grid=_grid(backbone, schedules, rows, probes) if schedules.freezes else None,
    )
    greedy_BA = torch.ones_like(valid_BA)
    greedy_BA[valid_BA] = of[last, last]["greedy"]
    return trace, greedy_BA.all(1)


def _grid(
    backbone: Backbone, schedules: Schedules, rows: Mapping[str, Tensor], probes: Mapping[int, _Probe]
) -> FreezeGrid:
    plain, behind = probes[schedules.num_layers], schedules.stream_layers
    return FreezeGrid(
        **{name: schedules.grid(rows_SB) for name, rows_SB in rows.items()},
        embeddings=plain.seen[0],
        features=torch.stack([probes[f].seen[layer] for f, layer in behind], 1),
        freeze_layers=schedules.freezes,
        kv_share=kv_share(decoder_shape(backbone.model.config)),
    )


@torch.no_grad()
def answer_logits(
    model: nn.Module, turn: Turn, exits: VisualExit, *, sample_ids: Sequence[str] | None = None
) -> Tensor:
    """(B, A, V) logits of the answer's tokens: prompt prefilled inside the block, answer on its cache.

    Parameters
    ----------
    model
        The backbone.
    turn
        Prompts and answers.
    exits
        The policy and its reductions.
    sample_ids
        Of the rows.
    """
    with exits(model) as run:
        run.sample_ids = sample_ids
        return continued_logits(model, turn)


@torch.no_grad()
def continued_logits(model: nn.Module, turn: Turn) -> Tensor:
    """The same with whatever is in force on the model: exits inside their block, the full model outside.

    Parameters
    ----------
    model
        The backbone.
    turn
        Prompts and answers.
    """
    backbone = describe(model)
    prompt_mask_BP = turn.prompt["attention_mask"]
    given = forward_inputs(backbone, turn.prompt, prompt_mask_BP.bool())
    out = model(**given, use_cache=True, return_dict=True)
    parts = [out.logits[:, -1:]]
    if turn.answer_BA.shape[1] > 1:
        # The last token's own logits are of no interest.
        follow_BA, real_BA = turn.answer_BA[:, :-1], turn.is_answer_BA[:, :-1]
        more = {"attention_mask": torch.cat([prompt_mask_BP, real_BA.to(prompt_mask_BP)], 1)}
        steps_A = torch.arange(follow_BA.shape[1], device=follow_BA.device)
        more["position_ids"] = _positions(backbone, prompt_mask_BP.sum(1, keepdim=True) + steps_A)
        parts.append(
            model(input_ids=follow_BA, past_key_values=out.past_key_values, use_cache=True, **more).logits
        )
    return torch.cat(parts, 1)


def _positions(backbone: Backbone, count_BA: Tensor) -> Tensor:
    """Position ids of text behind a prompt, (B, A), or (3, B, A) where M-RoPE shifts them past the image."""
    for module in backbone.path:
        if getattr(module, "rope_deltas", None) is not None:
            return (count_BA + module.rope_deltas.to(count_BA.device)).expand(3, -1, -1)
    return count_BA


class _Probe(Policy):
    """Freezes after a given layer, never leaves, and keeps what gates would have read, by layer."""

    name = "probe"

    def __init__(self, features: Sequence[str], freeze_layer: int) -> None:
        self.features, self.freeze_layer = tuple(features), freeze_layer
        self.seen: dict[int, Tensor] = {}

    def start(self, rows: Rows) -> Plan:
        """The plan for one prefill."""
        return _Probing(self, rows)

    def features_BLF(self) -> Tensor:
        """(B, L, F)."""
        return torch.stack([self.seen[k] for k in sorted(self.seen) if k > 0], 1)


class _Probing(Plan):
    def __init__(self, probe: _Probe, rows: Rows) -> None:
        never_B = torch.full((len(rows.num_visual_B),), rows.num_layers)
        super().__init__(never_B, torch.full_like(never_B, probe.freeze_layer))
        self.probe, self.features = probe, probe.features

    def asks(self, k: int) -> bool:
        """Before the first layer, and after every one."""
        return True

    def asking_rows(self) -> Tensor:
        """(B,) bool: all."""
        return torch.ones_like(self.exit_layers_B, dtype=torch.bool)

    def logits(self, k: int, features_BF: Tensor) -> Tensor:
        """Keep the features; stay."""
        self.probe.seen[k] = features_BF
        return torch.full_like(features_BF[:, 0], -torch.inf)

    def step(self, k: int, logits_B: Tensor) -> None:
        """Nothing is decided."""
