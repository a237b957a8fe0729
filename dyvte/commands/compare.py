"""Compare gates with VTW, a question-only router, the oracle and the full model.

On traced test scenes: risk, same answer and agreement over visual compute, differences at equal compute with
intervals over images. On (mini-)GQA and (mini-)MME: real generation with every policy. Prints the table;
writes comparison.json, comparison.md and a plot (png, svg) below --output. Thresholds, the router and fixed
layers are chosen on calibration data only.
"""

from __future__ import annotations

import argparse

EXAMPLES = """
dyvte compare --config configs/compare_embedded.yaml --gates runs/embedded/gates
"""

NAMES = {"gqa": ("mini-gqa",), "mme": ("mini-mme",)}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of ``dyvte compare``: the settings of its configuration."""
    from dyvte.commands.options import add_settings
    from dyvte.comparison.compare import CompareConfig

    add_settings(parser, CompareConfig, NAMES)


def run(args: argparse.Namespace) -> int:
    """Compare, print the report, say where it lies."""
    from dyvte.commands.options import config_from
    from dyvte.comparison.compare import CompareConfig, compare

    config = config_from(CompareConfig, args)
    compare(config)
    print((config.output / "comparison.md").read_text(encoding="utf-8"))
    print(f"report: {config.output}")
    return 0
