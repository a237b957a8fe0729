"""Score a predictions file by a benchmark's rules; no model is needed.

Predictions: raw answers as jsonl ({"question_id", "prediction"} or LLaVA's {"question_id", "text"}),
VLMEvalKit's table or workbook (index, prediction), or the benchmark's submission format, compared as it
stands (docs/benchmarks.md lists them). Every question must have a prediction; images need not be there.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

EXAMPLES = """
dyvte score gqa --data /data/gqa --predictions results/gqa/never/predictions.jsonl
dyvte score pope --data /data/pope --predictions answers.jsonl --dialect all
dyvte score mmvet --data /data/mm-vet --predictions answers.jsonl --submission for_the_grader
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of ``dyvte score``."""
    from dyvte.tasks.base import DIALECTS, TASKS

    parser.add_argument("benchmark", help=", ".join(TASKS))
    parser.add_argument(
        "--predictions", required=True, type=Path, help="file or folder of answers (required)"
    )
    parser.add_argument(
        "--data", required=True, type=Path, help="root of the benchmark, in any known format (required)"
    )
    parser.add_argument(
        "--dialect",
        default="original",
        help=f"whose rule: {', '.join(DIALECTS)}, or all that exist for the benchmark",
    )
    parser.add_argument("--output", type=Path, help="also write the scores here, as JSON")
    parser.add_argument(
        "--submission", type=Path, metavar="FOLDER", help="also write the official submission file here"
    )


def run(args: argparse.Namespace) -> int:
    """Print the scores as JSON."""
    from dyvte.errors import ScoreError
    from dyvte.files import write_atomically
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
    with _disk_errors_named():
        if args.output is not None:
            write_atomically(args.output, text + "\n")
        if args.submission is not None:
            print(f"submission: {benchmark.write_submission(args.submission, questions, predictions)}")
    return 0


@contextmanager
def _disk_errors_named() -> Iterator[None]:
    from dyvte.errors import ConfigError

    try:
        yield
    except OSError as error:
        raise ConfigError(f"cannot write {error.filename or ''}: {error.strerror or error}") from error
