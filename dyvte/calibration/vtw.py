"""VTW's fixed exit layer, chosen by KL (Lin et al., arXiv 2405.05803).

Shape letters: B rows, N tokens, A positions, V vocabulary, K = L+1 exit layers.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from dyvte.backbones import describe
from dyvte.errors import CalibrationError, DataError
from dyvte.spans import find_spans
from dyvte.teacher.exits import exit_logits, kl_divergence, positions_before

Direction = Literal["exit||full", "full||exit"]
Positions = Literal["last_prompt", "answer"]
Batch = Mapping[str, Any] | tuple[Mapping[str, Any], Tensor]


@dataclass(frozen=True, kw_only=True)
class LayerSearch:
    """Outcome of :func:`search_exit_layer`.

    Attributes
    ----------
    k:
        First exit layer of ``k_range`` whose mean KL is at most ``eta``; None if none qualifies.
    kl:
        (L+1,) float64 in nats, the whole curve; column k = exit layer k.
    eta:
        The bound, in nats.
    k_range:
        First and last candidate, both included.
    direction, positions:
        Which KL, and over which positions.
    num_samples:
        Rows with an image that the mean is over.
    """

    k: int | None
    kl: Tensor
    eta: float
    k_range: tuple[int, int]
    direction: Direction
    positions: Positions
    num_samples: int

    def within(self, eta: float) -> int | None:
        """The first exit layer of ``k_range`` whose mean KL is at most ``eta``; None if none is.

        Parameters
        ----------
        eta:
            Another bound than the one searched with, in nats.
        """
        return first_within(self.kl, eta, self.k_range)


def first_within(kl_K: Tensor, eta: float, k_range: tuple[int, int]) -> int | None:
    """VTW's rule on a curve: the first K of ``k_range``, ends included, with a KL of at most ``eta``.

    Parameters
    ----------
    kl_K
        (L+1,) mean KL by exit layer, in nats.
    eta
        The bound, in nats.
    k_range
        First and last K.
    """
    return next((k for k in range(k_range[0], k_range[1] + 1) if float(kl_K[k]) <= eta), None)


def search_exit_layer(
    model: nn.Module,
    batches: Iterable[Batch],
    eta: float = 0.003,
    k_range: tuple[int, int] | None = None,
    direction: Direction = "exit||full",
    positions: Positions = "last_prompt",
    *,
    exits_per_chunk: int | None = None,
) -> LayerSearch:
    """VTW's K: the first layer after which the visual tokens can go with a mean KL of at most ``eta``.

    All K come from one forward per batch; the reference re-runs the model for every K. Defaults are the
    reference's: KL(exit || full) on the last prompt position, eta 0.003; it uses 20 samples and starts at K =
    5.

    Parameters
    ----------
    model:
        A supported backbone in eval mode.
    batches:
        Model inputs of prompts, or pairs ``(inputs, answer_mask)``. Rows without an image are excluded.
    eta:
        Largest mean KL, in nats.
    k_range:
        First and last candidate, both included; (1, L-1) if None.
    direction:
        "exit||full" is KL(exit at k || full), VTW's; "full||exit" is the risk of a trace.
    positions:
        "last_prompt": the position that predicts the first answer token. "answer": the mean over all answer
        positions, which needs the answer mask.
    exits_per_chunk:
        As for `trace_exits`.

    Raises
    ------
    CalibrationError
        If no row has an image, or ``k_range`` does not lie within 0..L.
    DataError
        If ``positions="answer"`` and a batch comes without an answer mask.
    """
    backbone = describe(model)
    first, last = k_range if k_range is not None else (1, backbone.num_layers - 1)
    if not 0 <= first <= last <= backbone.num_layers:
        raise CalibrationError(
            f"k_range {(first, last)}: expected 0 <= first <= last <= {backbone.num_layers}"
        )
    total_K = torch.zeros(backbone.num_layers + 1, dtype=torch.float64)
    count = 0
    for batch in batches:
        inputs, answer_BN = batch if isinstance(batch, tuple) else (batch, None)
        spans = find_spans(
            inputs["input_ids"], backbone.visual_token_ids, inputs.get("attention_mask"), answer_BN
        )
        found = exit_logits(
            model,
            inputs,
            predict_BN=_predicted(positions, spans.prompt_BN, answer_BN),
            answer_BN=answer_BN,
            exits_per_chunk=exits_per_chunk,
        )
        kl_KB = _mean_kl(found.logits_KBAV, found.valid_BA, direction)
        has_image_B = spans.visual_BN.any(1)
        total_K += kl_KB[:, has_image_B].sum(1).double().cpu()
        count += int(has_image_B.sum())
    if count == 0:
        raise CalibrationError("no sample with an image was given; K cannot be searched")
    kl_K = total_K / count
    return LayerSearch(
        k=first_within(kl_K, eta, (first, last)),
        kl=kl_K,
        eta=eta,
        k_range=(first, last),
        direction=direction,
        positions=positions,
        num_samples=count,
    )


def _predicted(positions: Positions, prompt_BN: Tensor, answer_BN: Tensor | None) -> Tensor:
    if positions == "answer":
        if answer_BN is None:
            raise DataError("positions='answer' needs batches of (inputs, answer_mask)")
        return positions_before(answer_BN, [f"row {row}" for row in range(len(answer_BN))])
    if positions != "last_prompt":
        raise ValueError(f"positions {positions!r}: expected 'last_prompt' or 'answer'")
    count_BN = prompt_BN.cumsum(1)
    return prompt_BN & (count_BN == count_BN[:, -1:])


def _mean_kl(logits_KBAV: Tensor, valid_BA: Tensor, direction: Direction) -> Tensor:
    """(K, B) mean over the row's positions."""
    if direction not in ("exit||full", "full||exit"):
        raise ValueError(f"direction {direction!r}: expected 'exit||full' or 'full||exit'")
    full_BAV = logits_KBAV[-1].float().log_softmax(-1)
    rows = []
    for logits_BAV in logits_KBAV:
        exit_BAV = logits_BAV.float().log_softmax(-1)
        pair = (exit_BAV, full_BAV) if direction == "exit||full" else (full_BAV, exit_BAV)
        rows.append(kl_divergence(*pair).masked_fill(~valid_BA, 0).sum(1) / valid_BA.sum(1))
    return torch.stack(rows)
