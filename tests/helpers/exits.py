"""Exits that are told, row by row, where to freeze and to leave; one run of them on stored images."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

import dyvte
from dyvte.policies import OraclePolicy
from tests.helpers.batches import VISUAL_ID
from tests.helpers.reference import greedy_cached

# With a store the tower sees each image by itself, without one all of a batch: with several threads the sums
# of its products may end in another last bit.
ENCODED_ALONE = 1e-5


def oracle(exits: Sequence[int], freezes: Sequence[int] | None = None) -> dyvte.VisualExit:
    """Each row freezes and leaves where it is told; without freezes it is updated until it leaves."""
    return dyvte.VisualExit.from_policy(OraclePolicy(exits, freezes))


def run_of(
    model, inputs, exits, store, freezes=None, steps: int = 3, visual_ids=(VISUAL_ID,)
) -> tuple[Tensor, Tensor, dyvte.PrefillRecord]:
    """Logits and tokens of a greedy answer with a store of images, and the record of its prefill."""
    with torch.no_grad(), oracle(exits, freezes)(model, images=store) as run:
        logits, tokens, _ = greedy_cached(model, inputs, visual_ids, steps)
    return logits, tokens, run.records[0]
