"""DyVTE's three stages: attention within and between text and image, layer by layer.

Shape letters: B rows, N tokens, L decoder layers.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from dyvte.analysis.findings import Findings, Table
from dyvte.analysis.subject import Subject
from dyvte.analysis.watching import Watched, Watcher, watch
from dyvte.plotting import COLORS, plain_axes

FLOWS = ("text to image", "text to text", "text to first token", "image to image", "image to text")
"""Queries, and the keys whose share of their attention is counted."""

DEFINITION = (
    "Mean over heads, over queries and over the sampled questions with their greedy answers. Text: the "
    "tokens behind the image, as queries; all text but the row's first token, as keys (that one draws "
    "attention whatever it says, so it counts apart). Image: the visual tokens; what they pay to the "
    "first token is the rest of their attention. The stages are our reading of the paper's empirical "
    "study, which names three (early fusion, intra-modality modelling, multimodal reasoning) without a "
    "rule in its abstract: early fusion are the first layers with text-to-image attention of at least its "
    "mean over layers; multimodal reasoning starts at the next layer that reaches this mean again; what "
    "lies between is intra-modality modelling. The reasoning no longer needs the image behind the first K "
    "whose mean KL(exit || full) is at most eta."
)


class Flows(Watcher):
    """Sums over queries: (L, 5) shares in the order of FLOWS."""

    def __init__(self, num_layers: int) -> None:
        self.sums_L5 = torch.zeros(num_layers, len(FLOWS), dtype=torch.float64)
        self.queries_5 = torch.zeros(len(FLOWS), dtype=torch.float64)

    def see(self, batch: Watched, index: int, weights_BNN: Tensor) -> None:
        """Add a layer of a batch."""
        spans = batch.spans
        text_keys_BN = spans.valid_BN & ~spans.visual_BN & ~batch.first_BN
        keys_BN3 = torch.stack([spans.visual_BN, text_keys_BN, batch.first_BN], -1).float()
        shares_BN3 = torch.bmm(weights_BNN, keys_BN3).double()
        from_text_3 = shares_BN3[spans.prompt_BN | spans.answer_BN].sum(0)
        from_image_3 = shares_BN3[spans.visual_BN].sum(0)
        self.sums_L5[index] += torch.cat([from_text_3, from_image_3[:2]])
        if index == 0:
            text, image = int((spans.prompt_BN | spans.answer_BN).sum()), int(spans.visual_BN.sum())
            self.queries_5 += torch.tensor([text, text, text, image, image])

    def means_L5(self) -> Tensor:
        """Means over queries."""
        return self.sums_L5 / self.queries_5


def stage_ends(text_to_image_L: Sequence[float]) -> tuple[int | None, int | None]:
    """Last layer (1-based) of early fusion, and first layer of multimodal reasoning; our reading.

    None where the curve does not start at or above its mean, or never comes back to it.
    """
    mean = sum(text_to_image_L) / len(text_to_image_L)
    above = [share >= mean for share in text_to_image_L]
    if not above[0] or all(above):
        return None, None
    fusion = above.index(False)
    again = next((k for k in range(fusion, len(above)) if above[k]), None)
    return fusion, None if again is None else again + 1


def study(subject: Subject) -> Findings:
    """One pass with attention, one with all exits."""
    flows = Flows(subject.num_layers)
    watch(subject, flows.see, answered=True)
    means_L5 = flows.means_L5()
    fusion, reasoning = stage_ends(means_L5[:, 0].tolist())
    eta = max(subject.config.etas)
    search = subject.search()
    enough = search.within(eta)
    rows = [
        [str(k + 1), *(f"{100 * share:.1f} %" for share in row.tolist()), f"{float(search.kl[k + 1]):.4f}"]
        for k, row in enumerate(means_L5)
    ]
    rows.append(["early fusion ends", str(fusion or "not seen"), *[""] * 5])
    rows.append(["reasoning resumes", str(reasoning or "not seen"), *[""] * 5])
    rows.append([f"image not needed behind (eta {eta:g})", str(enough or "none"), *[""] * 5])
    marks = {"early_fusion_until": fusion, "reasoning_from": reasoning, "image_needed_until": enough}
    return Findings(
        title=f"Attention within and between text and image, {subject.num_layers} layers",
        definition=DEFINITION,
        metrics={
            "flows": list(FLOWS),
            "shares": means_L5.tolist(),
            "kl": search.kl.tolist(),
            "eta": eta,
            **marks,
        },
        table=Table(["layer", *FLOWS, "KL of an exit behind it"], rows),
        paint=lambda figure: _paint(figure, means_L5, marks),
        size=(6.4, 4.0),
    )


def _paint(figure: Any, means_L5: Tensor, marks: dict[str, int | None]) -> None:
    axes = figure.subplots()
    layers = range(1, len(means_L5) + 1)
    for number, flow in enumerate(FLOWS):
        style = "--" if flow == "text to first token" else "o-"
        axes.plot(
            layers, 100 * means_L5[:, number].numpy(), style, ms=3, lw=1.2, color=COLORS[number], label=flow
        )
    for (name, layer), shift in zip(marks.items(), (0.5, -0.5, 0.5), strict=True):
        if layer is not None:
            axes.axvline(layer + shift, color="#999999", lw=0.8, ls=":")
            axes.annotate(name.replace("_", " "), (layer + shift, 97), rotation=90, fontsize=7, va="top")
    axes.set_xlabel("layer")
    axes.set_ylabel("share of the attention, %")
    axes.set_ylim(0, 100)
    axes.locator_params(axis="x", integer=True)
    plain_axes(axes)
    axes.legend(frameon=False, fontsize=8)
