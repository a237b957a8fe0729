"""What one teacher pass yields for a batch: everything a gate is trained, judged or calibrated on.

Shape letters: B samples, L decoder layers, F gate features.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

COLUMNS = ("risk", "reverse_risk", "agreement", "same_answer", "loss")


@dataclass(frozen=True)
class Trace:
    """Labels at every exit layer and features of every layer, for B samples.

    Attributes
    ----------
    risk, reverse_risk:
        (B, L+1) float32, nats. KL(full || exit at k) and KL(exit at k || full), mean over the sample's answer
        positions, closing EOS included. Column k is ``exit_layer`` k; column L is exactly 0.
    agreement:
        (B, L+1) float32. Share of answer positions whose argmax equals the full model's.
    same_answer:
        (B, L+1) float32, 0 or 1. Argmax equality at ALL answer positions. On labels that are the full model's
        own greedy answer (``label_source="greedy"``) this is exactly "the whole greedy answer is the same";
        on given answers it is teacher-forced equality along that answer.
    loss:
        (B, L+1) float32, nats. Mean cross-entropy of the traced answer: the ground truth with
        ``label_source="data"``, the full model's own answer with ``"greedy"``.
    features:
        (B, L, F). Column k-1 is what the gate after layer k reads: states of the prompt text, never the
        answer.
    sample_ids:
        B ids.
    num_visual:
        (B,) int64 visual tokens per sample; 0 where there is no image.
    """

    risk: Tensor
    reverse_risk: Tensor
    agreement: Tensor
    same_answer: Tensor
    loss: Tensor
    features: Tensor
    sample_ids: tuple[str, ...]
    num_visual: Tensor

    def __len__(self) -> int:
        return self.risk.shape[0]

    @property
    def num_layers(self) -> int:
        """L, the number of decoder layers."""
        return self.risk.shape[1] - 1

    def tensors(self) -> dict[str, Tensor]:
        """The tensor fields by name."""
        return {
            field.name: getattr(self, field.name)
            for field in dataclasses.fields(self)
            if field.name != "sample_ids"
        }

    def rows(self, index: Sequence[int] | Tensor) -> Trace:
        """The samples at ``index``, in that order."""
        index = torch.as_tensor(index, dtype=torch.long)
        picked = {name: tensor[index.to(tensor.device)] for name, tensor in self.tensors().items()}
        return Trace(sample_ids=tuple(self.sample_ids[i] for i in index.tolist()), **picked)

    def to(self, device: torch.device | str) -> Trace:
        """The same trace with its tensors on ``device``."""
        moved = {name: tensor.to(device) for name, tensor in self.tensors().items()}
        return Trace(sample_ids=self.sample_ids, **moved)

    @staticmethod
    def cat(traces: Sequence[Trace]) -> Trace:
        """Several traces of one backbone as one, in order."""
        if not traces:
            raise ValueError("there is no trace to put together")
        names = traces[0].tensors()
        joined = {name: torch.cat([getattr(trace, name) for trace in traces]) for name in names}
        return Trace(sample_ids=tuple(one for trace in traces for one in trace.sample_ids), **joined)
