"""Compare gates with VTW, a question-only router, the oracle and the full model.

On traced test samples: risk, same answer and agreement over visual compute, differences at equal compute with
intervals over images; with --budgets also at given shares of visual compute, with --plans also plans of
policies and reductions. On each --benchmark: real generation with every policy. Prints the table; writes
comparison.json, comparison.md and plots below --output. Thresholds, the router and fixed layers are chosen on
calibration data only.
"""

from __future__ import annotations

import argparse

from dyvte.commands.parser import Several

EXAMPLES = """
dyvte compare --config configs/compare_embedded.yaml --gates runs/embedded/gates
dyvte compare --config configs/compare_embedded.yaml --gates runs/embedded/gates --budgets 0.25:0.85 \\
    --benchmark mini-GQA:gqa=data/scenes/mini_gqa --benchmark pope=/data/pope
"""

NAMES = {"benchmarks": ("benchmark",), "baselines": ("baseline",), "controls": ("control",)}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of ``dyvte compare``: the settings of its configuration."""
    from dyvte.commands.options import add_settings
    from dyvte.comparison.config import CompareConfig

    add_settings(parser, CompareConfig, NAMES)
    for name in ("gqa", "mme"):  # as the embedded benchmarks were named before any could be
        parser.add_argument(
            f"--mini-{name}",
            dest="benchmarks",
            action=Several,
            type=lambda root, name=name: [f"mini-{name.upper()}:{name}={root}"],
            default=argparse.SUPPRESS,
            help=argparse.SUPPRESS,
        )


def run(args: argparse.Namespace) -> int:
    """Compare, print the report, say where it lies."""
    from dyvte.commands.options import config_from
    from dyvte.comparison.compare import compare
    from dyvte.comparison.config import CompareConfig
    from dyvte.reporting.comparison import write_comparison

    config = config_from(CompareConfig, args)
    found = compare(config)
    if found is None:  # a process that only helps
        return 0
    page = write_comparison(found, config.output)
    print(page.read_text(encoding="utf-8"))
    print(f"report: {config.output}")
    return 0
