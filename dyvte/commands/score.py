"""Score a predictions file by a benchmark's rules; no model is needed.

Predictions: raw answers as jsonl ({"question_id", "prediction"} or LLaVA's {"question_id", "text"}), or the
benchmark's submission format (GQA: json list; MME: folder of <subtask>.txt), compared as it stands.

  dyvte score gqa --data /data/gqa --predictions results/gqa/never/predictions.jsonl
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of ``dyvte score``."""
    parser.add_argument("benchmark", help="gqa or mme")
    parser.add_argument("--predictions", required=True, type=Path, help="file or folder of answers")
    parser.add_argument("--data", required=True, type=Path, help="root of the benchmark's own layout")
    parser.add_argument(
        "--dialect", default="original", help="original (default), lmms, vlmevalkit, or all for the three"
    )
    parser.add_argument("--output", type=Path, help="also write the scores here, as JSON")


def run(args: argparse.Namespace) -> int:
    """Print the scores as JSON."""
    from dyvte.evaluation.base import DIALECTS, get_benchmark

    benchmark = get_benchmark(args.benchmark)
    questions = benchmark.load(args.data)
    predictions = benchmark.read_predictions(args.predictions, questions)
    wanted = DIALECTS if args.dialect == "all" else (args.dialect,)
    scores = {dialect: benchmark.score(questions, predictions, dialect) for dialect in wanted}
    text = json.dumps(scores if args.dialect == "all" else scores[args.dialect], indent=2)
    print(text)
    if args.output is not None:
        _write(args.output, text)
    return 0


def _write(path: Path, text: str) -> None:
    from dyvte.errors import ConfigError

    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text + "\n", encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"cannot write {path}: {error.strerror or error}") from error
