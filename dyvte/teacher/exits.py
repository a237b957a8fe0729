"""One teacher pass over a batch: a whole :class:`~dyvte.teacher.trace.Trace` from one forward.

Shape letters: B rows, N tokens, A predicted positions of a row, R of all rows, V vocabulary, K exits (0..L,
or those of a thinned pass), S schedules (exits, and exits behind a freeze), F features.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from dyvte.backbones import Backbone, describe
from dyvte.backbones.sizes import decoder_shape
from dyvte.costs.schedules import kv_share
from dyvte.errors import DataError
from dyvte.gates import DEFAULT_FEATURES
from dyvte.spans import Spans, find_spans
from dyvte.teacher.freeze_grid import FreezeGrid
from dyvte.teacher.plain import forward_inputs
from dyvte.teacher.streams import ExitStreams, all_exits
from dyvte.teacher.trace import COLUMNS, Trace

Result = TypeVar("Result")


@dataclass(frozen=True)
class ExitLogits:
    """Next-token logits of the exits, packed to the left over the predicted positions.

    Row i of ``logits_KBAV`` is exit layer ``exits[i]``; the last is the full model.
    """

    logits_KBAV: Tensor
    valid_BA: Tensor
    features_BLF: Tensor
    spans: Spans
    backbone: Backbone
    exits: tuple[int, ...]


@dataclass(frozen=True)
class Checked:
    """A trace, and what its pass found beside it.

    Attributes
    ----------
    trace:
        The labels and features.
    is_greedy_B:
        (B,) bool: the answer is the full model's argmax at every position. On greedy labels False means that
        generation and this pass disagree by rounding (a near tie, low precision).
    num_images:
        Visual streams that were computed.
    not_shared:
        Why rows that hold the same image did not share its stream; None where nothing stood in the way.
    """

    trace: Trace
    is_greedy_B: Tensor
    num_images: int
    not_shared: str | None


def trace_exits(
    model: nn.Module,
    inputs: Mapping[str, Any],
    answer_mask: Tensor,
    *,
    sample_ids: Sequence[str] | None = None,
    exits: Sequence[int] | None = None,
    freezes: Sequence[int] = (),
    exits_per_chunk: int | None = None,
    memory_budget: int | None = None,
    share_images: bool = True,
    visual_token_ids: Iterable[int] | None = None,
    features: Sequence[str] = DEFAULT_FEATURES,
) -> Trace:
    """What every exit layer of a frozen backbone would say, from ONE forward; on demand behind every freeze.

    Equal to separate passes that hand on the visual states as they are past each freeze and hide the visual
    keys past each exit; text before the image is computed once.

    Parameters
    ----------
    model:
        A supported transformers multimodal model, in eval mode.
    inputs:
        Its forward arguments, ``input_ids`` and ``attention_mask`` included; prompt AND answer, padded on
        either side. Rows without an image are allowed: every exit is the full model there.
    answer_mask:
        (B, N) bool, True on answer label tokens, closing EOS included. The logits one position earlier are
        compared.
    sample_ids:
        B ids for the trace; row numbers if None.
    exits:
        Exit layers to label; L, the full model, always belongs to them. None: all, 0..L. Fewer are cheaper
        (:func:`thinned_exits`); the columns of the others are NaN.
    freezes:
        Freeze layers f, each in 0..L-1: the trace's ``grid`` then labels every exit k >= f where the visual
        tokens were updated in the layers 1..f only. None by default.
    exits_per_chunk:
        Exit streams per layer call. None: as many as ``memory_budget`` allows.
    memory_budget:
        Bytes that the decoder and the output head may hold beside the weights, by the estimate of
        :mod:`dyvte.teacher.memory`: exits are taken through a layer, and answer positions through the output
        head, as many at a time as fit. None: no call is larger than the full model's own.
    share_images:
        Rows that hold the same image behind the same text (what enters the first layer decides) hang on one
        visual stream. Equal to rounding; families whose image tokens see the question compute each row's own.
    visual_token_ids:
        For families whose config does not name them.
    features:
        What the gates will read, by name; see :func:`dyvte.gates.prompt_features`.

    Returns
    -------
    Trace
        On the model's device. Argmaxes exclude the visual placeholders: no answer holds one.

    Raises
    ------
    DataError
        If a row has no answer token, or an answer that starts right after a visual token or at the first
        position (the logits there mean nothing once the visual tokens left).
    MemoryBudgetError
        If the batch does not fit the budget even with one exit at a time.
    UnsupportedBackboneError
        If something is to be frozen in a family that cannot, by name.
    """
    return trace_checked(
        model,
        inputs,
        answer_mask,
        sample_ids=sample_ids,
        exits=exits,
        freezes=freezes,
        exits_per_chunk=exits_per_chunk,
        memory_budget=memory_budget,
        share_images=share_images,
        visual_token_ids=visual_token_ids,
        features=features,
    ).trace


@torch.no_grad()
def trace_checked(
    model: nn.Module,
    inputs: Mapping[str, Any],
    answer_mask: Tensor,
    *,
    sample_ids: Sequence[str] | None = None,
    reference_BAV: Tensor | None = None,
    **how: Any,
) -> Checked:
    """:func:`trace_exits`, and what its pass found beside the trace.

    ``reference_BAV`` (see :func:`dyvte.teacher.plain.predicted_logits`) stands in for the full model, in the
    trace and in its greedy answer: exits of a model with an adapter are compared with the model without it.

    Parameters
    ----------
    model, inputs, answer_mask, sample_ids
        See :func:`trace_exits`.
    reference_BAV
        Logits of another full model.
    **how
        Further options of :func:`trace_exits`.
    """
    answer_BN = torch.as_tensor(answer_mask, dtype=torch.bool)
    ids = tuple(sample_ids) if sample_ids is not None else tuple(map(str, range(len(answer_BN))))
    if len(ids) != len(answer_BN):
        raise ValueError(f"{len(ids)} sample ids for {len(answer_BN)} rows")

    def measure(streams: ExitStreams, at: slice, logits_SRV: Tensor) -> dict[str, Tensor]:
        # Both masks list the answer tokens of a row from left to right, rows one after the other.
        labels_R = inputs["input_ids"][answer_BN.to(inputs["input_ids"].device)][at].to(logits_SRV.device)
        full_RV = logits_SRV[-1]
        if reference_BAV is not None:
            full_RV = reference_BAV[streams.slots.predict.valid][at]
        visual_ids = torch.tensor(streams.backbone.visual_token_ids, device=logits_SRV.device)
        return compare(logits_SRV, full_RV, labels_R, visual_ids)

    predict_BN = positions_before(answer_BN, ids)
    streams, parts = _pass(
        model, inputs, measure, predict_BN=predict_BN, answer_BN=answer_BN, sample_ids=ids, **how
    )
    values = {name: torch.cat([part[name] for part in parts], -1) for name in parts[0]}
    valid_BA, schedules = streams.slots.predict.valid, streams.schedules
    rows = per_row(values, valid_BA)
    trace = Trace(
        **{name: schedules.columns(rows_SB) for name, rows_SB in rows.items()},
        features=torch.stack(streams.features_BF, 1),
        sample_ids=ids,
        num_visual=streams.spans.visual_BN.sum(1),
        exits=schedules.exits,
        grid=_grid(streams, rows) if schedules.freezes else None,
    )
    greedy_BA = torch.ones_like(valid_BA)
    greedy_BA[valid_BA] = values["greedy"]
    return Checked(trace, greedy_BA.all(1), streams.num_images, streams.not_shared)


def _grid(streams: ExitStreams, rows: Mapping[str, Tensor]) -> FreezeGrid:
    schedules, of = streams.schedules, streams.frozen_features
    return FreezeGrid(
        **{name: schedules.grid(rows_SB) for name, rows_SB in rows.items()},
        embeddings=streams.embeddings_BF,
        features=torch.stack([of[pair] for pair in schedules.stream_layers], 1),
        freeze_layers=schedules.freezes,
        kv_share=kv_share(decoder_shape(streams.backbone.model.config)),
    )


@torch.no_grad()
def exit_logits(
    model: nn.Module,
    inputs: Mapping[str, Any],
    *,
    predict_BN: Tensor,
    answer_BN: Tensor | None = None,
    sample_ids: Sequence[str] | None = None,
    **how: Any,
) -> ExitLogits:
    """Next-token logits at ``predict_BN`` for all exit layers, from one forward; options as for
    :func:`trace_exits`. All of them at once: for short answers or few positions.

    Parameters
    ----------
    model, inputs
        See :func:`trace_exits`.
    predict_BN
        (B, N) bool.
    answer_BN
        (B, N) bool: answer tokens.
    sample_ids
        Of the rows, for messages.
    **how
        Further options of :func:`trace_exits`.
    """
    streams, parts = _pass(
        model,
        inputs,
        lambda _streams, _at, logits_SRV: logits_SRV,
        predict_BN=predict_BN,
        answer_BN=answer_BN,
        sample_ids=sample_ids,
        **how,
    )
    logits_KRV = torch.cat(parts, 1)
    valid_BA = streams.slots.predict.valid
    exits = streams.schedules.exits
    logits_KBAV = logits_KRV.new_zeros(len(exits), *valid_BA.shape, logits_KRV.shape[-1])
    logits_KBAV[:, valid_BA] = logits_KRV
    return ExitLogits(
        logits_KBAV=logits_KBAV,
        valid_BA=valid_BA,
        features_BLF=torch.stack(streams.features_BF, 1),
        spans=streams.spans,
        backbone=streams.backbone,
        exits=exits,
    )


def _pass(
    model: nn.Module,
    inputs: Mapping[str, Any],
    take: Callable[[ExitStreams, slice, Tensor], Result],
    *,
    predict_BN: Tensor,
    answer_BN: Tensor | None,
    sample_ids: Sequence[str] | None,
    visual_token_ids: Iterable[int] | None = None,
    **how: Any,
) -> tuple[ExitStreams, list[Result]]:
    """The one forward; the streams, and what ``take`` makes of each block of logits (nobody else holds them:
    only one block exists at a time)."""
    backbone = describe(model, visual_token_ids)
    device = inputs["input_ids"].device
    predict_BN = predict_BN.to(device)
    answer_BN = None if answer_BN is None else answer_BN.to(device)
    spans = find_spans(
        inputs["input_ids"], backbone.visual_token_ids, inputs.get("attention_mask"), answer_BN
    )
    _check_predicted(spans, predict_BN, sample_ids)
    given = forward_inputs(backbone, inputs, spans.valid_BN)
    with all_exits(backbone, spans, predict_BN, **how) as streams:
        first = model(**given, use_cache=False, return_dict=True).logits
        results = [take(streams, *streams.as_block(0, first))]
        del first
        for start in streams.block_starts()[1:]:
            results.append(take(streams, *streams.as_block(start, streams.further_logits(model, start))))
    return streams, results


def positions_before(answer_BN: Tensor, sample_ids: Sequence[str]) -> Tensor:
    """(B, N) positions whose logits predict an answer token: one to the left of each label.

    Parameters
    ----------
    answer_BN
        (B, N) bool: answer tokens.
    sample_ids
        Of the rows, for messages.
    """
    empty = (~answer_BN.any(1)).nonzero().flatten().tolist()
    if empty:
        raise DataError(f"samples {[sample_ids[row] for row in empty]} have no answer token to compare")
    if bool(answer_BN[:, 0].any()):
        raise DataError("an answer starts at the first position: no logits predict its first token")
    return torch.cat((answer_BN[:, 1:], torch.zeros_like(answer_BN[:, :1])), 1)


def _check_predicted(spans: Spans, predict_BN: Tensor, sample_ids: Sequence[str] | None) -> None:
    wrong = (predict_BN & (spans.visual_BN | ~spans.valid_BN)).any(1).nonzero().flatten().tolist()
    if wrong:
        named = [sample_ids[row] if sample_ids else row for row in wrong]
        raise DataError(
            f"samples {named}: an answer follows a visual or padding token directly; exits can only be "
            "compared where text comes in between (is the prompt template right?)"
        )


def compare(logits_SRV: Tensor, full_RV: Tensor, labels_R: Tensor, visual_ids: Tensor) -> dict[str, Tensor]:
    """(S, R) measures of each schedule against the full model; log-probabilities in float32, one schedule at
    a time to bound memory.

    Parameters
    ----------
    logits_SRV
        Of S schedules at R positions.
    full_RV
        Of the full model.
    labels_R
        Token ids.
    visual_ids
        Of the placeholders, which no answer holds.
    """
    full_RV = full_RV.float().log_softmax(-1)
    full_argmax_R = _argmax(full_RV, visual_ids)
    columns: dict[str, list[Tensor]] = {name: [] for name in ("risk", "reverse_risk", "agreement", "loss")}
    for logits_RV in logits_SRV:
        exit_RV = logits_RV.float().log_softmax(-1)
        columns["risk"].append(kl_divergence(full_RV, exit_RV))
        columns["reverse_risk"].append(kl_divergence(exit_RV, full_RV))
        columns["agreement"].append((_argmax(exit_RV, visual_ids) == full_argmax_R).float())
        columns["loss"].append(-exit_RV.gather(-1, labels_R[:, None]).squeeze(-1))
    stacked = {name: torch.stack(values) for name, values in columns.items()}
    return {**stacked, "greedy": full_argmax_R == labels_R}


def per_row(values: Mapping[str, Tensor], valid_BA: Tensor) -> dict[str, Tensor]:
    """(S, B) means over each row's positions; ``same_answer`` where all of them agree.

    Parameters
    ----------
    values
        (S, R) by name, positions packed row by row.
    valid_BA
        (B, A) bool: the positions of each row.
    """
    rows: dict[str, Tensor] = {}
    for name in ("risk", "reverse_risk", "agreement", "loss"):
        padded_SBA = values[name].new_zeros(len(values[name]), *valid_BA.shape)
        padded_SBA[:, valid_BA] = values[name]
        rows[name] = padded_SBA.sum(-1) / valid_BA.sum(1)
    rows["same_answer"] = (rows["agreement"] == 1).float()
    return {name: rows[name] for name in COLUMNS}


def kl_divergence(log_p_V: Tensor, log_q_V: Tensor) -> Tensor:
    """KL(p || q) in nats over the last dimension, from log-probabilities; p = 0 contributes 0.

    Parameters
    ----------
    log_p_V, log_q_V
        (..., V) log-probabilities.
    """
    p_V = log_p_V.exp()
    return (p_V * (log_p_V - log_q_V)).masked_fill(p_V == 0, 0).sum(-1)


def _argmax(log_p_V: Tensor, excluded: Tensor) -> Tensor:
    return log_p_V.index_fill(-1, excluded, float("-inf")).argmax(-1)
