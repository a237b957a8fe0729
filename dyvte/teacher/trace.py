"""What one teacher pass yields for a batch: everything a gate is trained, judged or calibrated on.

Shape letters: B samples, L decoder layers, F gate features.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dyvte.errors import DataError

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
    exits:
        The exit layers that are labelled, ascending; L, the full model, is always one. All of 0..L unless
        the pass was thinned. The columns of the others are NaN, and nobody may leave there: gates there are
        closed (:data:`dyvte.gates.CLOSED`), objectives pass over them, and whatever judges decisions refuses
        gates that could fire at an exit without a label (:meth:`check_labelled`).
    """

    risk: Tensor
    reverse_risk: Tensor
    agreement: Tensor
    same_answer: Tensor
    loss: Tensor
    features: Tensor
    sample_ids: tuple[str, ...]
    num_visual: Tensor
    exits: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        exits = tuple(self.exits) or tuple(range(self.num_layers + 1))
        object.__setattr__(self, "exits", exits)

    def __len__(self) -> int:
        return self.risk.shape[0]

    @property
    def num_layers(self) -> int:
        """L, the number of decoder layers."""
        return self.risk.shape[1] - 1

    @property
    def complete(self) -> bool:
        """Is every exit layer labelled?"""
        return len(self.exits) == self.num_layers + 1

    @property
    def labelled_gates(self) -> slice | list[int]:
        """Columns (k-1) of the gates 1..L-1 whose exits are labelled."""
        if self.complete:
            return slice(0, self.num_layers - 1)
        return [k - 1 for k in self.exits if 1 <= k < self.num_layers]

    @property
    def labelled(self) -> Tensor:
        """(L+1,) bool, on the trace's device: which columns hold labels."""
        mask = torch.zeros(self.num_layers + 1, dtype=torch.bool)
        mask[list(self.exits)] = True
        return mask.to(self.risk.device)

    def check_labelled(self, layers: Iterable[int], what: str) -> None:
        """Raise DataError unless all ``layers`` are labelled; ``what`` wants to leave there."""
        if unknown := sorted(set(layers) - set(self.exits)):
            raise DataError(
                f"{what} can leave after layers {unknown[:8]}, which these traces do not label (they label "
                f"{len(self.exits)} of {self.num_layers + 1} exits): trace without thinning, or train the "
                "gates on traces thinned in the same way"
            )

    def tensors(self) -> dict[str, Tensor]:
        """The tensor fields by name."""
        return {
            field.name: getattr(self, field.name)
            for field in dataclasses.fields(self)
            if field.name not in ("sample_ids", "exits")
        }

    def rows(self, index: Sequence[int] | Tensor) -> Trace:
        """The samples at ``index``, in that order."""
        index = torch.as_tensor(index, dtype=torch.long)
        picked = {name: tensor[index.to(tensor.device)] for name, tensor in self.tensors().items()}
        ids = tuple(self.sample_ids[i] for i in index.tolist())
        return Trace(sample_ids=ids, exits=self.exits, **picked)

    def to(self, device: torch.device | str) -> Trace:
        """The same trace with its tensors on ``device``."""
        moved = {name: tensor.to(device) for name, tensor in self.tensors().items()}
        return Trace(sample_ids=self.sample_ids, exits=self.exits, **moved)

    @staticmethod
    def cat(traces: Sequence[Trace]) -> Trace:
        """Several traces of one backbone as one, in order."""
        if not traces:
            raise ValueError("there is no trace to put together")
        names = traces[0].tensors()
        joined = {name: torch.cat([getattr(trace, name) for trace in traces]) for name in names}
        ids = tuple(one for trace in traces for one in trace.sample_ids)
        if any(trace.exits != traces[0].exits for trace in traces):
            raise ValueError("traces that label other exits cannot be put together")
        return Trace(sample_ids=ids, exits=traces[0].exits, **joined)
