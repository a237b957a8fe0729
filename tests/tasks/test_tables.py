"""Tables with images: Python's csv module writes them, the images come back byte for byte."""

from __future__ import annotations

import sys

import pytest

from dyvte.errors import ConfigError, DataError
from dyvte.tasks.readers.tables import read_parquet, read_tsv
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
