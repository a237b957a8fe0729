"""From a command line to a configuration."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TypeVar

Config = TypeVar("Config")


def config_from(cls: type[Config], args: argparse.Namespace) -> Config:
    """A configuration from ``--config``, then the options that were given, then ``--set``."""
    import yaml

    from dyvte.config import load_config, setting_names

    given = vars(args)
    names = [name for name in setting_names(cls) if given.get(name) is not None]
    overrides = [f"{name}={yaml.safe_dump(given[name], default_flow_style=True)}" for name in names]
    return load_config(cls, args.config, [*overrides, *args.set])


def add_questions(parser: argparse.ArgumentParser) -> None:
    """``--config``, the backbone and the benchmark of `EvalConfig`."""
    from dyvte.tasks.base import benchmark_names

    parser.add_argument("--config", type=Path, help="YAML with any of the settings below")
    parser.add_argument("--model", help="backbone: folder or hub id")
    parser.add_argument("--adapter", help="PEFT adapter to put on it: folder or hub id")
    parser.add_argument("--benchmark", help=", ".join(benchmark_names()))
    parser.add_argument("--data", help="root of the benchmark, in any known format (docs/benchmarks.md)")


def add_asking(parser: argparse.ArgumentParser) -> None:
    """How questions are asked: the other settings of `EvalConfig`, and ``--set``."""
    parser.add_argument("--question-suffix", help="text appended to every question")
    parser.add_argument("--template", help="prompt template: v1, chat or auto")
    parser.add_argument("--image-padding", help="pad images to a square: auto, square or none")
    parser.add_argument("--dialect", help="original, lmms or vlmevalkit")
    parser.add_argument("--batch-size", type=int)
    parser.add_argument("--max-new-tokens", type=int)
    parser.add_argument("--dtype", help="auto, float32, bfloat16, float16")
    parser.add_argument("--attn-implementation", help="sdpa, eager or flash_attention_2")
    parser.add_argument("--device", help="default: the GPU where there is one")
    parser.add_argument("--limit", type=int, help="ask about this many questions only")
    parser.add_argument("--timing-batches", type=int, help="batches to time; 0 for none")
    parser.add_argument("--seed", type=int)
    parser.add_argument("--overwrite", action="store_true", default=None, help="start anew")
    parser.add_argument("--trust-remote-code", action="store_true", default=None)
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="any setting by name")
