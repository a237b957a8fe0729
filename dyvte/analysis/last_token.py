"""VTW Figures 4 and 5: what the last token attends to, per layer and per output token.

Shape letters: B rows, N tokens, L decoder layers, T output tokens.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dyvte.analysis.findings import Findings, Table
from dyvte.analysis.subject import Subject
from dyvte.analysis.watching import KINDS, Watched, Watcher, watch
from dyvte.plotting import COLORS, plain_axes
from dyvte.teacher.exits import positions_before

DEFINITION = (
    "The attention of the token that predicts each output token (the last prompt token, then the output "
    "tokens), mean over heads, summed over the tokens of each kind: system (text before the image), "
    "visual, instruction (other text before the answer, the template's included) and output. Mean over "
    "the sampled questions' own greedy answers, the closing token included. Per layer: mean over output "
    "tokens; per output token: mean over layers."
)


class LastToken(Watcher):
    """Sums over questions: (L, T, 4) shares, and (T,) how many questions have a t-th output token."""

    def __init__(self, num_layers: int, max_outputs: int) -> None:
        self.sums_LT4 = torch.zeros(num_layers, max_outputs, len(KINDS), dtype=torch.float64)
        self.counts_T = torch.zeros(max_outputs, dtype=torch.int64)
        self.tokens_4 = torch.zeros(len(KINDS), dtype=torch.float64)

    def see(self, batch: Watched, index: int, weights_BNN: Tensor) -> None:
        """Add a layer of a batch."""
        answer_BN = batch.spans.answer_BN
        predict_BN = positions_before(answer_BN, batch.question_ids)
        # The n-th predicting position of a row predicts its n-th output token.
        outputs_R = (predict_BN.cumsum(1) - 1)[predict_BN]
        shares_BN4 = torch.bmm(weights_BNN, batch.kinds_BN4)
        self.sums_LT4[index].index_add_(0, outputs_R, shares_BN4[predict_BN].double())
        if index == 0:
            self.counts_T += torch.bincount(outputs_R, minlength=len(self.counts_T))
            self.tokens_4 += batch.kinds_BN4.sum((0, 1)).double()

    def means_LT4(self) -> Tensor:
        """Means over questions, of the output tokens that occur."""
        seen = int((self.counts_T > 0).sum())
        return self.sums_LT4[:, :seen] / self.counts_T[:seen, None]


def study(subject: Subject) -> Findings:
    """Generate, then look at one pass over prompts and answers."""
    sums = LastToken(subject.num_layers, subject.config.max_new_tokens)
    watch(subject, sums.see, answered=True)
    means_LT4 = sums.means_LT4()
    weight_T = sums.counts_T[: means_LT4.shape[1]].double()
    per_layer_L4 = (means_LT4 * weight_T[:, None]).sum(1) / weight_T.sum()
    per_output_T4 = means_LT4.mean(0)
    tokens_4 = sums.tokens_4 / len(subject.sampled)
    rows = [[str(k + 1), *_cells(shares_4)] for k, shares_4 in enumerate(per_layer_L4)]
    rows += [[f"output token {t + 1}", *_cells(shares_4)] for t, shares_4 in enumerate(per_output_T4)]
    rows.append(["tokens per question", *(f"{count:.1f}" for count in tokens_4.tolist())])
    return Findings(
        title=f"Attention of the last token, {subject.num_layers} layers",
        definition=DEFINITION,
        metrics={
            "kinds": list(KINDS),
            "per_layer": per_layer_L4.tolist(),
            "per_output_token": per_output_T4.tolist(),
            "all": means_LT4.tolist(),
            "questions_with_output_token": sums.counts_T[: means_LT4.shape[1]].tolist(),
            "tokens_per_question": tokens_4.tolist(),
        },
        table=Table(["layer", *KINDS], rows),
        paint=lambda figure: _paint(figure, per_layer_L4, per_output_T4),
        size=(8.4, 3.4),
    )


def _cells(shares_4: Tensor) -> list[str]:
    return [f"{100 * share:.1f} %" for share in shares_4.tolist()]


def _paint(figure: Any, per_layer_L4: Tensor, per_output_T4: Tensor) -> None:
    panels = figure.subplots(1, 2, sharey=True)
    panels[0].set_ylabel("attention of the last token, %")
    labels = ("layer", "output token")
    found = (100 * per_layer_L4.numpy(), 100 * per_output_T4.numpy())
    for axes, shares, label in zip(panels, found, labels, strict=True):
        for number, kind in enumerate(KINDS):
            places = range(1, len(shares) + 1)
            axes.plot(places, shares[:, number], "o-", ms=3, lw=1.2, color=COLORS[number], label=kind)
        axes.set_xlabel(label)
        axes.set_ylim(0, 100)
        axes.locator_params(axis="x", integer=True)
        plain_axes(axes)
    panels[0].legend(frameon=False, fontsize=8)
