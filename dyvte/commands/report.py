"""Make a page of runs of dyvte eval.

Writes report.html (one file, nothing outside it), report.md, report.json (every number), plots/ (png, svg,
pdf) and images/ below --output: the table of policies and benchmarks, scores over visual compute with
intervals (paired bootstrap over images against the full model), exit layers per question type, gate
probabilities per layer, agreement with the full model, and examples, worst disagreements first.

RUN is the folder of one policy or any folder above; benchmarks may be mixed. For what is said against the
full model, --policy never without a reduction must be among the runs.
"""

from __future__ import annotations

import argparse
from pathlib import Path

EXAMPLES = """
dyvte report results/gqa results/mme --output results/report
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of ``dyvte report``."""
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="what dyvte eval wrote")
    parser.add_argument("--output", type=Path, required=True, help="folder of the report (required)")
    parser.add_argument(
        "--data",
        action="append",
        default=[],
        metavar="BENCHMARK=FOLDER",
        help="where a benchmark's data lies, if it has moved since the run",
    )
    parser.add_argument("--examples", type=int, default=12, help="questions shown per benchmark")
    parser.add_argument("--draws", type=int, default=2000, help="bootstrap draws")
    parser.add_argument("--seed", type=int, default=0, help="of the bootstrap")


def run(args: argparse.Namespace) -> int:
    """Write the report and say where it lies."""
    from dyvte.reporting.report import ReportConfig, write_report

    page = write_report(
        ReportConfig(
            runs=tuple(args.runs),
            output=args.output,
            data=_data(args.data),
            num_examples=args.examples,
            num_draws=args.draws,
            seed=args.seed,
        )
    )
    print(f"report: {page}")
    return 0


def _data(entries: list[str]) -> dict[str, Path]:
    from dyvte.errors import ConfigError
    from dyvte.tasks.base import TASKS

    found = {}
    for entry in entries:
        name, equals, folder = entry.partition("=")
        if not equals or not folder:
            raise ConfigError(f"--data {entry}: expected BENCHMARK=FOLDER, for example gqa=/data/gqa")
        TASKS.get(name)
        found[name] = Path(folder)
    return found
