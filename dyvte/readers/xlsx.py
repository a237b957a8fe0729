"""The smallest workbook that spreadsheet programs and MMBench's server read: one sheet of text cells; and the
first sheet of any workbook."""

from __future__ import annotations

import io
import re
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from xml.etree import ElementTree
from xml.sax.saxutils import escape

from dyvte.errors import DataError
from dyvte.files import write_atomically
from dyvte.readers.rows import Row

_HEAD = '<?xml version="1.0" encoding="UTF-8" standalone="yes"?>\n'
_MAIN = "http://schemas.openxmlformats.org/spreadsheetml/2006/main"
_RELATIONS = "http://schemas.openxmlformats.org/package/2006/relationships"
_OFFICE = "http://schemas.openxmlformats.org/officeDocument/2006/relationships"
_TYPES = "application/vnd.openxmlformats-officedocument.spreadsheetml"
_SHEET = "xl/worksheets/sheet1.xml"
_STRINGS = "xl/sharedStrings.xml"
_LARGEST_PART = 1 << 30  # bytes: more is no table of answers
_PARTS = {
    "[Content_Types].xml": (
        '<Types xmlns="http://schemas.openxmlformats.org/package/2006/content-types">'
        '<Default Extension="rels" ContentType="application/vnd.openxmlformats-package.relationships+xml"/>'
        f'<Override PartName="/xl/workbook.xml" ContentType="{_TYPES}.sheet.main+xml"/>'
        f'<Override PartName="/{_SHEET}" ContentType="{_TYPES}.worksheet+xml"/></Types>'
    ),
    "_rels/.rels": (
        f'<Relationships xmlns="{_RELATIONS}"><Relationship Id="rId1" Type="{_OFFICE}/officeDocument" '
        'Target="xl/workbook.xml"/></Relationships>'
    ),
    "xl/workbook.xml": (
        f'<workbook xmlns="{_MAIN}" xmlns:r="{_OFFICE}"><sheets>'
        '<sheet name="Sheet1" sheetId="1" r:id="rId1"/></sheets></workbook>'
    ),
    "xl/_rels/workbook.xml.rels": (
        f'<Relationships xmlns="{_RELATIONS}"><Relationship Id="rId1" Type="{_OFFICE}/worksheet" '
        'Target="worksheets/sheet1.xml"/></Relationships>'
    ),
}
_NOT_XML = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\ud800-\udfff\ufffe\uffff]")
_EPOCH = (1980, 1, 1, 0, 0, 0)  # the same content gives the same bytes


def write_xlsx(path: Path, rows: Sequence[Sequence[str | int | None]]) -> Path:
    """Write rows; None is an empty cell, and characters that XML forbids are dropped.

    Parameters
    ----------
    path
        Of the workbook.
    rows
        Cells, the header first.
    """
    body = "".join(f"<row>{''.join(map(_cell, row))}</row>" for row in rows)
    sheet = f'<worksheet xmlns="{_MAIN}"><sheetData>{body}</sheetData></worksheet>'
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in {**_PARTS, _SHEET: sheet}.items():
            archive.writestr(zipfile.ZipInfo(name, _EPOCH), _HEAD + content)
    write_atomically(path, stream.getvalue())
    return path


def _cell(value: str | int | None) -> str:
    if value is None:
        return "<c/>"
    if isinstance(value, int):
        return f"<c><v>{value}</v></c>"
    # a bare carriage return would come back as a line feed
    text = escape(_NOT_XML.sub("", value), {"\r": "&#13;"})
    return f'<c t="inlineStr"><is><t xml:space="preserve">{text}</t></is></c>'


def read_xlsx(path: Path) -> list[Row]:
    """Rows of the first sheet as texts by the names in its first row; empty cells are None.

    Raises
    ------
    DataError
        No workbook, or a damaged one.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            strings = _shared_strings(archive)
            table = list(_cells(archive, strings))
    except _DAMAGED as error:
        raise DataError(f"{path} is no workbook that can be read: {error}") from error
    header = [name or "" for name in table[0]] if table else []
    return [
        Row(dict(zip(header, [*cells, *[None] * len(header)])), f"{path}, row {number}")
        for number, cells in enumerate(table[1:], start=2)
        if any(cell is not None for cell in cells)
    ]


_DAMAGED = (
    *(OSError, EOFError, ValueError, LookupError, RuntimeError, OverflowError, MemoryError),
    *(zipfile.BadZipFile, zlib.error, ElementTree.ParseError),
)


def _part(archive: zipfile.ZipFile, name: str) -> ElementTree.Element:
    if archive.getinfo(name).file_size > _LARGEST_PART:
        raise ValueError(f"{name} is larger than {_LARGEST_PART >> 20} MiB")
    return ElementTree.fromstring(archive.read(name))


def _shared_strings(archive: zipfile.ZipFile) -> list[str]:
    if _STRINGS not in archive.namelist():
        return []
    return [_text(item) for item in _part(archive, _STRINGS) if _tag(item) == "si"]


def _cells(archive: zipfile.ZipFile, strings: Sequence[str]) -> Iterator[list[str | None]]:
    """The cells of each row, in the order of their columns."""
    names = sorted(name for name in archive.namelist() if name.startswith("xl/worksheets/sheet"))
    sheet = _part(archive, _SHEET if _SHEET in names else names[0])
    for row in sheet.iter():
        if _tag(row) != "row":
            continue
        cells: list[str | None] = []
        for cell in row:
            column = _column(cell.get("r")) if cell.get("r") else len(cells)
            cells += [None] * (column - len(cells))
            cells.append(_value(cell, strings))
        yield cells


def _value(cell: ElementTree.Element, strings: Sequence[str]) -> str | None:
    kind = cell.get("t", "n")
    if kind == "inlineStr":
        return _text(cell)
    text = next((part.text for part in cell if _tag(part) == "v"), None)
    if text is None:
        return None
    if kind == "s":
        return strings[int(text)]
    if kind == "n" and float(text).is_integer():
        return str(int(float(text)))
    return text


def _text(element: ElementTree.Element) -> str:
    """The texts within, without the reading aids (``rPh``) that East Asian workbooks add."""
    if _tag(element) == "t":
        return element.text or ""
    return "".join(_text(part) for part in element if _tag(part) != "rPh")


def _tag(element: ElementTree.Element) -> str:
    return element.tag.rsplit("}", 1)[-1]


_MOST_COLUMNS = 16_384


def _column(reference: str) -> int:
    """Index of the column of a cell reference: "A1" is 0, "AB7" is 27."""
    number = 0
    for letter in reference:
        if not letter.isalpha():
            break
        number = 26 * number + ord(letter.upper()) - ord("A") + 1
        if not 0 < number <= _MOST_COLUMNS:
            raise ValueError(f"no such column: {reference[:20]!r}")
    return number - 1 if number else 0
