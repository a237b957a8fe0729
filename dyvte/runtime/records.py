"""What a block reports. Shapes: B rows, L decoder layers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dyvte.errors import ExitRuntimeError
from dyvte.gates import FoundGroups


@dataclass(frozen=True)
class PrefillRecord:
    """One prefill with visual tokens. Tensors are detached and on the CPU.

    Attributes
    ----------
    exit_layers_B
        (B,) int64: layers in which text could read the visual tokens; L: they never left; -1: a row without
        an image.
    freeze_layers_B
        (B,) int64: layers that updated them, by the policy; the exit layer where it froze nothing.
    gate_logits_BL
        (B, L) float32: exit minus stay logit; column k-1 = after layer k; NaN where no gate ran.
    freeze_logits_BL
        (B, L) float32: freeze minus update logit; column j = after layer j, 0: before the first; NaN where no
        gate ran.
    num_visual_B
        (B,) int64.
    kv_bytes
        Bytes that each layer's cache holds after the prefill; empty without a cache.
    kv_bytes_alone
        What they would hold if no row shared its image with another.
    shared_B
        (B,) bool: rows that read a stored image.
    not_shared
        Why other rows with an image did not; None where there was no store, or no such reason.
    gate_fallbacks
        Rows whose gate output was not finite.
    visual_tokens_BL
        (B, L) int64: visual tokens that each layer updated; what exits, freezes and reductions left.
    frozen_tokens_BL
        (B, L) int64: visual tokens of which each layer computed keys and values alone.
    text_tokens_BL
        (B, L) int64: all other tokens that each layer processed; some reductions drop text as well.
    score_layers
        Layers k (1..L) in which the attention of each row's last prompt token was computed apart, for a
        reduction that ranks by it; rows that carried visual tokens there paid for it.
    found
        Calibrated groups of the rows, where the gates' thresholds are by group.
    """

    exit_layers_B: Tensor
    freeze_layers_B: Tensor
    gate_logits_BL: Tensor
    freeze_logits_BL: Tensor
    num_visual_B: Tensor
    kv_bytes: tuple[int, ...]
    kv_bytes_alone: tuple[int, ...]
    shared_B: Tensor
    not_shared: str | None
    gate_fallbacks: int
    visual_tokens_BL: Tensor
    frozen_tokens_BL: Tensor
    text_tokens_BL: Tensor
    score_layers: tuple[int, ...]
    found: FoundGroups | None = None

    @property
    def kv_bytes_B(self) -> Tensor:
        """(B,) float64: each row's share of `kv_bytes_alone`, layer by layer, by the tokens that it holds."""
        held_BL = (self.visual_tokens_BL + self.frozen_tokens_BL + self.text_tokens_BL).double()
        bytes_L = torch.tensor(self.kv_bytes_alone, dtype=torch.float64)
        share_BL = held_BL[:, : len(bytes_L)] / held_BL.sum(0).clamp(min=1)[: len(bytes_L)]
        return (share_BL * bytes_L).sum(1)


class Run:
    """What happened inside a block; stays readable after it.

    Attributes
    ----------
    records
        One `PrefillRecord` for each prefill that contained visual tokens.
    sample_ids
        Set it before a batch where a policy depends on the sample (random, oracle); one id per prompt.
    transferred
        True where the gates belong to another backbone of the same shape.
    """

    def __init__(self, transferred: bool = False) -> None:
        self.records: list[PrefillRecord] = []
        self.sample_ids: Sequence[str] | None = None
        self.transferred = transferred

    @property
    def exit_layers(self) -> Tensor:
        """(B,) int64 exit layers of the last record."""
        return self._last().exit_layers_B

    @property
    def freeze_layers(self) -> Tensor:
        """(B,) int64 freeze layers of the last record."""
        return self._last().freeze_layers_B

    @property
    def gate_logits(self) -> Tensor:
        """(B, L) float32 gate logits of the last record."""
        return self._last().gate_logits_BL

    def _last(self) -> PrefillRecord:
        if not self.records:
            raise ExitRuntimeError("no prefill with visual tokens has run in this block yet")
        return self.records[-1]
