"""The ``dyvte`` command: one subcommand per job, each in its own module of :mod:`dyvte.commands`.

A subcommand's module is imported only when it is asked for, so that ``dyvte --help`` stays quick.
"""

from __future__ import annotations

import argparse
import importlib
import os
import select
import sys
import textwrap
from collections.abc import Sequence
from types import ModuleType

import dyvte
from dyvte.commands.parser import Formatter, Parser

# name -> (module in dyvte.commands, one-line help)
COMMANDS: dict[str, tuple[str, str]] = {
    "init": ("init", "set up gates for a backbone"),
    "trace": ("trace", "run the teacher once and keep what it yields"),
    "train": ("train", "train gates against the un-pruned backbone"),
    "calibrate": ("calibrate", "choose the threshold for a compute budget or a bounded risk"),
    "search-k": ("search_k", "VTW's fixed layer K by KL"),
    "profile": ("profile", "what heads and neurons do with visual tokens, for YOPO's reductions"),
    "search-frozen": ("search_frozen", "layers that read visual tokens without updating them"),
    "search-plan": ("search_plan", "exit policy and reductions for a compute budget"),
    "eval": ("eval", "run benchmarks with one or several exit policies"),
    "score": ("score", "score a predictions file, no model needed"),
    "report": ("report", "make a page of runs: tables, plots, examples"),
    "analyze": ("analyze", "the papers' tables and plots on a backbone of yours"),
    "ask": ("ask", "one question about an image, answered in the terminal"),
    "chat": ("chat", "a conversation about images, in the terminal"),
    "serve": ("serve", "an OpenAI-compatible server, and a page"),
    "compare": ("compare", "gates beside VTW, the question-only router and the full model"),
}

EXIT_BAD_INPUT = 2
EXIT_INTERRUPTED = 130
EXIT_READER_GONE = 141


def build_parser(chosen: str | None = None) -> Parser:
    """Build the parser; only the chosen subcommand's module is imported and filled with its options.

    Parameters
    ----------
    chosen : str, optional
        Subcommand on the command line. Others appear by name and help line only.
    """
    parser = Parser(
        prog="dyvte", description="Gates that tell a frozen multimodal LLM when it has seen enough."
    )
    parser.add_argument("--version", action="version", version=f"dyvte {dyvte.__version__}")
    subparsers = parser.add_subparsers(dest="command", metavar="COMMAND")
    for name, (module_name, help_line) in COMMANDS.items():
        if name != chosen:
            subparsers.add_parser(name, help=help_line, add_help=False)
            continue
        module = importlib.import_module(f"dyvte.commands.{module_name}")
        subparser = subparsers.add_parser(
            name, help=help_line, description=module.__doc__, formatter_class=Formatter
        )
        module.add_arguments(subparser)
        subparser.usage = " ".join([f"dyvte {name} [options]", *_positionals(subparser)])
        subparser.epilog = _examples(module)
        subparser.set_defaults(run=module.run, parser=subparser)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run ``dyvte``; return the exit code: 0 done, 2 bad input (message on stderr), 130 interrupted, 141 the
    reader of a pipe went away (``dyvte score ... | head``), as shells count it.

    `search-k` adds 3: no layer qualifies.
    """
    try:
        try:
            return _run(list(sys.argv[1:] if argv is None else argv))
        finally:
            sys.stdout.flush()  # here, where it can be caught; the interpreter does it too late
    except BrokenPipeError:
        if not _reader_is_gone():
            raise
        # what is still unwritten goes nowhere, without a word
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_READER_GONE


def _run(argv: Sequence[str]) -> int:
    """One command, its errors as messages and exit codes."""
    chosen = next((word for word in argv if not word.startswith("-")), None)
    parser = build_parser(chosen)
    args = parser.parse_args(argv)
    if args.command is None:
        parser.print_help()
        return EXIT_BAD_INPUT
    from dyvte.errors import DyvteError
    from dyvte.heap import keep_memory

    keep_memory()
    try:
        return int(args.run(args) or 0)
    except DyvteError as error:
        print(f"dyvte {args.command}: {error}", file=sys.stderr)
        return EXIT_BAD_INPUT
    except KeyboardInterrupt:
        print(f"dyvte {args.command}: interrupted", file=sys.stderr)
        return EXIT_INTERRUPTED


def _reader_is_gone() -> bool:
    """Whether nobody reads the standard output any more, so that a broken pipe is this one."""
    poll = select.poll()
    poll.register(sys.stdout.fileno(), 0)
    return any(event & select.POLLERR for _, event in poll.poll(0))


def _positionals(parser: argparse.ArgumentParser) -> list[str]:
    return [
        f"{action.metavar or action.dest}{' ...' if action.nargs in ('+', '*') else ''}"
        for action in parser._actions
        if not action.option_strings
    ]


def _examples(module: ModuleType) -> str:
    """The commands that a module shows, as they are written."""
    return "examples:\n" + textwrap.indent(module.EXAMPLES.strip("\n"), "  ")


if __name__ == "__main__":
    sys.exit(main())
