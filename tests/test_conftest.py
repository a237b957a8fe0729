"""The table of the slowest tests."""

from __future__ import annotations

from tests.conftest import slowest_table


def test_the_slowest_are_listed_with_their_share():
    seconds = {f"tests/test_{n}.py::test": float(n) for n in range(1, 5)}
    lines = slowest_table(seconds, 2).splitlines()
    assert "4 tests took 10 s" in lines[2]
    assert lines[-2:] == [
        "| 4.0 | 40.0% | `tests/test_4.py::test` |",
        "| 3.0 | 30.0% | `tests/test_3.py::test` |",
    ]
