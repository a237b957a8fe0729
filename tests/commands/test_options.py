"""Options from configuration classes: names, types, lists, help; nothing about a field is said twice."""

from __future__ import annotations

import re
from dataclasses import MISSING, dataclass, field
from pathlib import Path
from typing import Literal

import pytest

from dyvte.analysis import AnalysisConfig
from dyvte.commands.options import add_settings, config_from
from dyvte.commands.parser import Formatter, Parser
from dyvte.commands.training_options import TRAINING_NAMES
from dyvte.comparison.compare import CompareConfig
from dyvte.errors import ConfigError
from dyvte.evaluation.runner import EvalConfig
from dyvte.fields import field_texts, section_texts, settings_of
from dyvte.gates import ARCHITECTURES
from dyvte.groups import open_group
from dyvte.policies import POLICIES
from dyvte.training import TrainConfig
from tests.helpers.shown_commands import parser_of


@dataclass(frozen=True, kw_only=True)
class Engine:
    """What drives; see :func:`~some.module.start` and ``that``."""

    fuel: str
    """What it burns, 100 % of it."""
    power: float = 1.5
    """In kW."""
    seed: int = 3
    """Of the spark."""


@dataclass(frozen=True, kw_only=True)
class Wheels:
    """What turns."""

    count: int = 4
    """How many."""
    pressures: tuple[float, ...] = ()
    """One of each."""


@dataclass(frozen=True, kw_only=True)
class Car:
    """A car."""

    engine: Engine = field(metadata=open_group("fuel"))
    wheels: Wheels = field(default_factory=Wheels)
    seed: int = 0
    """Of the car."""
    color: Literal["red", "blue"] | None = None
    """Of the body."""
    open_top: bool = False
    """No roof."""
    doors: tuple[str, ...] = ("front",)
    """Which there are."""
    out: Path | None = None
    """Where it goes."""


NAMES = {"wheels.count": ("wheels", "num_wheels"), "doors": ("door",)}


def parse(*words: str, positional: bool = False) -> Car:
    parser = Parser()
    if positional:
        parser.add_argument("names", nargs="+")
    add_settings(parser, Car, NAMES)
    return config_from(Car, parser.parse_args(list(words)))


def test_each_setting_is_an_option_by_name_by_key_and_by_what_else_it_is_called():
    expected = Car(engine=Engine(fuel="gas", power=2.0), wheels=Wheels(count=3), open_top=True)
    assert parse("--engine", "gas", "--power", "2", "--wheels", "3", "--open-top") == expected
    assert (
        parse("--engine.fuel", "gas", "--engine.power=2", "--num_wheels", "3", "--open_top=true") == expected
    )
    assert parse("--engine", "g", "--engine.seed", "9", "--seed", "8").engine.seed == 9
    assert parse("--engine", "g", "--open_top", "false").open_top is False
    assert parse("--engine", "é: [1]").engine.fuel == "é: [1]"  # text is never read as YAML


def test_lists_take_several_values_or_one_per_option():
    assert parse("--engine", "g", "--door", "a", "b", "--door", "c").doors == ("a", "b", "c")
    assert parse("--engine", "g", "--wheels.pressures", "1,2", "3").wheels.pressures == (1.0, 2.0, 3.0)
    with_names = parse("--engine", "g", "--door", "a", "--door", "c", "one", "two", positional=True)
    assert with_names.doors == ("a", "c")
    with_names = parse("--engine", "g", "--wheels.pressures", "1", "2", "one", "two", positional=True)
    assert with_names.wheels.pressures == (1.0, 2.0)
    with_names = parse("--engine", "g", "--wheels.pressures=1", "2", "--door", "a", "one", positional=True)
    assert (with_names.wheels.pressures, with_names.doors) == ((1.0, 2.0), ("a",))
    assert parse("--open-top", "name", "--engine", "g", positional=True).open_top is True


def test_file_then_options_then_set(tmp_path):
    path = tmp_path / "car.yaml"
    path.write_text("engine: {fuel: oil, power: 5}\ncolor: red\nseed: 1\nout: there\n")
    found = parse("--config", str(path), "--color", "blue", "--set", "seed=7", "--power", "6")
    assert found == Car(engine=Engine(fuel="oil", power=6.0), color="blue", seed=7, out=tmp_path / "there")
    assert parse("--config", str(path), "--color", "null", "--out", "null").color is None


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--seed", "x"), r"seed: expected int, found 'x'"),
        (("--color", "green"), "color: expected one of 'red', 'blue'"),
        (("--open-top", "perhaps"), "open_top: expected bool"),
        ((), "no value for engine"),
    ],
)
def test_what_is_no_value_is_refused_by_the_configuration(words, message):
    start = () if not words else ("--engine", "g")
    with pytest.raises(ConfigError, match=message):
        parse(*start, *words)


def test_an_unknown_option_is_answered_with_the_nearest_and_none_is_abbreviated(capsys):
    for words, message in (
        (["--colour", "red"], "--colour (did you mean --color?)"),
        (["--col", "red"], "unknown option --col"),
        (["left"], "unknown word left"),
    ):
        with pytest.raises(SystemExit) as caught:
            parse("--engine", "g", *words)
        assert caught.value.code == 2
        assert message in capsys.readouterr().err


def test_help_shows_type_choices_default_and_the_text_of_the_field():
    parser = Parser(formatter_class=lambda prog: Formatter(prog, width=200))
    add_settings(parser, Car, NAMES)
    shown = re.sub(r"\s+", " ", parser.format_help())
    assert "engine: What drives; see start and that." in shown
    assert "--engine TEXT What it burns, 100 % of it. (required) [engine.fuel]" in shown
    assert "--power FLOAT In kW. (default: 1.5) [engine.power]" in shown
    assert "--engine.seed INT Of the spark. (default: 3) [engine.seed]" in shown
    assert "--wheels, --num-wheels INT How many. (default: 4) [wheels.count]" in shown
    assert "--color {red,blue} Of the body." in shown
    assert "--open-top [{true,false}] No roof." in shown
    assert "--door, --doors TEXT [TEXT ...] Which there are. (default: front)" in shown
    assert "--out PATH Where it goes." in shown


def test_help_reads_the_registries():
    shown = {one.key: one for one in settings_of(TrainConfig)}
    assert shown["gates.architecture"].choices == ARCHITECTURES.names()
    assert shown["objective.lam"].text.startswith("expected_risk: ")
    text = " ".join(parser_of("eval").format_help().split())
    sub = " ".join(parser_of("eval")._actions[-1].choices["eval"].format_help().split())
    assert text
    assert all(usage in sub for usage in POLICIES.usages())


@pytest.mark.parametrize("cls", [TrainConfig, EvalConfig, AnalysisConfig, CompareConfig])
def test_every_setting_says_what_it_is(cls):
    silent = [one.key for one in settings_of(cls) if not one.text]
    assert not silent, silent
    assert all(section_texts(cls).values())


def test_names_name_settings():
    keys = {one.key for one in settings_of(TrainConfig)}
    assert set(TRAINING_NAMES) <= keys
    names = [name for names in TRAINING_NAMES.values() for name in names]
    assert len(names) == len(set(names))


def test_inherited_texts_are_found():
    assert field_texts(AnalysisConfig)["batch_size"] == field_texts(EvalConfig)["batch_size"] != ""
    required = [one.key for one in settings_of(EvalConfig) if one.default is MISSING]
    assert required == ["model.path", "benchmark", "data", "output"]


def test_the_comparison_takes_its_embedded_benchmarks_by_their_former_names():
    words = ["compare", "--mini-gqa", "a", "--benchmark", "pope=b", "c:mme=d", "--mini_mme", "e"]
    expected = ["mini-GQA:gqa=a", "pope=b", "c:mme=d", "mini-MME:mme=e"]
    assert parser_of("compare").parse_args(words).benchmarks == expected


def test_the_prompt_template_is_template_everywhere_and_llava_s_name_of_it_serves_in_train():
    words = ["train", "--model", "m", "--version", "v1"]
    assert vars(parser_of("train").parse_args(words))["teacher.template"] == "v1"
    assert "--version" not in parser_of("train")._actions[-1].choices["train"].format_help()
    for name in ("train", "trace", "search-k", "profile", "calibrate", "search-plan", "eval", "analyze"):
        known = parser_of(name)._actions[-1].choices[name]._option_string_actions
        assert "--template" in known
        assert ("--version" in known) == (name == "train")
