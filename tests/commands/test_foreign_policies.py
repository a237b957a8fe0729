"""A policy for another model is found before weights are read, in the words of each command."""

from __future__ import annotations

import ast
import re
import shutil
from pathlib import Path

import pytest

from dyvte.cli import build_parser, main
from dyvte.errors import GateMismatchError, UnsupportedBackboneError
from dyvte.evaluation.runner import EvalConfig
from dyvte.fields import settings_of
from dyvte.gates import GateConfig, GateStack, save_config
from dyvte.plugins.answering import Answering, plugin_config
from dyvte.serving.config import ServeConfig
from tests.helpers.models import random_image
from tests.helpers.world import World

ROOT = Path(__file__).resolve().parents[2]
WORLD = World(gqa=(4, 2), conversations={"data": range(2)}, questions=1)
SHAPE = {"num_layers": 4, "hidden_size": 32}
# what was made for another backbone -> what is said of it
FOREIGN = {
    "architecture": (
        GateConfig(**SHAPE, backbone={"id": "theirs", "fingerprint": "0" * 16}),
        f"these gates were made for theirs (fingerprint {'0' * 16}), the model in hand has",
    ),
    "shape": (
        GateConfig(num_layers=5, hidden_size=32),
        "these gates are for 5 layers of hidden size 32, the backbone has 4 layers of hidden size 32",
    ),
    "padding": (
        GateConfig(**SHAPE, backbone={"image_padding": "square"}),
        "image padding is 'none', but the gates were trained with 'square': set image_padding to 'square'",
    ),
    "fixed": (
        GateConfig(**SHAPE, mode="fixed", fallback=2, backbone={"id": "theirs", "fingerprint": "0" * 16}),
        f"these gates were made for theirs (fingerprint {'0' * 16}), the model in hand has",
    ),
}
# what a command is asked with; its setting that names the gates
COMMANDS = {
    "serve": (["MODEL", "--port", "0", "--policy", "gates:GATES"], "policy gates:GATES"),
    "serve --gates": (["MODEL", "--port", "0", "--policy", "fixed:2", "--gates", "GATES"], "gates GATES"),
    "ask": (["MODEL", "IMAGE", "what ?", "--policy", "gates:GATES"], "policy gates:GATES"),
    "chat": (["MODEL", "--policy", "gates:GATES"], "policy gates:GATES"),
    "eval": (["--model", "MODEL", "--benchmark", "gqa", "--data", "GQA", "--output", "OUT",
              "--policy", "never", "--policy", "gates:GATES"], "policy gates:GATES"),
    "analyze": (["shift", "--model", "MODEL", "--benchmark", "gqa", "--data", "GQA", "--output", "OUT",
                 "--gates", "GATES"], "gates GATES"),
    "compare": (["--model", "MODEL", "--gates", "GATES", "--output", "OUT", "--image-folder", "OUT",
                 *(f"--{kind}-{split}=OUT/x" for kind in ("data", "traces")
                   for split in ("train", "calibration", "test"))], "gates GATES"),
    "compare --baseline": (["--model", "MODEL", "--gates", "OWN", "--output", "OUT", "--image-folder", "OUT",
                            "--budgets", "0.5", "--baseline", "theirs=GATES",
                            *(f"--{kind}-{split}=OUT/x" for kind in ("data", "traces")
                              for split in ("train", "calibration", "test"))], "baseline theirs=GATES"),
}  # fmt: skip


@pytest.fixture(scope="module")
def world(world: Path) -> Path:
    """With an image, own gates, a copy of the backbone without weights, and what was made for others."""
    random_image(1).save(world / "scene.png")
    shutil.copytree(world / "backbone", world / "weightless")
    (world / "weightless" / "model.safetensors").unlink()
    GateStack.init(GateConfig(**SHAPE), seed=0).save_pretrained(world / "own")
    for name, (config, _) in FOREIGN.items():
        if config.mode == "fixed":
            save_config(config, world / name)
        else:
            GateStack.init(config, seed=0).save_pretrained(world / name)
    backbone = {"id": "theirs", "weights": "f" * 16}
    GateStack.init(GateConfig(**SHAPE, backbone=backbone), seed=0).save_pretrained(world / "weights")
    return world


def refusal(command: str, words: list[str], world: Path, out: Path, model: str, gates: str, capsys) -> str:
    """What the command says, without its name."""
    given = {"MODEL": world / model, "IMAGE": world / "scene.png", "GQA": world / "gqa", "OWN": world / "own"}
    given |= {"GATES": world / gates, "OUT": out}
    for word, path in given.items():
        words = [one.replace(word, str(path)) for one in words]
    name = command.partition(" ")[0]
    capsys.readouterr()
    assert main([name, *words]) == 2
    shown = capsys.readouterr().err.strip().splitlines()[-1]
    assert shown.startswith(f"dyvte {name}: ")
    return shown.removeprefix(f"dyvte {name}: ")


@pytest.mark.parametrize("kind", FOREIGN)
@pytest.mark.parametrize("command", COMMANDS)
def test_found_before_weights_are_read(command, kind, world, tmp_path, capsys):
    words, setting = COMMANDS[command]
    if kind == "fixed" and setting != "policy gates:GATES":
        pytest.skip("a fixed exit is no gates")
    said = refusal(command, words, world, tmp_path, "weightless", kind, capsys)
    assert said.startswith(f"{setting.replace('GATES', str(world / kind))}: {FOREIGN[kind][1]}")
    check_options(command, said)


@pytest.mark.parametrize("command", ["serve", "ask", "eval"])
def test_other_weights_are_found_once_they_are_there(command, world, tmp_path, capsys):
    words, setting = COMMANDS[command]
    said = refusal(command, words, world, tmp_path, "backbone", "weights", capsys)
    assert said.startswith(
        f"{setting.replace('GATES', str(world / 'weights'))}: these gates were made for theirs"
    )
    check_options(command, said)


def check_options(command: str, said: str) -> None:
    """What a message names is there to be set, by that name."""
    name = command.partition(" ")[0]
    parser = next(a for a in build_parser(name)._actions if a.dest == "command").choices[name]
    known = set(parser._option_string_actions)
    assert f"--{said.split()[0]}" in known
    assert "allow_transfer" not in said
    if "image_padding" in said:
        assert "--image-padding" in known


@pytest.mark.parametrize("kind", FOREIGN)
def test_plugins_find_it_as_early(kind, world):
    arguments = {"policy": f"gates:{world / kind}"}
    with pytest.raises(GateMismatchError) as error:
        Answering(plugin_config("--model_args", str(world / "weightless"), **arguments))
    assert str(error.value).startswith(f"policy gates:{world / kind}: {FOREIGN[kind][1]}")


def test_own_gates_need_the_weights(world, tmp_path, capsys):
    """The copy has none: what fits is found missing only then."""
    words, _ = COMMANDS["ask"]
    assert "cannot load" in refusal("ask", words, world, tmp_path, "weightless", "own", capsys)
    with pytest.raises(UnsupportedBackboneError, match="cannot load"):
        Answering(plugin_config("--model_args", str(world / "weightless"), policy=f"gates:{world / 'own'}"))


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--template", "vicuna"], "prompt template 'vicuna': expected 'v1', 'chat' or 'auto'"),
        (["--policy", "fixed:9"], "policy fixed:9: exit layer 9: expected 0..4"),
        (["--reduction", "fastv:7:0.5"], "after layer 7"),
        (["--adapter", "./nowhere"], "no adapter folder at ./nowhere"),
    ],
)
def test_other_settings_are_found_as_early(words, said, world, capsys):
    asked = ["ask", str(world / "weightless"), str(world / "scene.png"), "what ?", *words]
    assert main(asked) == 2
    assert said in capsys.readouterr().err


def test_messages_name_arguments_that_are_settings_too():
    """Who runs a command cannot pass an argument of Python: messages speak of settings, by their names."""
    settings = {one.name for cls in (ServeConfig, EvalConfig) for one in settings_of(cls)}
    of_python = {
        "allow_transfer": "dyvte/runtime/session.py",  # commands look before a block is entered
        "positions": ("dyvte/runtime/", "dyvte/calibration/vtw.py"),  # no setting of any command
    }
    for path in sorted((ROOT / "dyvte").rglob("*.py")):
        where = path.relative_to(ROOT).as_posix()
        for text in said_in(ast.parse(path.read_text(encoding="utf-8"))):
            for name in re.findall(r"\b([a-z]+(?:_[a-z]+)*)=(?:True|False|None|')", text):
                assert name in settings or where.startswith(of_python.get(name, ())), f"{where}: {text}"


def said_in(tree: ast.AST) -> list[str]:
    """The texts of raised errors and of warnings."""
    found = []
    for node in ast.walk(tree):
        is_warning = isinstance(node, ast.Call) and ast.unparse(node.func).endswith((".warn", ".warning"))
        if isinstance(node, ast.Raise) or is_warning:
            constants = (one for one in ast.walk(node) if isinstance(one, ast.Constant))
            found.append("".join(one.value for one in constants if isinstance(one.value, str)))
        advice = isinstance(node, ast.keyword) and node.arg == "advice"
        if advice and isinstance(node.value, ast.Constant):
            found.append(node.value.value)
    return found
