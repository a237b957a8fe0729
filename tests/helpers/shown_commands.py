"""Commands that documents, comments and help texts show, and whether the programs would take them."""

from __future__ import annotations

import re
import shlex
from functools import lru_cache
from pathlib import Path

from dyvte.cli import COMMANDS, build_parser
from dyvte.commands.parser import Parser
from dyvte.tasks.base import TASKS

ROOT = Path(__file__).resolve().parents[2]
# scripts that are thin entry points -> the command whose options they take
ENTRY_POINTS = {
    "scripts/init_weight.py": "init",
    "scripts/finetune_visual_gate.sh": "train",
    **{f"scripts/eval/{path.name}": "eval" for path in (ROOT / "scripts" / "eval").glob("*.sh")},
}
_NOT_SHOWN = {"CHANGELOG.md"}


def documents() -> list[str]:
    """Every Markdown file of the repository that is not a log."""
    folders = (ROOT, *(ROOT / name for name in ("docs", "data", "checkpoints", "benchmarks", "experiments")))
    found = [path for folder in folders for path in folder.glob("*.md")]
    return sorted(str(path.relative_to(ROOT)) for path in found if path.name not in _NOT_SHOWN)


def commented() -> list[str]:
    """Every file whose comments or docstring tell people what to type."""
    patterns = (
        "configs/**/*.yaml",
        "scripts/**/*.sh",
        "scripts/**/*.py",
        "benchmarks/*.py",
        "experiments/*.py",
    )
    return sorted(str(path.relative_to(ROOT)) for pattern in patterns for path in ROOT.glob(pattern))


def in_blocks(document: str) -> list[list[str]]:
    """The commands of a document's bash blocks, split as a shell would."""
    text = (ROOT / document).read_text(encoding="utf-8")
    blocks = re.findall(r"```bash\n(.*?)```", text, flags=re.DOTALL)
    return [words for block in blocks for words in split(block)]


def in_lines(document: str) -> list[list[str]]:
    """Commands that a document names in a sentence: `dyvte train --lora`."""
    text = (ROOT / document).read_text(encoding="utf-8")
    text = re.sub(r"```.*?```", "", text, flags=re.DOTALL)
    return [found.split() for found in re.findall(r"`((?:dyvte|bash scripts/|python )[^`]*)`", text)]


def in_comments(file: str) -> list[list[str]]:
    """Commands in the comments of a script or configuration, or in a module's docstring."""
    text = (ROOT / file).read_text(encoding="utf-8")
    if file.endswith(".py"):
        docstring = re.match(r'(?:#![^\n]*\n)?"""(.*?)"""', text, flags=re.DOTALL)
        lines = docstring[1].splitlines() if docstring else []
        block = "\n".join(line.strip() for line in lines if line.startswith("    "))
    else:
        lines = [line.lstrip("# ") for line in text.splitlines() if line.startswith("#")]
        block = "\n".join(lines)
    return [words for words in split(block) if words[0] in ("dyvte", "bash", "python", "torchrun")]


def in_bodies(script: str) -> list[list[str]]:
    """dyvte's commands that a shell script runs; what they are given may be variables."""
    text = (ROOT / script).read_text(encoding="utf-8")
    lines = "\n".join(line for line in text.splitlines() if not line.lstrip().startswith("#"))
    found = []
    for words in split(lines):
        runs = [n for n, word in enumerate(words) if word == "dyvte" and words[n + 1 : n + 2]]
        found += [words[n:] for n in runs if words[n + 1] in COMMANDS]
    return found


def split(block: str) -> list[list[str]]:
    """Commands of shell text, without comments and variables set before them."""
    found = []
    for line in block.replace("\\\n", " ").splitlines():
        try:
            words = shlex.split(line, comments=True)
        except ValueError:  # prose with an apostrophe
            continue
        while words and re.fullmatch(r"[A-Z_]+=.*", words[0]):
            words.pop(0)
        if words:
            found.append(words)
    return found


def problem(words: list[str], *, whole: bool = True) -> str | None:
    """Why a command would be refused; None where it would be taken.

    Parameters
    ----------
    words
        The command, split.
    whole
        Are all of its arguments there? Else its options need only exist.
    """
    if "..." in words:
        words, whole = [word for word in words if word != "..."], False
    name, arguments = _command(words)
    if name is None:
        return _file_problem(words)
    if name not in COMMANDS:
        return f"there is no command {name!r}"
    parser = parser_of(name)
    if not whole:
        known = {option.replace("_", "-") for option in _options(parser)}
        given = [word.partition("=")[0] for word in arguments if word.startswith("--")]
        wrong = [option for option in given if option.replace("_", "-") not in known]
        return f"{name} has no {', '.join(wrong)}" if wrong else None
    try:
        parser.parse_args([name, *arguments])
    except SystemExit as error:
        return None if error.code == 0 else f"dyvte {name} refuses {shlex.join(arguments)}"
    return None


@lru_cache
def parser_of(name: str) -> Parser:
    """The parser with that command's options."""
    return build_parser(name)


def _command(words: list[str]) -> tuple[str | None, list[str]]:
    """The dyvte command that is run, and its arguments; None where it is another program."""
    if words[0] in ("bash", "python") and len(words) > 1 and words[1] in ENTRY_POINTS:
        arguments = words[2:]
        if words[1] == "scripts/eval/run.sh":
            arguments = ["--benchmark", TASKS.get(words[2]).name, *words[3:]]
        return ENTRY_POINTS[words[1]], arguments
    runs = [n for n, word in enumerate(words) if word == "dyvte" and (n == 0 or words[n - 1] == "-m")]
    if not runs or len(words) == runs[0] + 1 or words[runs[0] + 1].startswith("-"):
        return None, []
    return words[runs[0] + 1], words[runs[0] + 2 :]


def _file_problem(words: list[str]) -> str | None:
    """A script that is not there, or an option that its source does not know."""
    if words[0] not in ("bash", "python") or len(words) < 2 or words[1].startswith(("-", "<", "$")):
        return None
    path = ROOT / words[1]
    if "/" not in words[1]:
        return None
    if not path.is_file():
        return f"there is no {words[1]}"
    if path.suffix != ".py":
        return None
    # what scripts share lies beside them
    source = "".join(one.read_text(encoding="utf-8") for one in path.parent.glob("*.py"))
    given = [word.partition("=")[0] for word in words[2:] if re.match(r"--\S+$", word)]
    wrong = [option for option in given if f'"{option}"' not in source]
    return f"{words[1]} has no {', '.join(wrong)}" if wrong else None


def _options(parser: Parser) -> list[str]:
    (subparsers,) = (action for action in parser._actions if action.dest == "command")
    return [
        option
        for one in subparsers.choices.values()  # type: ignore[union-attr]
        for option in one._option_string_actions
    ]
