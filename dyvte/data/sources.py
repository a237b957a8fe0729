"""Where conversations come from: a JSON list, JSON lines, parquet, a dataset folder or a hub dataset.

Every source is read record by record, so that memory does not grow with the file.
"""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

from dyvte.data.llava import Conversations
from dyvte.data.records import TURN_KEYS
from dyvte.errors import ConfigError, DataError

_CHUNK = 1 << 20
_DELIMITER = re.compile(r"[ \t\r\n]*[,\]]")


def open_conversations(
    path: str | Path, image_folder: str | Path | None = None, *, split: str = "train"
) -> Conversations:
    """Conversations of a local file or folder.

    Parameters
    ----------
    path
        ``.json`` (a list of conversations, or one a line), ``.jsonl`` (one a line), ``.parquet``, or a folder
        that ``datasets`` can load (``save_to_disk``, or data files).
    image_folder
        What image paths in it are relative to; None: "images" beside the file.
    split
        Of a folder with several.

    Raises
    ------
    DataError
        If nothing readable is there.
    """
    path = Path(path)
    folder = path.parent / "images" if image_folder is None else Path(image_folder)
    if path.is_dir():
        read, hashed = (
            partial(_dataset_records, load=partial(_load_folder, path, split), name=str(path)),
            False,
        )
    elif not path.exists():
        raise DataError(f"{path}: there is no such data file")
    elif path.suffix == ".json":
        read, hashed = partial(_json_values, path), True
    elif path.suffix == ".jsonl":
        read, hashed = partial(_json_lines, path), True
    elif path.suffix == ".parquet":
        read, hashed = partial(_dataset_records, load=partial(_load_parquet, path), name=str(path)), False
    else:
        raise DataError(f"{path}: expected .json, .jsonl, .parquet or a dataset folder")
    return Conversations(name=str(path), records=read, image_folder=folder, hashed=hashed)


def open_hub_conversations(
    hub_id: str,
    image_folder: str | Path = "images",
    *,
    subset: str | None = None,
    split: str = "train",
    revision: str | None = None,
    streaming: bool = False,
) -> Conversations:
    """Conversations of a hub dataset with columns ``id``, ``image`` and ``conversations``.

    Parameters
    ----------
    hub_id
        Name of the dataset, ``owner/name``.
    image_folder
        For datasets whose image column holds paths.
    subset, split, revision
        As ``datasets.load_dataset`` takes them.
    streaming
        Read over the network without keeping a copy; else the dataset is downloaded and cached.
    """
    load = partial(_load_hub, hub_id, subset=subset, split=split, revision=revision, streaming=streaming)
    name = f"{hub_id}{f'/{subset}' if subset else ''} [{split}]"
    return Conversations(
        name=name,
        records=partial(_dataset_records, load=load, name=name),
        image_folder=Path(image_folder),
        hashed=False,
    )


def _json_lines(path: Path, digest: Any) -> Iterator[Any]:
    with _opened(path) as stream:
        for number, line in enumerate(stream, start=1):  # by "\n" only: answers may hold other line ends
            digest.update(line)
            if not line.strip():
                continue
            try:
                record = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise DataError(f"{path}: line {number}: not valid JSON ({error})") from error
            yield record


def _json_values(path: Path, digest: Any) -> Iterator[Any]:
    """The elements of a file that holds one JSON list, or its objects one after the other where it holds JSON
    lines under the name of a JSON file; decoded one by one."""
    with _opened(path) as stream:
        text = _Text(path, stream, digest)
        start = text.next_character()
        if start == "[":
            yield from _elements(text)
        elif start == "{":
            yield from _objects(text)
        else:
            found = f"{start!r}" if start else "an empty file"
            raise DataError(f"{path}: expected a JSON list of conversations, found {found}")


def _elements(text: _Text) -> Iterator[Any]:
    text.position += 1
    if text.next_character() == "]":
        raise DataError(f"{text.path}: the list of conversations is empty")
    while True:
        text.next_character()
        yield text.value()
        closing = text.next_character()
        if closing not in (",", "]"):
            raise text.invalid("expected ',' or ']' after a list element")
        text.position += 1
        if closing == "]":
            break
    if text.next_character():
        raise text.invalid("text after the list")


def _objects(text: _Text) -> Iterator[Any]:
    first = text.value()
    if not any(key in first for key in TURN_KEYS):
        raise DataError(
            f"{text.path}: expected a JSON list of conversations, or one a line; found an object of "
            f"{', '.join(map(repr, list(first)[:5])) or 'nothing'}"
        )
    yield first
    while text.next_character():
        yield text.value()


class _Text:
    """A file's text as a window that grows at its end and is cut at its start."""

    def __init__(self, path: Path, stream: BinaryIO, digest: Any) -> None:
        self.path, self._stream, self._digest = path, stream, digest
        self._decode = codecs.getincrementaldecoder("utf-8-sig")().decode
        self._json = json.JSONDecoder()
        self._window, self._before, self.position, self._ended = "", 0, 0, False

    def next_character(self) -> str:
        """The next character that is no white space, without passing it; "" at the end."""
        while True:
            while self.position < len(self._window) and self._window[self.position] in " \t\r\n":
                self.position += 1
            if self.position < len(self._window):
                return self._window[self.position]
            if not self._grow():
                return ""

    def value(self) -> Any:
        """The JSON value that starts here."""
        while True:
            try:
                value, end = self._json.raw_decode(self._window, self.position)
            except (ValueError, RecursionError) as error:  # ValueError alone: a number of too many digits
                if not self._grow():
                    raise self.invalid(str(error)) from error
                continue
            # A number does not show its end: one that ends with the window may go on after it.
            closed = self._window[end - 1] in '}]"' or _DELIMITER.match(self._window, end)
            if closed or not self._grow():
                self.position = end
                return value

    def invalid(self, problem: str) -> DataError:
        """An error that says where."""
        place = self._before + self.position
        return DataError(
            f"{self.path}: not valid JSON near character {place} ({problem}); "
            "expected a list of conversations"
        )

    def _grow(self) -> bool:
        """Read more, at least as much as there is, so that long values cost linear time; False at the end."""
        if self._ended:
            return False
        self._before += self.position
        self._window, self.position = self._window[self.position :], 0
        raw = self._stream.read(max(_CHUNK, len(self._window)))
        self._digest.update(raw)
        self._ended = not raw
        try:
            self._window += self._decode(raw, final=self._ended)
        except UnicodeDecodeError as error:
            raise DataError(f"{self.path}: not UTF-8 text ({error})") from error
        return not self._ended


def _opened(path: Path) -> BinaryIO:
    try:
        return path.open("rb")
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error})") from error


def _dataset_records(digest: Any, *, load: Any, name: str) -> Iterator[Any]:
    """Records of what ``load`` gives, images as their stored bytes; ``digest`` is left alone."""
    try:
        import datasets
    except ImportError as error:
        raise ConfigError(f"{name}: reading it needs the package datasets: install dyvte[train]") from error
    try:
        dataset = load(datasets)
        for column, feature in (dataset.features or {}).items():
            if isinstance(feature, datasets.Image):
                dataset = dataset.cast_column(column, datasets.Image(decode=False))
        yield from dataset
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        raise DataError(f"{name}: cannot be read as a dataset ({error})") from error


def _load_parquet(path: Path, datasets: Any) -> Any:
    return datasets.load_dataset("parquet", data_files=str(path), split="train", streaming=True)


def _load_folder(path: Path, split: str, datasets: Any) -> Any:
    if (path / "state.json").is_file() or (path / "dataset_dict.json").is_file():
        saved = datasets.load_from_disk(str(path))
        if not isinstance(saved, datasets.DatasetDict):
            return saved
        if split not in saved:
            raise ValueError(f"no split {split!r}; there are {', '.join(saved)}")
        return saved[split]
    return datasets.load_dataset(str(path), split=split, streaming=True)


def _load_hub(
    hub_id: str, datasets: Any, *, subset: str | None, split: str, revision: str | None, streaming: bool
) -> Any:
    return datasets.load_dataset(hub_id, subset, split=split, revision=revision, streaming=streaming)
