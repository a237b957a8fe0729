"""YOPO Figure 5: rho of every head and layer, attention to vision over attention to text.

Shape letters: L decoder layers, H query heads.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from dyvte.analysis.findings import Findings, Table
from dyvte.analysis.subject import Subject
from dyvte.calibration import measure_profile

DEFINITION = (
    "rho of a head: the attention that a question's tokens, visual ones included, pay to visual tokens "
    "over what they pay to text, both summed over the tokens; mean over the sampled questions. YOPO "
    "prunes heads of low rho for visual tokens; `dyvte profile` stores the same "
    "measure."
)


def study(subject: Subject) -> Findings:
    """One stock pass."""
    profile = measure_profile(subject.pipeline.model, (batch.inputs for batch in subject.batches()))
    rho_LH = profile.rho_SLH.double().mean(0)
    rows = [
        [str(k + 1), *(f"{value:.3f}" for value in (row.min(), row.median(), row.max()))]
        for k, row in enumerate(rho_LH)
    ]
    return Findings(
        title=f"rho of {rho_LH.shape[1]} heads in {rho_LH.shape[0]} layers",
        definition=DEFINITION,
        metrics={"rho": rho_LH.tolist(), "num_samples": len(profile.rho_SLH)},
        table=Table(["layer", "least rho", "median", "most"], rows),
        paint=lambda figure: _paint(figure, rho_LH),
        size=(6.0, 3.4),
    )


def _paint(figure: Any, rho_LH: Tensor) -> None:
    axes = figure.subplots()
    shown = axes.imshow(
        rho_LH.T.numpy(), aspect="auto", cmap="viridis", interpolation="nearest", origin="lower"
    )
    layers, heads = rho_LH.shape
    axes.set_xticks(range(0, layers, max(1, layers // 10)), range(1, layers + 1, max(1, layers // 10)))
    axes.set_yticks(range(0, heads, max(1, heads // 8)), range(1, heads + 1, max(1, heads // 8)))
    axes.set_xlabel("layer")
    axes.set_ylabel("head")
    figure.colorbar(shown, ax=axes, label="rho")
