"""Tables with images: Python's csv module writes them, the images come back byte for byte."""

from __future__ import annotations

import sys
import zipfile

import pytest

from dyvte.errors import ConfigError, DataError
from dyvte.readers.tables import read_parquet, read_tsv
from dyvte.readers.xlsx import read_xlsx, write_xlsx
from tests.helpers.benchmark_files import picture, put_parquet, put_tsv, text64


def test_tsv_cells_with_tabs_quotes_line_breaks_and_unicode(tmp_path):
    cells = ["plain", 'says "hi"', "a\tb", "two\nlines", "", "naïve \u2028 sep", '"', "trailing "]
    rows = [
        {"index": n, "text": cell, "image": picture(n), "last": f"end{n}"} for n, cell in enumerate(cells)
    ]
    put_tsv(tmp_path / "t.tsv", rows)
    got = list(read_tsv(tmp_path / "t.tsv"))
    assert [row["text"] for row in got] == [cell or None for cell in cells]
    assert [row["last"] for row in got] == [f"end{n}" for n in range(len(cells))]
    assert [row["image"].read().data for row in got] == [picture(n) for n in range(len(cells))]


def test_a_quote_inside_an_unquoted_cell_is_text(tmp_path):
    (tmp_path / "t.tsv").write_text('index\tquestion\n0\ta 5" nail\n1\tnext\n')
    assert [row["question"] for row in read_tsv(tmp_path / "t.tsv")] == ['a 5" nail', "next"]


def test_image_cells_may_point_to_rows_and_hold_lists(tmp_path):
    rows = [
        {"index": "7", "image": text64(picture(1))},
        {"index": "8", "image": "7"},
        {"index": "9", "image": str([text64(picture(2)), text64(picture(3))])},
    ]
    put_tsv(tmp_path / "t.tsv", rows)
    first, second, third = read_tsv(tmp_path / "t.tsv")
    assert first["image"] == second["image"]
    assert [image.read().data for image in third["image"]] == [picture(2), picture(3)]
    put_tsv(tmp_path / "t.tsv", [*rows[:2], {"index": "9", "image": "77"}])
    with pytest.raises(DataError, match="row 9 is neither base64 nor the index"):
        list(read_tsv(tmp_path / "t.tsv"))


def test_ragged_rows_are_refused(tmp_path):
    (tmp_path / "t.tsv").write_text("a\tb\n1\t2\n1\t2\t3\n")
    with pytest.raises(DataError, match="record 3: 3 columns, expected 2"):
        list(read_tsv(tmp_path / "t.tsv"))


def test_windows_line_ends(tmp_path):
    (tmp_path / "t.tsv").write_bytes(b"a\tb\r\n1\t2\r\n\r\n")
    assert list(read_tsv(tmp_path / "t.tsv")) == [{"a": "1", "b": "2"}]


def test_parquet_images_lists_and_absent_ones(tmp_path):
    rows = [
        {"id": str(n), "image": None if n == 3 else picture(n), "many": [picture(n), picture(n + 1)]}
        for n in range(5)
    ]
    put_parquet(tmp_path / "t.parquet", rows, row_group_size=2)
    got = list(read_parquet(tmp_path / "t.parquet"))
    assert [row["id"] for row in got] == list("01234")
    assert got[3]["image"] is None
    assert got[4]["image"].read().data == picture(4)
    assert [image.read().data for image in got[2]["many"]] == [picture(2), picture(3)]
    assert len({row["image"].name for row in got if row["image"]}) == 4


def test_parquet_needs_pyarrow(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(ConfigError, match=r"pip install 'dyvte\[eval\]'"):
        list(read_parquet(tmp_path / "t.parquet"))


def test_what_is_no_parquet_is_said(tmp_path):
    (tmp_path / "t.parquet").write_text("no")
    with pytest.raises(DataError, match="cannot read"):
        list(read_parquet(tmp_path / "t.parquet"))


SHARED = (
    '<sst xmlns="http://schemas.openxmlformats.org/spreadsheetml/2006/main"><si><t>index</t></si>'
    "<si><t>prediction</t></si><si><r><t>a </t></r><r><t>dog</t></r></si>"
    "<si><t>漢字</t><rPh><t>かんじ</t></rPh></si></sst>"
)
SHEET = (
    '<worksheet xmlns="http://schemas.openxmlformats.org/spreadsheetml/2006/main"><sheetData>'
    '<row r="1"><c r="A1" t="s"><v>0</v></c><c r="C1" t="s"><v>1</v></c></row>'
    '<row r="2"><c r="A2"><v>1000007</v></c><c r="C2" t="s"><v>2</v></c></row>'
    '<row r="3"><c r="A3"><v>3.0</v></c><c r="C3" t="s"><v>3</v></c></row>'
    '<row r="4"><c r="C4" t="str"><v>0.50</v></c><c r="A4"><v>4</v></c></row>'
    '<row r="5"><c r="A5"><v>5</v></c><c r="C5"><v>0.5</v></c></row><row r="6"/>'
    "</sheetData></worksheet>"
)


def _workbook(path, **parts):
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in parts.items():
            archive.writestr(f"xl/{name.replace('__', '/')}.xml", content)
    return path


def test_workbooks_of_other_writers(tmp_path):
    """Shared strings in runs and with reading aids, numbers, gaps between columns, cells out of order."""
    path = _workbook(tmp_path / "t.xlsx", sharedStrings=SHARED, worksheets__sheet1=SHEET)
    rows = read_xlsx(path)
    assert [(row["index"], row["prediction"]) for row in rows[:2]] == [("1000007", "a dog"), ("3", "漢字")]
    assert rows[3]["prediction"] == "0.5"
    assert len(rows) == 4


@pytest.mark.parametrize(
    "parts",
    [
        {"sharedStrings": SHARED},
        {"worksheets__sheet1": SHEET},  # the strings it refers to are absent
        {"worksheets__sheet1": SHEET[:-9], "sharedStrings": SHARED},
        {"worksheets__sheet1": SHEET.replace("A2", "ZZZZZZ2"), "sharedStrings": SHARED},
    ],
)
def test_damaged_workbooks_are_named(tmp_path, parts):
    path = _workbook(tmp_path / "t.xlsx", **parts)
    with pytest.raises(DataError, match=r"t\.xlsx is no workbook"):
        read_xlsx(path)


def test_workbooks_keep_line_ends_and_say_what_is_none(tmp_path):
    texts = ["a\nb", "a\r\nb", "\ttab", "", None, 7, "<&>", " outer "]
    path = write_xlsx(tmp_path / "t.xlsx", [["n", "text"], *([n, text] for n, text in enumerate(texts))])
    read = [row["text"] for row in read_xlsx(path)]
    assert read == [None if text is None else str(text) for text in texts]
    (tmp_path / "no.xlsx").write_text("no")
    with pytest.raises(DataError, match=r"no\.xlsx is no workbook"):
        read_xlsx(tmp_path / "no.xlsx")
