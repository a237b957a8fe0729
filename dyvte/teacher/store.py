"""Traces on disk: written once, resumable, by one or several ranks; read by any number of trainings.

A store is a folder of ``manifest.json`` and ``shard-00000.safetensors`` ... Which samples a shard holds
follows from the manifest alone, and a shard appears whole or not at all: a killed writer loses one shard's
work, ranks never meet, nothing is doubled.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from dyvte.errors import CheckpointError, DataError
from dyvte.files import write_atomically
from dyvte.gates import DEFAULT_FEATURES
from dyvte.teacher.freeze_grid import FreezeGrid, stream_layers
from dyvte.teacher.trace import Trace

MANIFEST = "manifest.json"
FORMAT = 1
ALL_EXITS = "all"
NO_FREEZES = "none"
GRID = "grid."
"""Before the names of a grid's tensors in a shard."""


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """What the traces of a folder were made from.

    ``fingerprint`` holds one entry per thing a trace depends on (backbone, data, prompt, features, ...); a
    store is used again only if every one is equal. ``num_samples`` counts the samples of the selection, those
    dropped during the pass included.
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
        """Positions in the selection that a shard holds."""
        start = shard * self.shard_size
        return range(start, min(start + self.shard_size, self.num_samples))


@dataclass(frozen=True, kw_only=True)
class Shard:
    """One shard's content: the trace, each sample's image, the dropped samples and notes of the pass."""

    trace: Trace
    image_ids: tuple[str, ...]
    dropped: tuple[str, ...] = ()
    notes: dict[str, int] = field(default_factory=dict)

    @staticmethod
    def cat(shards: Sequence[Shard]) -> Shard:
        """Several as one, in order; notes are added up."""
        notes: Counter[str] = Counter()
        for shard in shards:
            notes.update(shard.notes)
        return Shard(
            trace=Trace.cat([shard.trace for shard in shards]),
            image_ids=tuple(one for shard in shards for one in shard.image_ids),
            dropped=tuple(one for shard in shards for one in shard.dropped),
            notes=dict(notes),
        )


class TraceStore:
    """A folder of traces; see :meth:`create` and :meth:`open`."""

    def __init__(self, folder: Path, manifest: Manifest) -> None:
        self.folder, self.manifest = folder, manifest
        self._shards: dict[int, Shard] = {}

    @classmethod
    def create(cls, folder: str | Path, manifest: Manifest) -> TraceStore:
        """Start a store, or go on with the one that is there if it was made from the same things.

        Parameters
        ----------
        folder
            Of the store.
        manifest
            What the traces depend on.

        Raises
        ------
        CheckpointError
            If the folder holds traces of something else (the differing fields are named), or cannot be
            written.
        """
        folder = Path(folder)
        path = folder / MANIFEST
        if path.is_file():
            store = cls.open(folder)
            store.check(manifest.fingerprint)
            return cls(folder, store.manifest)
        text = json.dumps(asdict(manifest), indent=2) + "\n"
        _write(path, text)
        return cls(folder, manifest)

    @classmethod
    def open(cls, folder: str | Path) -> TraceStore:
        """An existing store; CheckpointError if there is none or its manifest cannot be read."""
        path = Path(folder) / MANIFEST
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
            manifest = Manifest(**values)
        except FileNotFoundError as error:
            raise CheckpointError(
                f"{folder}: no {MANIFEST} there, so no traces; run `dyvte trace`"
            ) from error
        except (OSError, ValueError, TypeError) as error:
            raise CheckpointError(f"{path}: not a readable trace manifest ({error})") from error
        if manifest.format != FORMAT:
            raise CheckpointError(
                f"{path}: trace format {manifest.format}, this version reads {FORMAT}; trace again"
            )
        return cls(Path(folder), manifest)

    def check(self, fingerprint: Mapping[str, str]) -> None:
        """Raise CheckpointError naming every field in which the store differs from ``fingerprint``."""
        # Stores from before exits could be thinned label all of them and do not say so; those without a grid
        # say nothing of it either.
        unsaid = {"exits": ALL_EXITS, "freezes": NO_FREEZES}
        # Older ones were decoded as today's are, but their end tokens were not written down.
        unsaid |= {name: value for name, value in fingerprint.items() if name == "decoding"}
        mine, fingerprint = {**unsaid, **self.manifest.fingerprint}, {**unsaid, **fingerprint}
        differing = [name for name in {**mine, **fingerprint} if mine.get(name) != fingerprint.get(name)]
        if differing:
            listed = "; ".join(
                f"{name}: stored {mine.get(name)!r}, this run {fingerprint.get(name)!r}" for name in differing
            )
            raise CheckpointError(
                f"the traces in {self.folder} belong to another run ({listed}). Remove that folder to trace "
                "again, or choose another output folder"
            )

    def missing(self) -> list[int]:
        """Shards that are not there or cannot be read, in order."""
        return [shard for shard in range(self.manifest.num_shards) if not self._readable(shard)]

    @property
    def complete(self) -> bool:
        """True once every shard is there."""
        return not self.missing()

    def write(self, index: int, shard: Shard) -> None:
        """Write one shard, atomically.

        Parameters
        ----------
        index
            Of the shard.
        shard
            Traces and what was dropped.

        Raises
        ------
        DataError
            If the trace's freeze grid is not of the manifest's freeze layers or has labels out of place.
        """
        from safetensors.torch import save

        trace, grid = shard.trace, shard.trace.grid
        if trace.freezes != self.manifest.freezes:
            raise DataError(
                f"{self.folder}: a trace of freeze layers {trace.freezes or 'none'} for a store of "
                f"{self.manifest.freezes or 'none'}"
            )
        if grid is not None:
            grid.check(trace.exits, trace.tensors())
        record = {
            "sample_ids": trace.sample_ids,
            "image_ids": shard.image_ids,
            "dropped": shard.dropped,
            "notes": shard.notes,
        }
        # One key only: safetensors writes several in no fixed order, and equal shards should be equal bytes.
        metadata = {"dyvte": json.dumps(record)}
        frozen = grid.tensors() if grid is not None else {}
        named = {**trace.tensors(), **{GRID + name: tensor for name, tensor in frozen.items()}}
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in named.items()}
        _write(self._path(index), save(tensors, metadata=metadata))

    def read(self, index: int) -> Shard:
        """One shard, its tensors memory-mapped."""
        if index not in self._shards:
            self._shards[index] = self._load(index)
        return self._shards[index]

    def shards(self) -> Iterator[Shard]:
        """All shards in order; CheckpointError if one is missing."""
        if missing := self.missing():
            raise CheckpointError(
                f"{self.folder}: {len(missing)} of {self.manifest.num_shards} trace shards are missing "
                f"(first: {missing[0]}); run the same `dyvte trace` or `dyvte train` again to complete them"
            )
        for index in range(self.manifest.num_shards):
            yield self.read(index)

    def trace(self, features: Sequence[str] | None = None) -> Trace:
        """All samples as one trace, in the selection's order.

        ``features`` names the parts that are wanted of each feature (None: all that are stored);
        :class:`~dyvte.errors.ConfigError` if one is not stored.
        """
        parts = [shard.trace for shard in self.shards() if len(shard.trace)]
        if features is not None:
            parts = [part.select(self.manifest.features, features) for part in parts]
        return Trace.cat(parts)

    def image_ids(self) -> tuple[str, ...]:
        """The image of every sample of :meth:`trace`."""
        return tuple(image for shard in self.shards() for image in shard.image_ids)

    def dropped(self) -> tuple[str, ...]:
        """What was dropped during the pass, as text naming file, sample and reason."""
        return tuple(text for shard in self.shards() for text in shard.dropped)

    def notes(self) -> dict[str, int]:
        """Counts of the pass, summed over shards."""
        total: dict[str, int] = {}
        for shard in self.shards():
            for name, count in shard.notes.items():
                total[name] = total.get(name, 0) + count
        return total

    def _trace_of(self, ids: tuple[str, ...], tensors: dict[str, Tensor]) -> Trace:
        """A shard's trace from its tensors by name."""
        plain = {name: tensor for name, tensor in tensors.items() if not name.startswith(GRID)}
        frozen = {n.removeprefix(GRID): tensor for n, tensor in tensors.items() if n.startswith(GRID)}
        made = self.manifest
        grid = None
        if frozen or made.freezes:
            grid = FreezeGrid(**frozen, freeze_layers=made.freezes, kv_share=made.kv_share)
        return Trace(sample_ids=ids, exits=self.manifest.exits, grid=grid, **plain)

    def _path(self, index: int) -> Path:
        return self.folder / f"shard-{index:05d}.safetensors"

    def _readable(self, index: int) -> bool:
        if index in self._shards:
            return True
        try:
            self._shards[index] = self._load(index)
        except CheckpointError:
            return False
        return True

    def _load(self, index: int) -> Shard:
        from safetensors import SafetensorError, safe_open

        path = self._path(index)
        try:
            with safe_open(path, framework="pt") as file:
                record = json.loads(file.metadata()["dyvte"])
                tensors: dict[str, Tensor] = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            return Shard(
                trace=self._trace_of(tuple(record["sample_ids"]), tensors),
                image_ids=tuple(record["image_ids"]),
                dropped=tuple(record["dropped"]),
                notes=record["notes"],
            )
        except (OSError, SafetensorError, KeyError, TypeError, ValueError, DataError) as error:
            raise CheckpointError(f"{path}: not a readable trace shard ({error})") from error


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


def _write(path: Path, content: bytes | str) -> None:
    try:
        write_atomically(path, content)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be written ({error}); is the disk full?") from error
