"""Traces on disk: written once, resumable, by one or several ranks; read by any number of trainings.

A store is a folder of ``manifest.json`` and ``shard-00000.safetensors`` ... Which samples a shard holds
follows from the manifest alone, and a shard appears whole or not at all: a killed writer loses one shard's
work, ranks never meet, nothing is doubled.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

from torch import Tensor

from dyvte.errors import CheckpointError, DataError
from dyvte.files import write_atomically
from dyvte.teacher.freeze_grid import FreezeGrid
from dyvte.teacher.manifest import ALL_EXITS, FORMAT, NO_FREEZES, Manifest, Shard
from dyvte.teacher.trace import Trace

MANIFEST = "manifest.json"
GRID = "grid."
"""Before the names of a grid's tensors in a shard."""


class TraceStore:
    """A folder of traces; see :meth:`create` and :meth:`open`.

    Parameters
    ----------
    folder
        Where its files are.
    manifest
        As the folder holds it.
    """

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
        """An existing store.

        Parameters
        ----------
        folder
            Written by `dyvte trace` or a training.

        Raises
        ------
        CheckpointError
            There is none, its manifest cannot be read, or another version wrote it.
        """
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
        """See that the store was made as this run would make it.

        Parameters
        ----------
        fingerprint
            Of this run, as `Manifest` has it.

        Raises
        ------
        CheckpointError
            It differs; every field in which it does is named.
        """
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
        """One shard, its tensors memory-mapped.

        Parameters
        ----------
        index
            Of the shard, from 0.
        """
        if index not in self._shards:
            self._shards[index] = self._load(index)
        return self._shards[index]

    def shards(self) -> Iterator[Shard]:
        """All shards in order.

        Raises
        ------
        CheckpointError
            One is missing.
        """
        if missing := self.missing():
            raise CheckpointError(
                f"{self.folder}: {len(missing)} of {self.manifest.num_shards} trace shards are missing "
                f"(first: {missing[0]}); run the same `dyvte trace` or `dyvte train` again to complete them"
            )
        for index in range(self.manifest.num_shards):
            yield self.read(index)

    def trace(self, features: Sequence[str] | None = None) -> Trace:
        """All samples as one trace, in the selection's order.

        Parameters
        ----------
        features
            Names of the parts that are wanted of each feature; None: all that are stored.

        Raises
        ------
        CheckpointError
            A shard is missing.
        ConfigError
            A part is not stored.
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


def _write(path: Path, content: bytes | str) -> None:
    try:
        write_atomically(path, content)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be written ({error}); is the disk full?") from error
