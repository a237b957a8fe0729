"""Score a predictions file by a benchmark's rules; no model is needed.

Predictions: raw answers as jsonl ({"question_id", "prediction"} or LLaVA's {"question_id", "text"}), or the
benchmark's submission format, compared as it stands (docs/benchmarks.md lists them). Every question must have
a prediction; images need not be there (MME's release layout excepted).
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

EXAMPLES = """
dyvte score gqa --data /data/gqa --predictions results/gqa/never/predictions.jsonl
dyvte score pope --data /data/pope --predictions answers.jsonl --dialect all
dyvte score mmvet --data /data/mm-vet --predictions answers.jsonl --submission for_the_grader
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of ``dyvte score``."""
    from dyvte.tasks.base import benchmark_names

    parser.add_argument("benchmark", help=", ".join(benchmark_names()))
    parser.add_argument(
        "--predictions", required=True, type=Path, help="file or folder of answers (required)"
    )
    parser.add_argument(
        "--data", required=True, type=Path, help="root of the benchmark, in any known format (required)"
    )
    parser.add_argument(
        "--dialect",
        default="original",
        help="whose rule: original, lmms, vlmevalkit, or all that exist for the benchmark",
    )
    parser.add_argument("--output", type=Path, help="also write the scores here, as JSON")
    parser.add_argument(
        "--submission", type=Path, metavar="FOLDER", help="also write the official submission file here"
    )


def run(args: argparse.Namespace) -> int:
    """Print the scores as JSON."""
    from dyvte.errors import ScoreError
    from dyvte.tasks.base import get_benchmark

    benchmark = get_benchmark(args.benchmark)
    questions = benchmark.load(args.data, images=False)
    predictions = benchmark.read_predictions(args.predictions, questions)
    wanted = benchmark.dialects if args.dialect == "all" else (args.dialect,)
    scores = {dialect: benchmark.score(questions, predictions, dialect) for dialect in wanted}
    why = next((one["why"] for one in scores.values() if one.get("graded") is False), None)
    if why is not None and args.submission is None:
        raise ScoreError(f"no score can be given: {why}. --submission FOLDER writes the file to submit")
    text = json.dumps(scores if args.dialect == "all" else scores[args.dialect], indent=2)
    print(text)
    if args.output is not None:
        _write(args.output, text)
    if args.submission is not None:
        _folder(args.submission)
        print(f"submission: {benchmark.write_submission(args.submission, questions, predictions)}")
    return 0


def _write(path: Path, text: str) -> None:
    from dyvte.errors import ConfigError

    _folder(path.parent)
    try:
        path.write_text(text + "\n", encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"cannot write {path}: {error.strerror or error}") from error


def _folder(path: Path) -> None:
    from dyvte.errors import ConfigError

    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"cannot write {path}: {error.strerror or error}") from error
