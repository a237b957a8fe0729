"""Random traces: every label and feature drawn, nothing of a model in them."""

from __future__ import annotations

import torch

from dyvte.teacher.freeze_grid import FreezeGrid, stream_layers
from dyvte.teacher.trace import Trace


def make_trace(
    rows: int, layers: int, seed: int = 0, features: int = 4, freezes: tuple[int, ...] = ()
) -> Trace:
    """A trace of B = ``rows`` samples; with a freeze grid where ``freezes`` are given."""
    generator = torch.Generator().manual_seed(seed)

    def uniform(*shape: int) -> torch.Tensor:
        return torch.rand(*shape, generator=generator)

    risk, reverse = uniform(rows, layers + 1), uniform(rows, layers + 1)
    risk[:, -1] = reverse[:, -1] = 0
    agreement = (uniform(rows, layers + 1) > 0.4).float()
    agreement[:, -1] = 1
    loss = 1 + 0.1 * uniform(rows, layers + 1)
    plain = {
        "risk": risk, "reverse_risk": reverse, "agreement": agreement, "same_answer": agreement.floor(),
        "loss": loss, "features": torch.randn(rows, layers, features, generator=generator),
    }  # fmt: skip
    grid = None
    if freezes:
        labels = {}
        for name in ("risk", "reverse_risk", "agreement", "same_answer", "loss"):
            drawn = uniform(rows, len(freezes), layers + 1)
            drawn = (drawn > 0.4).float() if name in ("agreement", "same_answer") else drawn
            for i, f in enumerate(freezes):
                drawn[:, i, :f], drawn[:, i, f] = torch.nan, plain[name][:, f]
            labels[name] = drawn
        behind = len(stream_layers(freezes, layers))
        grid = FreezeGrid(
            **labels,
            embeddings=torch.randn(rows, features, generator=generator),
            features=torch.randn(rows, behind, features, generator=generator),
            freeze_layers=freezes,
            kv_share=1 / 6,
        )
    ids = tuple(map(str, range(rows)))
    return Trace(**plain, sample_ids=ids, num_visual=torch.full((rows,), 9), grid=grid)
