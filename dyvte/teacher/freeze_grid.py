"""Labels and features of streams in which the visual tokens are frozen: what a trace holds beside the exits.

Shape letters: B samples, L decoder layers, F traced freeze layers, M streams x layers behind them, E gate
features.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dyvte.errors import DataError
from dyvte.gates import select_features

LABELS = ("risk", "reverse_risk", "agreement", "same_answer", "loss")


def stream_layers(freeze_layers: Sequence[int], num_layers: int) -> list[tuple[int, int]]:
    """(f, l) of the M features that frozen streams add: up to layer f they are the plain stream.

    Parameters
    ----------
    freeze_layers
        Of the grid.
    num_layers
        L.
    """
    return [(f, layer) for f in freeze_layers for layer in range(f + 1, num_layers + 1)]


@dataclass(frozen=True)
class FreezeGrid:
    """What leaving after layer k would do to an answer whose visual tokens were updated in layers 1..f only.

    Attributes
    ----------
    risk, reverse_risk, agreement, same_answer, loss:
        (B, F, L+1) float32 as in :class:`~dyvte.teacher.trace.Trace`. Row i belongs to ``freeze_layers[i]``,
        column k to exit layer k; NaN where k < f, and at exits that are not labelled. Where k = f nothing is
        frozen: the entry is the plain exit's.
    embeddings:
        (B, E) what a gate reads before the first layer.
    features:
        (B, M, E) what the gates read in the frozen streams, from each row's own text stream, in the order of
        :func:`stream_layers`. Up to layer f they are the plain stream's and not held twice.
    freeze_layers:
        The traced f, ascending, each in 0..L-1. f = L is the plain stream.
    kv_share:
        Linear work of a frozen visual token (its key and value), as a share of an updated one's, mean over
        layers: what the backbone's shape says of prices.
    """

    risk: Tensor
    reverse_risk: Tensor
    agreement: Tensor
    same_answer: Tensor
    loss: Tensor
    embeddings: Tensor
    features: Tensor
    freeze_layers: tuple[int, ...]
    kv_share: float

    def __post_init__(self) -> None:
        freezes, last = tuple(self.freeze_layers), self.risk.shape[-1] - 1
        object.__setattr__(self, "freeze_layers", freezes)
        if not freezes or list(freezes) != sorted(set(freezes)) or not 0 <= freezes[0] <= freezes[-1] < last:
            raise DataError(f"freeze layers {freezes}: expected one or more of 0..{last - 1}, ascending")
        if not 0 < self.kv_share < 1:
            raise DataError(f"kv_share {self.kv_share}: expected the share of key and value, between 0 and 1")
        rows, size = len(self.embeddings), self.embeddings.shape[-1]
        wanted = {name: (rows, len(freezes), last + 1) for name in LABELS}
        wanted |= {"features": (rows, len(self.stream_layers), size), "embeddings": (rows, size)}
        for name, shape in wanted.items():
            if tuple(getattr(self, name).shape) != shape:
                raise DataError(
                    f"freeze grid: {name} has shape {tuple(getattr(self, name).shape)}, expected {shape} for "
                    f"freeze layers {freezes} of {last} layers"
                )

    def __len__(self) -> int:
        return len(self.embeddings)

    @property
    def num_layers(self) -> int:
        """L, the number of decoder layers."""
        return self.risk.shape[2] - 1

    @property
    def stream_layers(self) -> list[tuple[int, int]]:
        """(f, l) of the M columns of ``features``."""
        return stream_layers(self.freeze_layers, self.num_layers)

    def check(self, exits: Sequence[int], plain: dict[str, Tensor]) -> None:
        """Raise DataError unless labels stand exactly where they should, and f = k is the plain exit.

        ``plain`` holds the (B, L+1) columns of the exits; ``exits`` are those that are labelled.
        """
        for name in LABELS:
            values_BFL1 = getattr(self, name)
            for i, f in enumerate(self.freeze_layers):
                known = [k for k in exits if k >= f]
                empty = [k for k in range(self.num_layers + 1) if k not in known]
                if bool(values_BFL1[:, i, known].isnan().any()) or not bool(
                    values_BFL1[:, i, empty].isnan().all()
                ):
                    raise DataError(f"freeze grid: {name} at f = {f} must be labelled at exits {known} alone")
                if f in exits and not torch.equal(values_BFL1[:, i, f], plain[name][:, f]):
                    raise DataError(f"freeze grid: {name} at f = k = {f} differs from the plain exit's")

    def streams(self, features_BLE: Tensor) -> Tensor:
        """(B, F+1, L, E) features of all streams; the last is the plain one, ``features_BLE``."""
        parts, start = [], 0
        for f in self.freeze_layers:
            behind = self.features[:, start : start + self.num_layers - f]
            parts.append(torch.cat((features_BLE[:, :f], behind.to(features_BLE.dtype)), 1))
            start += self.num_layers - f
        return torch.stack((*parts, features_BLE), 1)

    def tensors(self) -> dict[str, Tensor]:
        """The tensor fields by name."""
        return {name: getattr(self, name) for name in (*LABELS, "embeddings", "features")}

    def map(self, change: Callable[[Tensor], Tensor]) -> FreezeGrid:
        """The same grid with every tensor changed in the same way: other rows, another device."""
        changed = {name: change(tensor) for name, tensor in self.tensors().items()}
        return dataclasses.replace(self, **changed)

    def select(self, stored: Sequence[str], wanted: Sequence[str]) -> FreezeGrid:
        """The parts ``wanted`` of its ``stored`` features; see `dyvte.gates.select_features`."""
        return dataclasses.replace(
            self,
            features=select_features(self.features, stored, wanted),
            embeddings=select_features(self.embeddings, stored, wanted),
        )

    def thinned(self, freeze_layers: Sequence[int]) -> FreezeGrid:
        """The grid with some of its freeze layers only.

        Raises
        ------
        DataError
            If one of them is not traced.
        """
        if unknown := sorted(set(freeze_layers) - set(self.freeze_layers)):
            raise DataError(
                f"freeze layers {unknown} are not traced (these are: {self.freeze_layers}); trace them"
            )
        kept = tuple(sorted(freeze_layers))
        rows = [self.freeze_layers.index(f) for f in kept]
        columns = [i for i, (f, _) in enumerate(self.stream_layers) if f in kept]
        labels = {name: getattr(self, name)[:, rows] for name in LABELS}
        return dataclasses.replace(self, **labels, features=self.features[:, columns], freeze_layers=kept)

    @staticmethod
    def cat(grids: Sequence[FreezeGrid]) -> FreezeGrid:
        """Several grids of one backbone as one, in order.

        Raises
        ------
        ValueError
            If they do not trace the same freeze layers.
        """
        facts = {(grid.freeze_layers, grid.kv_share) for grid in grids}
        if len(facts) > 1:
            raise ValueError(f"grids of other freeze layers or backbones cannot be put together: {facts}")
        names = grids[0].tensors()
        joined = {name: torch.cat([getattr(grid, name) for grid in grids]) for name in names}
        return dataclasses.replace(grids[0], **joined)
