"""Typed records out of JSON: nested ones, lists as tuples, and what is absent by name and place."""

from __future__ import annotations

from dataclasses import dataclass

import pytest

from dyvte.entries import entries, record_of
from dyvte.errors import DataError


@dataclass(frozen=True)
class Wheel:
    """One of several."""

    size: float


@dataclass(frozen=True)
class Car:
    """With wheels."""

    name: str
    wheels: tuple[Wheel, ...]
    gears: tuple[int, ...]


CAR = {"name": "a", "wheels": [{"size": 1.5}, {"size": 2.0}], "gears": [1, 2], "later": True}


def test_records_are_made_of_what_they_name() -> None:
    assert record_of(Car, CAR, "car.json", "write it anew") == Car("a", (Wheel(1.5), Wheel(2.0)), (1, 2))
    assert entries(CAR, ["name"], "car.json", "") == {"name": "a"}


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({**CAR, "wheels": [{"size": 1.0}, {}]}, "car.json, wheels: no 'size': write it anew"),
        ({"name": "a"}, "car.json: no 'wheels', 'gears': write it anew"),
        ([], "car.json: no 'name', 'wheels', 'gears'"),
        (None, "car.json: no 'name'"),
    ],
)
def test_what_is_absent_is_named_with_its_place(values, message: str) -> None:
    with pytest.raises(DataError) as caught:
        record_of(Car, values, "car.json", "write it anew")
    assert str(caught.value).startswith(message)
