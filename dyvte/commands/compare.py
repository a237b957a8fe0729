"""Compare gates with VTW, a question-only router, the oracle and the full model.

On traced test scenes: risk, same answer and agreement over visual compute, differences at equal compute with
intervals over images. On (mini-)GQA and (mini-)MME: real generation with every policy. Prints the table;
writes comparison.json, comparison.md and a plot (png, svg) below --output. Thresholds, the router and fixed
layers are chosen on calibration data only.
"""

from __future__ import annotations

import argparse
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of ``dyvte compare``; those left out keep the configuration's value."""
    parser.add_argument("--config", type=Path, help="YAML with any of the settings (CompareConfig)")
    parser.add_argument("--model", help="backbone: folder or hub id")
    parser.add_argument("--gates", nargs="+", help="gates checkpoints, one per seed")
    parser.add_argument("--output", help="where the report goes")
    for split in ("train", "calibration", "test"):
        parser.add_argument(f"--traces-{split}", help=f"trace store of the {split} data")
        parser.add_argument(f"--data-{split}", help=f"LLaVA json that the {split} traces were made from")
    parser.add_argument("--image-folder", help="what the image entries of the json files are relative to")
    parser.add_argument("--mini-gqa", dest="gqa", help="root of (mini-)GQA")
    parser.add_argument("--mini-mme", dest="mme", help="root of (mini-)MME")
    parser.add_argument("--question-suffix", help="text appended to benchmark questions")
    parser.add_argument("--template", help="prompt template: v1, chat or auto")
    parser.add_argument("--batch-size", type=int)
    parser.add_argument("--max-new-tokens", type=int)
    parser.add_argument("--limit", type=int, help="this many benchmark questions only")
    parser.add_argument("--eta", type=float, help="VTW's bound on the mean KL, nats")
    parser.add_argument("--lam", type=float, help="price of a layer for the router; default: the gates' own")
    parser.add_argument("--device", help="default: the GPU where there is one")
    parser.add_argument("--seed", type=int)
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="any setting by name")


def run(args: argparse.Namespace) -> int:
    """Compare, print the report, say where it lies."""
    from dyvte.commands.options import config_from
    from dyvte.comparison.compare import CompareConfig, compare

    config = config_from(CompareConfig, args)
    compare(config)
    print((config.output / "comparison.md").read_text(encoding="utf-8"))
    print(f"report: {config.output}")
    return 0
