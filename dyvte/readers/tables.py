"""Tables with images inside: VLMEvalKit's TSV (base64) and Hugging Face parquet (bytes).

Image cells become :class:`PackedImage`: where the bytes are, read when an image is asked for, so that a table
of many gigabytes costs no memory.
"""

from __future__ import annotations

import base64
import binascii
from codecs import BOM_UTF8
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dyvte.data import EmbeddedImage
from dyvte.errors import ConfigError, DataError
from dyvte.readers.rows import Row, shown

_LONGEST_REFERENCE = 64  # VLMEvalKit: a shorter image cell is the index of the row that holds the image
_ABSENT = frozenset(
    (
        *("", "#N/A", "#N/A N/A", "#NA", "-1.#IND", "-1.#QNAN", "-NaN", "-nan", "1.#IND", "1.#QNAN", "<NA>"),
        *("N/A", "NA", "NULL", "NaN", "None", "n/a", "nan", "null"),
    )
)
"""What pandas, by which VLMEvalKit reads its tables, takes for an empty cell."""


@dataclass(frozen=True)
class PackedImage:
    """An image inside a table.

    Attributes
    ----------
    file : Path
    name : str
        Unique in the file.
    at : tuple
        TSV: byte offset and length of the base64 text. Parquet: row group and row within it.
    column : str
        Parquet column; empty for TSV.
    is_text : bool
        A parquet column that holds base64 text in place of bytes.
    item : int
        Position within the cell, where a cell holds several images.
    """

    file: Path
    name: str
    at: tuple[int, int]
    column: str = ""
    item: int = 0
    is_text: bool = False

    def read(self) -> EmbeddedImage:
        """The image with its encoded bytes (PNG, JPEG, ...).

        Raises
        ------
        DataError
            The file changed or the cell holds no image.
        """
        data = self._read_parquet() if self.column else self._read_tsv()
        if not data:
            raise DataError(f"{self.file}: no image bytes in {self.name}")
        return EmbeddedImage(data, f"{self.file}, {self.name}")

    def _read_tsv(self) -> bytes:
        try:
            with self.file.open("rb") as stream:
                stream.seek(self.at[0])
                return base64.b64decode(stream.read(self.at[1]), validate=False)
        except (OSError, binascii.Error) as error:
            raise DataError(f"{self.file}: cannot read {self.name}: {error}") from error

    def _read_parquet(self) -> bytes | None:
        group, index = self.at
        cell = _row_group(_parquet_file(self.file), self.file, group, [self.column])
        try:
            value = cell.column(0)[index].as_py()
            value = value[self.item] if isinstance(value, list) else value
            if self.is_text:
                return base64.b64decode(value, validate=False)
            return None if value is None else value["bytes"]
        except (LookupError, TypeError, ValueError) as error:  # binascii's is a ValueError
            raise DataError(f"{self.file}: cannot read {self.name}: {error}") from error


def read_table(paths: Sequence[Path]) -> list[Row]:
    """Rows of one TSV file or of the shards of one parquet split, in order."""
    rows: list[Row] = []
    for path in paths:
        rows.extend(read_parquet(path) if path.suffix == ".parquet" else read_tsv(path))
    return rows


def read_parquet(path: Path) -> Iterator[Row]:
    """Rows of a parquet file; columns of images (``{bytes, path}``) become PackedImage, or a list of them.

    Raises
    ------
    DataError
        No parquet file, or a damaged one.
    """
    file = _parquet_file(path)
    leaves = [file.schema.column(i).path for i in range(len(file.schema))]
    packed = {leaf.split(".")[0] for leaf in leaves if leaf.split(".")[-1] == "bytes"}
    wanted = [leaf for leaf in leaves if leaf.split(".")[-1] != "bytes"]
    number = 0
    for group in range(file.num_row_groups):
        for index, values in enumerate(_row_group(file, path, group, wanted, as_rows=True)):
            number += 1
            row = Row(values, f"{path}, row {number}")
            for column in packed:
                row[column] = _packed_cell(row.get(column), path, column, group, index)
            if isinstance(row.get("image"), str) and len(row["image"]) > _LONGEST_REFERENCE:
                name = f"{path.name}:{group}:{index}:image"
                row["image"] = PackedImage(path, name, (group, index), "image", is_text=True)
            yield row


def _row_group(file: Any, path: Path, group: int, columns: Sequence[str], *, as_rows: bool = False) -> Any:
    """One row group, as a table or as a list of dictionaries."""
    import pyarrow as pa

    try:
        table = file.read_row_group(group, columns=list(columns))
        return table.to_pylist() if as_rows else table
    except (OSError, ValueError, MemoryError, OverflowError, pa.ArrowException) as error:
        raise DataError(f"cannot read {path}: row group {group} is damaged: {error}") from error


def _packed_cell(cell: Any, path: Path, column: str, group: int, index: int) -> Any:
    if cell is None:
        return None
    name = f"{path.name}:{group}:{index}:{column}"
    if isinstance(cell, list):
        return [
            PackedImage(path, f"{name}:{item}", (group, index), column, item) for item in range(len(cell))
        ]
    return PackedImage(path, name, (group, index), column)


def _parquet_file(path: Path) -> Any:
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError as error:
        raise ConfigError(
            f"reading {path} needs pyarrow: pip install 'dyvte[eval]' (or pip install pyarrow)"
        ) from error
    try:
        return pq.ParquetFile(path)
    except (OSError, ValueError, MemoryError, OverflowError, pa.ArrowException) as error:
        raise DataError(f"cannot read {path}: {error}") from error


def read_tsv(path: Path, *, keep_words: bool = False) -> Iterator[Row]:
    """Rows of a tab-separated file with a header; empty cells are None, the ``image`` column is packed.

    Parameters
    ----------
    keep_words
        Leave "None", "NA" and their like as they stand: in a table of answers they are words. VLMEvalKit, and
        so this reader of its tables, takes them for empty cells.

    Raises
    ------
    DataError
        Unreadable, a row of another width, or an image cell that points to no image.
    """
    absent = frozenset(("",)) if keep_words else _ABSENT
    records = _tsv_records(path)
    header = [cell for cell, _, _ in next(records, [])]
    rows: list[Row] = []
    for number, record in enumerate(records, start=2):
        if len(record) != len(header):
            raise DataError(f"{path}, record {number}: {len(record)} columns, expected {len(header)}")
        row = Row({}, f"{path}, record {number}")
        for name, (cell, offset, length) in zip(header, record, strict=True):
            row[name] = None if cell in absent else cell
            if name == "image" and row[name] is not None and len(cell) > _LONGEST_REFERENCE:
                row[name] = _packed_text(cell, path, number, offset, length)
        rows.append(row)
    _follow_references(rows)
    return iter(rows)


def _packed_text(cell: str, path: Path, number: int, offset: int, length: int) -> Any:
    """One base64 image, or a Python-style list of them."""
    name = f"{path.name}:{number}"
    if not cell.startswith("["):
        return PackedImage(path, name, (offset, length))
    images, at = [], 0
    for item, text in enumerate(part.strip().strip("'\"") for part in cell[1:-1].split(",")):
        at = cell.index(text, at)
        images.append(PackedImage(path, f"{name}:{item}", (offset + at, len(text)), item=item))
        at += len(text)
    return images


def _follow_references(rows: Sequence[Row]) -> None:
    images = {row.get("index"): row["image"] for row in rows if not isinstance(row.get("image"), str | None)}
    for row in rows:
        if isinstance(row.get("image"), str):
            target = images.get(row["image"])
            if target is None:
                raise row.error(
                    f"the image of row {row.get('index')} is neither base64 nor the index of a row with an "
                    f"image: {shown(row['image'])}"
                )
            row["image"] = target


def _tsv_records(path: Path) -> Iterator[list[tuple[str, int, int]]]:
    """Records of (cell, byte offset of its text, byte length); quoted cells may hold tabs and line breaks."""
    try:
        with path.open("rb") as stream:
            while line := stream.readline():
                start = stream.tell() - len(line)
                if start == 0:
                    start, line = _without_mark(line)
                record, line = _record(line, start, stream)
                if line.strip():
                    yield record
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 text: {error}") from error


def _without_mark(line: bytes) -> tuple[int, bytes]:
    """Where the text of the first line starts, and that text: a byte order mark is none."""
    return (len(BOM_UTF8), line[len(BOM_UTF8) :]) if line.startswith(BOM_UTF8) else (0, line)


def _record(line: bytes, start: int, stream: Any) -> tuple[list[tuple[str, int, int]], bytes]:
    """Split one record; lines are added while a quoted cell is open."""
    cells = []
    at = 0
    while True:
        if line[at : at + 1] == b'"':
            end, line = _closing_quote(line, at + 1, stream)
            text, offset = line[at + 1 : end].replace(b'""', b'"'), at + 1
            after = end + 1
        else:
            tab = line.find(b"\t", at)
            after = tab if tab >= 0 else len(line.rstrip(b"\r\n"))
            text, offset = line[at:after], at
        cells.append((text.decode("utf-8"), start + offset, len(text)))
        if line[after : after + 1] != b"\t":
            return cells, line
        at = after + 1


def _closing_quote(line: bytes, at: int, stream: Any) -> tuple[int, bytes]:
    while True:
        end = line.find(b'"', at)
        if end < 0:
            at = len(line)
            more = stream.readline()
            if not more:
                return at, line
            line += more
        elif line[end + 1 : end + 2] == b'"':
            at = end + 2
        else:
            return end, line
