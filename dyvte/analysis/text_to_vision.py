"""YOPO Figure 3: each text token's attention to vision, layer by layer.

Shape letters: B rows, N tokens, T text tokens of a row, L decoder layers.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dyvte.analysis.findings import Findings, Table
from dyvte.analysis.subject import Subject
from dyvte.analysis.watching import Watched, Watcher, watch
from dyvte.plotting import COLORS, plain_axes

DEFINITION = (
    "For every text token behind the image, the template's included: its attention to a visual token, "
    "mean over heads and over the visual tokens. One line is one token of one question; the mean line is "
    "over all of them. Times the number of visual tokens it is the token's whole attention to vision."
)
_MOST_LINES = 60


class TextToVision(Watcher):
    """Per layer, one (T,) tensor of mean weights for each row, in the order seen."""

    def __init__(self, num_layers: int) -> None:
        self.weights: list[list[Tensor]] = [[] for _ in range(num_layers)]
        self.rows: list[tuple[str, list[int], int]] = []

    def see(self, batch: Watched, index: int, weights_BNN: Tensor) -> None:
        """Add a layer of a batch."""
        spans = batch.spans
        visual_BN1 = spans.visual_BN.float()[..., None]
        to_vision_BN = torch.bmm(weights_BNN, visual_BN1)[..., 0] / visual_BN1.sum(1)
        for row, prompt_N in enumerate(spans.prompt_BN):
            self.weights[index].append(to_vision_BN[row, prompt_N])
            if index == 0:
                ids = batch.input_ids_BN[row, prompt_N].tolist()
                self.rows.append((batch.question_ids[row], ids, int(spans.visual_BN[row].sum())))


def study(subject: Subject) -> Findings:
    """One pass with attention."""
    found = TextToVision(subject.num_layers)
    watch(subject, found.see)
    tokenizer = subject.pipeline.processor.tokenizer
    questions = [
        {
            "question_id": question_id,
            "tokens": tokenizer.convert_ids_to_tokens(ids),
            "visual_tokens": num_visual,
            "mean_weight": [weights[row].tolist() for weights in found.weights],
        }
        for row, (question_id, ids, num_visual) in enumerate(found.rows)
    ]
    lines_LT = torch.stack([torch.cat(weights) for weights in found.weights])
    whole_LT = torch.stack(
        [
            torch.cat([one * row[2] for one, row in zip(weights, found.rows, strict=True)])
            for weights in found.weights
        ]
    )
    levels = torch.tensor([0.1, 0.5, 0.9])
    spread_L3 = whole_LT.quantile(levels, dim=1).T
    rows = [
        [str(k + 1), f"{100 * mean:.1f} %", *(f"{100 * one:.1f} %" for one in spread)]
        for k, (mean, spread) in enumerate(zip(whole_LT.mean(1).tolist(), spread_L3.tolist(), strict=True))
    ]
    return Findings(
        title=f"Attention of text tokens to vision, {subject.num_layers} layers",
        definition=DEFINITION,
        metrics={"mean_weight": lines_LT.mean(1).tolist(), "questions": questions},
        table=Table(["layer", "mean attention to vision", "10 %", "median", "90 %"], rows),
        paint=lambda figure: _paint(figure, lines_LT),
        size=(6.4, 3.8),
    )


def _paint(figure: Any, lines_LT: Tensor) -> None:
    axes = figure.subplots()
    layers = range(1, len(lines_LT) + 1)
    for line_L in lines_LT[:, :_MOST_LINES].T.numpy():
        axes.plot(layers, line_L, lw=0.6, alpha=0.35, color=COLORS[2])
    axes.plot(layers, lines_LT.mean(1).numpy(), "o-", ms=3, lw=1.6, color=COLORS[0], label="mean")
    axes.set_xlabel("layer")
    axes.set_ylabel("attention to a visual token")
    axes.set_ylim(bottom=0)
    plain_axes(axes)
    axes.legend(frameon=False, fontsize=8)
