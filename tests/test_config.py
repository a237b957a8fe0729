"""Strict configuration: types, unknown keys, overrides and the round trip."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import pytest

from dyvte.config import dump_config, load_config, to_dict
from dyvte.errors import ConfigError
from dyvte.registry import Registry


@dataclass(frozen=True, kw_only=True)
class Inner:
    learning_rate: float = 1e-3
    betas: tuple[float, float] = (0.9, 0.999)
    layers: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if self.learning_rate <= 0:
            raise ValueError(f"learning_rate must be positive, found {self.learning_rate}")


@dataclass(frozen=True, kw_only=True)
class Outer:
    name: str
    epochs: int = 3
    shuffle: bool = True
    folder: Path | None = None
    kind: Literal["a", "b"] = "a"
    inner: Inner = field(default_factory=Inner)


def write(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "config.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def test_file_then_overrides_in_order(tmp_path: Path) -> None:
    path = write(tmp_path, "name: run\nepochs: 2\ninner: {learning_rate: 4e-5}\n")
    cfg = load_config(Outer, path, ["epochs=5", "inner.layers=[1, 2]", "epochs=7", "folder=/tmp/x", "kind=b"])
    assert cfg == Outer(
        name="run", epochs=7, folder=Path("/tmp/x"), kind="b", inner=Inner(learning_rate=4e-5, layers=(1, 2))
    )


def test_round_trip(tmp_path: Path) -> None:
    cfg = Outer(name="é", folder=Path("/a/b"), inner=Inner(layers=(3,)))
    dump_config(cfg, tmp_path / "deep" / "out.yaml")
    assert load_config(Outer, tmp_path / "deep" / "out.yaml") == cfg
    assert to_dict(cfg)["inner"]["betas"] == [0.9, 0.999]


@pytest.mark.parametrize(
    ("text", "overrides", "needles"),
    [
        ("name: x\nepoch: 2", (), ["'epoch'", "'epochs'"]),
        ("name: x\ninner: {learning_rat: 1}", (), ["inner.learning_rat", "'inner.learning_rate'"]),
        ("name: x\nzzz: 1", (), ["'zzz'", "known keys"]),
        ("epochs: 2", (), ["name", "no default"]),
        ("name: x\nepochs: two", (), ["epochs", "int", "'two'"]),
        ("name: x\nepochs: true", (), ["epochs", "int"]),
        ("name: x\nepochs: 1.5", (), ["epochs", "int"]),
        ("name: x\nshuffle: 1", (), ["shuffle", "bool"]),
        ("name: x\nkind: c", (), ["kind", "'a'", "'b'"]),
        ("name: x\ninner: {betas: [1]}", (), ["inner.betas", "2 values"]),
        ("name: x\ninner: {learning_rate: .nan}", (), ["inner.learning_rate", "float"]),
        ("name: x\ninner: {learning_rate: -1}", (), ["inner", "positive"]),
        ("name: x\ninner: 3", (), ["inner", "group"]),
        ("- 1\n- 2", (), ["mapping"]),
        ("name: [", (), ["YAML"]),
        ("name: x", ("epochs",), ["key=value"]),
        ("name: x", ("epochs.more=1", "epochs.more.yet=1"), ["epochs"]),
    ],
)
def test_refusals_name_the_key(
    tmp_path: Path, text: str, overrides: tuple[str, ...], needles: list[str]
) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(Outer, write(tmp_path, text), overrides)
    for needle in needles:
        assert needle in str(caught.value)


def test_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"nowhere\.yaml"):
        load_config(Outer, tmp_path / "nowhere.yaml")


@dataclass(frozen=True, kw_only=True)
class Paths:
    model: str = field(default="x", metadata={"path": True})
    data: Path | None = None


def test_paths_in_a_file_are_relative_to_the_file_and_overrides_are_not(tmp_path: Path) -> None:
    (tmp_path / "configs").mkdir()
    path = write(tmp_path / "configs", "model: ../models/m\ndata: d/x.json\n")
    assert load_config(Paths, path) == Paths(
        model=str(tmp_path / "models" / "m"), data=tmp_path / "configs/d/x.json"
    )
    assert load_config(Paths, path, ["data=d/y.json"]).data == Path("d/y.json")
    assert to_dict(Paths(data=Path("d"))) == {"model": "x", "data": str(Path.cwd() / "d")}
    hub = write(tmp_path, "model: owner/name\ndata: /abs/x.json\n")
    assert load_config(Paths, hub) == Paths(model="owner/name", data=Path("/abs/x.json"))


CURVES: Registry = Registry("curve", "tests.test_config_curves")


class Curve:
    name = ""


@dataclass(frozen=True, kw_only=True)
class Line(Curve):
    name: Literal["line"] = "line"
    slope: float = 1.0


@dataclass(frozen=True, kw_only=True)
class Circle(Curve):
    name: Literal["circle"] = "circle"
    radius: float = 2.0

    def __post_init__(self) -> None:
        if self.radius <= 0:
            raise ValueError(f"radius must be positive, found {self.radius}")


@dataclass(frozen=True, kw_only=True)
class Drawing:
    pen: str = field(default="line", metadata={"choices": CURVES})
    curve: Curve = field(default_factory=Line, metadata={"registry": CURVES})


@pytest.fixture
def curves(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(CURVES, "_items", {"line": Line, "circle": Circle})
    monkeypatch.setattr(CURVES, "_is_complete", True)


@pytest.mark.usefixtures("curves")
def test_a_section_is_the_choice_that_it_names(tmp_path: Path) -> None:
    assert load_config(Drawing).curve == Line()
    assert load_config(Drawing, None, ["curve.slope=3"]).curve == Line(slope=3.0)
    cfg = load_config(Drawing, write(tmp_path, "pen: circle\ncurve: {name: circle, radius: 1}\n"))
    assert cfg == Drawing(pen="circle", curve=Circle(radius=1.0))
    dump_config(cfg, tmp_path / "out.yaml")
    assert load_config(Drawing, tmp_path / "out.yaml") == cfg
    assert to_dict(cfg)["curve"] == {"name": "circle", "radius": 1.0}
    # as files were written when a section held the settings of all its choices
    assert load_config(Drawing, None, ["curve={name: circle, slope: 1.0}"]).curve == Circle()


@pytest.mark.usefixtures("curves")
def test_an_override_may_name_another_choice_than_the_file(tmp_path: Path) -> None:
    path = write(tmp_path, "curve: {name: circle, radius: 1}\n")
    assert load_config(Drawing, path, ["curve.name=line"]).curve == Line()
    assert load_config(Drawing, path, ["curve.slope=3", "curve.name=line"]).curve == Line(slope=3.0)
    assert load_config(Drawing, path, ['curve.name="line"']).curve == Line()  # as command lines quote it
    assert load_config(Drawing, path, ["curve.name=circle"]).curve == Circle(radius=1.0)
    for overrides in (["curve.name=line", "curve.radius=3"], ["curve.radius=3", "curve.name=line"]):
        with pytest.raises(ConfigError, match=r"curve\.radius belongs to the curve circle, not to line"):
            load_config(Drawing, path, overrides)
    with pytest.raises(ConfigError, match=r"unknown key 'curve\.radiu'"):
        load_config(Drawing, write(tmp_path, "curve: {name: circle, radiu: 1}\n"), ["curve.name=line"])


@pytest.mark.usefixtures("curves")
@pytest.mark.parametrize(
    ("override", "needle"),
    [
        ("pen=lime", r"pen: unknown curve 'lime' \(did you mean 'line'"),
        ("curve.name=circel", r"curve.name: unknown curve 'circel' \(did you mean 'circle'"),
        ("curve={name: line, radius: 3}", "curve.radius belongs to the curve circle, not to line"),
        ("curve.radius=3", "curve.radius belongs to the curve circle, not to line"),
        ("curve={name: circle, radius: 0}", "curve: radius must be positive"),
        ("curve={name: circle, radiu: 1}", "did you mean 'curve.radius'"),
        ("curve=3", "curve: expected a group of settings"),
    ],
)
def test_refused_choices(override: str, needle: str) -> None:
    with pytest.raises(ConfigError, match=needle):
        load_config(Drawing, None, [override])
