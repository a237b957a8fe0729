"""Run a benchmark with one or several exit policies on one loaded backbone.

Every policy gets a folder below --output: predictions.jsonl, exits.jsonl, scores.json and the benchmark's own
submission format. A killed run goes on where it stopped. Settings come from --config (YAML, EvalConfig), then
from the options here. GQA and MME questions get "Answer the question using a single word or phrase."
appended, as LLaVA does; --question-suffix "" asks them as they are (configs/eval_embedded.yaml does, for its
small vocabulary).

  dyvte eval --model llava-hf/llava-1.5-7b-hf --benchmark gqa --data /data/gqa --output results/gqa \\
      --policy never --policy fixed:16 --policy gates:checkpoints/gates
"""

from __future__ import annotations

import argparse
from pathlib import Path

_PATHS = {"data", "output"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of ``dyvte eval``; those left out keep the configuration's value."""
    from dyvte.evaluation.base import benchmark_names
    from dyvte.policies import USAGE

    parser.add_argument("--config", type=Path, help="YAML with any of the settings below")
    parser.add_argument("--model", help="backbone: folder or hub id")
    parser.add_argument("--adapter", help="PEFT adapter to put on it: folder or hub id")
    parser.add_argument("--benchmark", help=", ".join(benchmark_names()))
    parser.add_argument("--data", help="root of the benchmark, in any known format (docs/benchmarks.md)")
    parser.add_argument("--output", help="each policy gets a folder below")
    parser.add_argument(
        "--policy",
        action="append",
        dest="policies",
        metavar="POLICY",
        help=f"{USAGE}; may be given several times",
    )
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
    parser.add_argument("--timing-batches", type=int, help="batches to time the prefill on; 0 for none")
    parser.add_argument("--seed", type=int)
    parser.add_argument("--overwrite", action="store_true", default=None, help="start anew")
    parser.add_argument("--trust-remote-code", action="store_true", default=None)
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="any setting by name")


def run(args: argparse.Namespace) -> int:
    """Evaluate and print one row per policy."""
    from dyvte.commands.options import config_from
    from dyvte.evaluation.report import results_table
    from dyvte.evaluation.runner import EvalConfig, evaluate

    results = evaluate(config_from(EvalConfig, args))
    print(results_table(results))
    print(f"results: {results[0].folder.parent}")
    return 0
