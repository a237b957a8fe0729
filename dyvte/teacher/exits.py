"""One teacher pass over a batch: a whole :class:`~dyvte.teacher.trace.Trace` from one forward.

Shape letters: B rows, N tokens, A predicted positions, V vocabulary, K = L+1 exit layers, F features.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from dyvte.backbones import Backbone, describe
from dyvte.errors import DataError
from dyvte.gates import DEFAULT_FEATURES
from dyvte.spans import Spans, find_spans
from dyvte.teacher.streams import all_exits
from dyvte.teacher.trace import Trace


@dataclass(frozen=True)
class ExitLogits:
    """Next-token logits of every exit, packed to the left over the predicted positions."""

    logits_KBAV: Tensor
    valid_BA: Tensor
    features_BLF: Tensor
    spans: Spans
    backbone: Backbone


def trace_exits(
    model: nn.Module,
    inputs: Mapping[str, Any],
    answer_mask: Tensor,
    *,
    sample_ids: Sequence[str] | None = None,
    exits_per_chunk: int | None = None,
    visual_token_ids: Iterable[int] | None = None,
    features: Sequence[str] = DEFAULT_FEATURES,
) -> Trace:
    """What every exit layer of a frozen backbone would say, from ONE forward.

    Equal to L+1 separate passes that hide the visual keys past each exit; text before the image is computed
    once.

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
    exits_per_chunk:
        Exit streams per layer call, to bound memory. None: no call is larger than the full pass itself.
    visual_token_ids:
        For families whose config does not name them.
    features:
        What the gates will read, by name; see :func:`dyvte.gates.prompt_features`.

    Returns
    -------
    Trace
        On the model's device. Argmaxes leave the visual placeholders out: no answer holds one.

    Raises
    ------
    DataError
        If a row has no answer token, or an answer that starts right after a visual token or at the first
        position (the logits there mean nothing once the visual tokens left).
    """
    trace, _ = trace_checked(
        model,
        inputs,
        answer_mask,
        sample_ids=sample_ids,
        exits_per_chunk=exits_per_chunk,
        visual_token_ids=visual_token_ids,
        features=features,
    )
    return trace


def trace_checked(
    model: nn.Module,
    inputs: Mapping[str, Any],
    answer_mask: Tensor,
    *,
    sample_ids: Sequence[str] | None = None,
    exits_per_chunk: int | None = None,
    visual_token_ids: Iterable[int] | None = None,
    features: Sequence[str] = DEFAULT_FEATURES,
) -> tuple[Trace, Tensor]:
    """:func:`trace_exits`, and (B,) bool: the answer is the full model's argmax at every position.

    On greedy labels False means that generation and this pass disagree by rounding (a near tie, low
    precision).
    """
    answer_BN = torch.as_tensor(answer_mask, dtype=torch.bool)
    ids = tuple(sample_ids) if sample_ids is not None else tuple(map(str, range(len(answer_BN))))
    if len(ids) != len(answer_BN):
        raise ValueError(f"{len(ids)} sample ids for {len(answer_BN)} rows")
    found = exit_logits(
        model,
        inputs,
        predict_BN=positions_before(answer_BN, ids),
        answer_BN=answer_BN,
        exits_per_chunk=exits_per_chunk,
        visual_token_ids=visual_token_ids,
        sample_ids=ids,
        features=features,
    )
    input_ids_BN = inputs["input_ids"].to(found.valid_BA.device)
    labels_BA = _packed_labels(input_ids_BN, answer_BN, found.valid_BA)
    trace = Trace(
        **_compare(found, labels_BA),
        features=found.features_BLF,
        sample_ids=ids,
        num_visual=found.spans.visual_BN.sum(1),
    )
    visual_ids = torch.tensor(found.backbone.visual_token_ids, device=labels_BA.device)
    greedy_BA = _argmax(found.logits_KBAV[-1], visual_ids) == labels_BA
    return trace, (greedy_BA | ~found.valid_BA).all(1)


@torch.no_grad()
def exit_logits(
    model: nn.Module,
    inputs: Mapping[str, Any],
    *,
    predict_BN: Tensor,
    answer_BN: Tensor | None = None,
    exits_per_chunk: int | None = None,
    visual_token_ids: Iterable[int] | None = None,
    sample_ids: Sequence[str] | None = None,
    features: Sequence[str] = DEFAULT_FEATURES,
) -> ExitLogits:
    """Next-token logits at ``predict_BN`` for all exit layers 0..L, from one forward."""
    backbone = describe(model, visual_token_ids)
    device = inputs["input_ids"].device
    predict_BN = predict_BN.to(device)
    answer_BN = None if answer_BN is None else answer_BN.to(device)
    spans = find_spans(
        inputs["input_ids"], backbone.visual_token_ids, inputs.get("attention_mask"), answer_BN
    )
    _check_predicted(spans, predict_BN, sample_ids)
    with all_exits(
        backbone, spans, predict_BN, exits_per_chunk=exits_per_chunk, features=features
    ) as streams:
        output = model(**_forward_inputs(backbone, inputs, spans), use_cache=False, return_dict=True)
    rows = predict_BN.shape[0]
    logits_KBAV = output.logits.unflatten(0, (backbone.num_layers + 1, rows))
    return ExitLogits(
        logits_KBAV=logits_KBAV,
        valid_BA=streams.layout.predict.valid,
        features_BLF=torch.stack(streams.features_BF, 1),
        spans=spans,
        backbone=backbone,
    )


def positions_before(answer_BN: Tensor, sample_ids: Sequence[str]) -> Tensor:
    """(B, N) positions whose logits predict an answer token: one to the left of each label."""
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


def _forward_inputs(backbone: Backbone, inputs: Mapping[str, Any], spans: Spans) -> dict[str, Any]:
    """The inputs with positions that count real tokens only, as ``generate`` counts them."""
    given = {name: value for name, value in inputs.items() if value is not None and name != "labels"}
    # Multi-axis families work out their own positions from the image grid.
    own_positions = any(hasattr(module, "get_rope_index") for module in backbone.path)
    if "position_ids" not in given and "attention_mask" in given and not own_positions:
        given["position_ids"] = (spans.valid_BN.long().cumsum(1) - 1).clamp(min=0)
    return given


def _packed_labels(input_ids_BN: Tensor, answer_BN: Tensor, valid_BA: Tensor) -> Tensor:
    """(B, A) label token of each predicted position; 0 where there is none."""
    labels_BA = torch.zeros(valid_BA.shape, dtype=torch.long, device=valid_BA.device)
    # Both masks list the answer tokens of a row from left to right.
    labels_BA[valid_BA] = input_ids_BN[answer_BN.to(input_ids_BN.device)]
    return labels_BA


def _compare(found: ExitLogits, labels_BA: Tensor) -> dict[str, Tensor]:
    """The (B, K) columns of a trace; log-probabilities in float32, one exit at a time to bound memory."""
    valid_BA = found.valid_BA
    count_B = valid_BA.sum(1)
    visual_ids = torch.tensor(found.backbone.visual_token_ids, device=labels_BA.device)
    full_BAV = found.logits_KBAV[-1].float().log_softmax(-1)
    full_argmax_BA = _argmax(full_BAV, visual_ids)

    def mean_B(values_BA: Tensor) -> Tensor:
        return values_BA.masked_fill(~valid_BA, 0).sum(1) / count_B

    columns: dict[str, list[Tensor]] = {
        "risk": [], "reverse_risk": [], "agreement": [], "same_answer": [], "loss": []
    }  # fmt: skip
    for logits_BAV in found.logits_KBAV:
        exit_BAV = logits_BAV.float().log_softmax(-1)
        equal_BA = _argmax(exit_BAV, visual_ids) == full_argmax_BA
        columns["risk"].append(mean_B(kl_divergence(full_BAV, exit_BAV)))
        columns["reverse_risk"].append(mean_B(kl_divergence(exit_BAV, full_BAV)))
        columns["agreement"].append(mean_B(equal_BA.float()))
        columns["same_answer"].append((equal_BA | ~valid_BA).all(1).float())
        columns["loss"].append(mean_B(-exit_BAV.gather(-1, labels_BA[..., None]).squeeze(-1)))
    return {name: torch.stack(values, 1) for name, values in columns.items()}


def kl_divergence(log_p_V: Tensor, log_q_V: Tensor) -> Tensor:
    """KL(p || q) in nats over the last dimension, from log-probabilities; p = 0 contributes 0."""
    p_V = log_p_V.exp()
    return (p_V * (log_p_V - log_q_V)).masked_fill(p_V == 0, 0).sum(-1)


def _argmax(log_p_BAV: Tensor, excluded: Tensor) -> Tensor:
    return log_p_BAV.index_fill(-1, excluded, float("-inf")).argmax(-1)
