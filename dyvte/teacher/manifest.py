"""What a store of traces says of itself: how they were made, and what one file of it holds."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from dyvte.gates import DEFAULT_FEATURES
from dyvte.teacher.freeze_grid import FreezeGrid, stream_layers
from dyvte.teacher.trace import Trace

FORMAT = 1
ALL_EXITS = "all"
NO_FREEZES = "none"


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """What the traces of a folder were made from.

    Attributes
    ----------
    fingerprint
        One entry per thing that a trace depends on (backbone, data, prompt, features, ...); a store is used
        again only if every one is equal.
    num_samples
        Of the selection, those dropped during the pass included.
    shard_size
        Samples in a shard; the last may hold fewer.
    num_layers
        L.
    feature_size
        F, of all parts together.
    format
        Version of the files.
    """

    fingerprint: dict[str, str]
    num_samples: int
    shard_size: int
    num_layers: int
    feature_size: int
    format: int = FORMAT

    @property
    def features(self) -> tuple[str, ...]:
        """Names of the parts that the features hold."""
        return tuple(self.fingerprint.get("features", "+".join(DEFAULT_FEATURES)).split("+"))

    @property
    def exits(self) -> tuple[int, ...]:
        """Exit layers that the traces label."""
        text = self.fingerprint.get("exits", ALL_EXITS)
        return tuple(range(self.num_layers + 1)) if text == ALL_EXITS else tuple(map(int, text.split(",")))

    @property
    def freezes(self) -> tuple[int, ...]:
        """Freeze layers that the traces label; none where they have no grid."""
        text = self.fingerprint.get("freezes", NO_FREEZES)
        return () if text == NO_FREEZES else tuple(map(int, text.split(",")))

    @property
    def kv_share(self) -> float:
        """Of a frozen visual token's work; see `FreezeGrid`. nan where the traces have no grid."""
        return float(self.fingerprint.get("kv_share", "nan"))

    @property
    def num_shards(self) -> int:
        """Number of shard files."""
        return -(-self.num_samples // self.shard_size)

    def shard_range(self, shard: int) -> range:
        """Positions in the selection that a shard holds.

        Parameters
        ----------
        shard
            Its number, from 0.
        """
        start = shard * self.shard_size
        return range(start, min(start + self.shard_size, self.num_samples))


@dataclass(frozen=True, kw_only=True)
class Shard:
    """One shard's content.

    Attributes
    ----------
    trace
        Of the samples that could be used.
    image_ids
        Of each of them: equal ids share an image.
    dropped
        Messages on those that could not.
    notes
        What was counted during the pass, by name.
    """

    trace: Trace
    image_ids: tuple[str, ...]
    dropped: tuple[str, ...] = ()
    notes: dict[str, int] = field(default_factory=dict)

    @staticmethod
    def cat(shards: Sequence[Shard]) -> Shard:
        """Several as one, in order; notes are added up.

        Parameters
        ----------
        shards
            Of one store; at least one.
        """
        notes: Counter[str] = Counter()
        for shard in shards:
            notes.update(shard.notes)
        return Shard(
            trace=Trace.cat([shard.trace for shard in shards]),
            image_ids=tuple(one for shard in shards for one in shard.image_ids),
            dropped=tuple(one for shard in shards for one in shard.dropped),
            notes=dict(notes),
        )


def exits_text(exits: Sequence[int], num_layers: int) -> str:
    """Labelled exits as a fingerprint holds them.

    Parameters
    ----------
    exits
        That are labelled.
    num_layers
        L.
    """
    return ALL_EXITS if len(exits) == num_layers + 1 else ",".join(map(str, exits))


def grid_fingerprint(freezes: Sequence[int], kv_share: float) -> dict[str, str]:
    """Entries of a fingerprint for traces with a grid of these freeze layers; none without a grid.

    Parameters
    ----------
    freezes
        Freeze layers of the grid.
    kv_share
        FLOPs of a frozen token's keys and values, as a share of its layer's.
    """
    return {"freezes": ",".join(map(str, freezes)), "kv_share": repr(kv_share)} if freezes else {}


def empty_trace(
    num_layers: int,
    feature_size: int,
    dtype: torch.dtype,
    exits: tuple[int, ...] = (),
    freezes: tuple[int, ...] = (),
    kv_share: float = math.nan,
) -> Trace:
    """A trace of no samples, for a shard all of whose samples were dropped; with a grid, if any freezes.

    Parameters
    ----------
    num_layers
        L.
    feature_size
        F.
    dtype
        Of the features.
    exits
        That are labelled.
    freezes
        Freeze layers of the grid.
    kv_share
        FLOPs of a frozen token's keys and values, as a share of its layer's.
    """
    column = torch.zeros(0, num_layers + 1)
    grid = None
    if freezes:
        labels = torch.zeros(0, len(freezes), num_layers + 1)
        behind = torch.zeros(0, len(stream_layers(freezes, num_layers)), feature_size, dtype=dtype)
        grid = FreezeGrid(*(labels,) * 5, behind.new_zeros(0, feature_size), behind, freezes, kv_share)
    return Trace(
        risk=column,
        reverse_risk=column,
        agreement=column,
        same_answer=column,
        loss=column,
        features=torch.zeros(0, num_layers, feature_size, dtype=dtype),
        sample_ids=(),
        num_visual=torch.zeros(0, dtype=torch.long),
        exits=exits,
        grid=grid,
    )
