"""What one teacher pass yields for a batch: everything a gate is trained, judged or calibrated on.

Shape letters: B samples, L decoder layers, E gate features, F traced freeze layers.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dyvte.errors import DataError
from dyvte.gates import select_features
from dyvte.teacher.freeze_grid import LABELS, FreezeGrid

COLUMNS = LABELS


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
        (B, L, E). Column k-1 is what the gate after layer k reads: states of the prompt text, never the
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
    grid:
        The same labels where visual tokens are frozen before they leave; None where that was not traced: then
        a row is frozen where it leaves (f = k).
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
    grid: FreezeGrid | None = None

    def __post_init__(self) -> None:
        exits = tuple(self.exits) or tuple(range(self.num_layers + 1))
        object.__setattr__(self, "exits", exits)
        if self.grid is not None and (len(self.grid), self.grid.num_layers) != (len(self), self.num_layers):
            raise DataError(
                f"the freeze grid holds {len(self.grid)} samples of {self.grid.num_layers} layers, the trace "
                f"{len(self)} of {self.num_layers}"
            )

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
    def freezes(self) -> tuple[int, ...]:
        """Freeze layers that are traced; none without a grid."""
        return () if self.grid is None else self.grid.freeze_layers

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
        """See that these exit layers are labelled.

        Parameters
        ----------
        layers:
            At which somebody may leave.
        what:
            Who, for the message.

        Raises
        ------
        DataError
            One of them is not.
        """
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
            if field.name not in ("sample_ids", "exits", "grid")
        }

    def labels(self, name: str) -> Tensor:
        """(B, F+1, L+1) labels of every schedule: frozen at ``freezes[i]``, and the plain exits (f = k) last.

        Parameters
        ----------
        name:
            "risk", "reverse_risk", "agreement", "same_answer" or "loss".
        """
        plain_B1L1 = getattr(self, name)[:, None]
        return plain_B1L1 if self.grid is None else torch.cat((getattr(self.grid, name), plain_B1L1), 1)

    def streams(self) -> Tensor:
        """(B, F+1, L, E) features of the streams that `labels` speaks of."""
        return self.features[:, None] if self.grid is None else self.grid.streams(self.features)

    def gate_inputs(self) -> dict[str, Any]:
        """What `dyvte.gates.GateStack` reads, by the names of its forward's parameters."""
        if self.grid is None:
            return {"features_BLF": self.features}
        return {
            "features_BLF": self.features,
            "embeddings_BF": self.grid.embeddings,
            "frozen_BMF": self.grid.features,
            "freeze_layers": self.freezes,
        }

    def select(self, stored: Sequence[str], wanted: Sequence[str]) -> Trace:
        """The parts ``wanted`` of its ``stored`` features; see `dyvte.gates.select_features`.

        Parameters
        ----------
        stored:
            Names of the parts that its features consist of.
        wanted:
            Of those that stay, in their new order.
        """
        features = select_features(self.features, stored, wanted)
        grid = None if self.grid is None else self.grid.select(stored, wanted)
        return dataclasses.replace(self, features=features, grid=grid)

    def thinned(
        self, *, exits: Collection[int] | None = None, freezes: Collection[int] | None = None
    ) -> Trace:
        """The trace as a thinner pass would have made it: labels at fewer exits and freeze layers.

        Parameters
        ----------
        exits:
            Exit layers that stay labelled, L in any case; None: all that are.
        freezes:
            Freeze layers that stay, none of them: no grid; None: all that are traced.

        Raises
        ------
        DataError
            If one of them is not labelled.
        """
        grid = self.grid
        if freezes is not None:
            if unknown := sorted(set(freezes) - set(self.freezes)):
                raise DataError(f"freeze layers {unknown} are not traced (these are: {self.freezes})")
            grid = grid.thinned(sorted(freezes)) if grid is not None and freezes else None
        if exits is None:
            return dataclasses.replace(self, grid=grid)
        self.check_labelled(exits, "a thinner trace")
        kept = {*exits, self.num_layers}
        lost = torch.tensor([k not in kept for k in range(self.num_layers + 1)], device=self.risk.device)
        labels = {name: getattr(self, name).masked_fill(lost, math.nan) for name in COLUMNS}
        if grid is not None:
            thin = {name: getattr(grid, name).masked_fill(lost, math.nan) for name in COLUMNS}
            grid = dataclasses.replace(grid, **thin)
        return dataclasses.replace(self, **labels, exits=tuple(sorted(kept)), grid=grid)

    def rows(self, index: Sequence[int] | Tensor) -> Trace:
        """The samples at ``index``, in that order.

        Parameters
        ----------
        index:
            Positions, from 0; one may come twice.
        """
        index = torch.as_tensor(index, dtype=torch.long)
        ids = tuple(self.sample_ids[i] for i in index.tolist())
        return self._map(lambda tensor: tensor[index.to(tensor.device)], ids)

    def to(self, device: torch.device | str) -> Trace:
        """The same trace with its tensors on ``device``.

        Parameters
        ----------
        device:
            Of all tensors, the grid's included.
        """
        return self._map(lambda tensor: tensor.to(device), self.sample_ids)

    def _map(self, change: Callable[[Tensor], Tensor], ids: tuple[str, ...]) -> Trace:
        changed = {name: change(tensor) for name, tensor in self.tensors().items()}
        grid = None if self.grid is None else self.grid.map(change)
        return Trace(sample_ids=ids, exits=self.exits, grid=grid, **changed)

    @staticmethod
    def cat(traces: Sequence[Trace]) -> Trace:
        """Several traces of one backbone as one, in order.

        Parameters
        ----------
        traces:
            That label the same schedules; at least one.
        """
        if not traces:
            raise ValueError("there is no trace to put together")
        names = traces[0].tensors()
        joined = {name: torch.cat([getattr(trace, name) for trace in traces]) for name in names}
        ids = tuple(one for trace in traces for one in trace.sample_ids)
        if any(trace.exits != traces[0].exits for trace in traces):
            raise ValueError("traces that label other exits cannot be put together")
        if any(trace.freezes != traces[0].freezes for trace in traces):
            raise ValueError("traces of other freeze layers cannot be put together")
        grids = [trace.grid for trace in traces if trace.grid is not None]
        grid = FreezeGrid.cat(grids) if grids else None
        return Trace(sample_ids=ids, exits=traces[0].exits, grid=grid, **joined)
