"""The registry: one file and one decorator make a choice known everywhere."""

from __future__ import annotations

import sys

import pytest

from dyvte.errors import ConfigError
from dyvte.registry import Registry, nearest

MODULE = '''
from {package} import TOYS

@TOYS.register
class {name}:
    """{summary}

    More of it.
    """

    name = "{key}"
    usage = "{usage}"

    @classmethod
    def parse(cls, argument):
        return cls.name, argument
'''


@pytest.fixture
def toys(tmp_path, monkeypatch):
    package = tmp_path / "toy_room"
    package.mkdir()
    (package / "__init__.py").write_text(
        "from dyvte.registry import Registry\nTOYS = Registry('toy', 'toy_room')\n"
    )
    for name, key, usage, summary in (
        ("Zebra", "zebra", "zebra:STRIPES", "Runs."),
        ("BlueBall", "blue_ball", "", "Rolls."),
    ):
        text = MODULE.format(package="toy_room", name=name, key=key, usage=usage, summary=summary)
        (package / f"{key}.py").write_text(text)
    monkeypatch.syspath_prepend(str(tmp_path))
    import toy_room

    yield toy_room.TOYS
    for module in [name for name in sys.modules if name.partition(".")[0] == "toy_room"]:
        del sys.modules[module]


def test_files_of_the_package_are_found_without_being_listed(toys):
    assert "toy_room.zebra" not in sys.modules
    assert toys.names() == tuple(toys) == ("blue_ball", "zebra")
    assert len(toys) == 2
    assert "zebra" in toys
    assert "ball" not in toys
    assert toys.get("zebra").__name__ == "Zebra"
    assert toys.usages() == ("blue_ball", "zebra:STRIPES")
    assert toys.parse("zebra:3:4") == ("zebra", "3:4")
    assert toys.parse("blue_ball") == ("blue_ball", "")


def test_an_unknown_name_is_answered_with_the_nearest_and_all(toys):
    with pytest.raises(ConfigError, match=r"unknown toy 'Blue-Ball' \(did you mean 'blue_ball'"):
        toys.get("Blue-Ball")
    with pytest.raises(ConfigError, match=r"unknown toy 'zebar:3' \(did you mean 'zebra'"):
        toys.parse("zebar:3")
    with pytest.raises(ConfigError, match="unknown toy 'x'; known: blue_ball, zebra:STRIPES"):
        toys.get("x")
    assert nearest("fastv2", ["fastv", "random_tokens"]) == "fastv"


def test_two_classes_cannot_have_one_name(toys):
    with pytest.raises(ValueError, match="'zebra'"):
        toys.register(type("Other", (), {"name": "zebra"}))
    with pytest.raises(ValueError, match="no name"):
        Registry("toy", "toy_room").register(type("Nameless", (), {"name": ""}))
