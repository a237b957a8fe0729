"""Run a benchmark with one or several exit policies and reductions on one loaded backbone.

--policy says when visual tokens leave, --reduction what is spent on them before; every policy is run with
every reduction. Each pair gets a folder below --output (never, fixed-16, never+fastv-2-0.5, ...):
  predictions.jsonl  answers, with the benchmark's own submission format beside it
  exits.jsonl        per question: exit layer, gate probabilities, tokens that each layer processed, KV bytes
  scores.json        scores, mean exit layer, visual compute, TFLOPs in the papers' conventions, time to first
                     token and per token, KV bytes, versions, seed, settings
dyvte report makes a page of them.

A killed run goes on where it stopped, with however many processes, and ends with the same files. Settings
come from --config (YAML, EvalConfig), then from the options here. What LLaVA's evaluation appends to a
question ("Answer the question using a single word or phrase.", for one) is appended here;
--question-suffix "" asks it as it is (configs/eval_embedded.yaml does, for its small vocabulary).

  dyvte eval --model llava-hf/llava-1.5-7b-hf --benchmark gqa --data /data/gqa --output results/gqa \\
      --policy never --policy fixed:16 --policy gates:checkpoints/gates \\
      --reduction none --reduction fastv:2:0.5
  torchrun --nproc-per-node 8 -m dyvte eval ...        # one process a GPU; accelerate launch serves as well
"""

from __future__ import annotations

import argparse
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of ``dyvte eval``; those left out keep the configuration's value."""
    from dyvte.evaluation.base import benchmark_names
    from dyvte.policies import USAGE
    from dyvte.reductions import REGISTRY

    parser.add_argument("--config", type=Path, help="YAML with any of the settings below")
    parser.add_argument("--model", help="backbone: folder or hub id")
    parser.add_argument("--adapter", help="PEFT adapter to put on it: folder or hub id")
    parser.add_argument("--benchmark", help=", ".join(benchmark_names()))
    parser.add_argument("--data", help="root of the benchmark, in any known format (docs/benchmarks.md)")
    parser.add_argument("--output", help="each policy with each reduction gets a folder below")
    parser.add_argument(
        "--policy",
        action="append",
        dest="policies",
        metavar="POLICY",
        help=f"when visual tokens leave: {USAGE}; may be given several times",
    )
    parser.add_argument(
        "--reduction",
        action="append",
        dest="reductions",
        metavar="REDUCTION",
        help="what is spent on them before: none (default), such as fastv:2:0.5 or random_tokens:16, or "
        f"several joined by '+'; may be given several times. Known: {', '.join(REGISTRY)}",
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
    parser.add_argument("--timing-batches", type=int, help="batches to time; 0 for none")
    parser.add_argument("--seed", type=int)
    parser.add_argument("--overwrite", action="store_true", default=None, help="start anew")
    parser.add_argument("--trust-remote-code", action="store_true", default=None)
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="any setting by name")


def run(args: argparse.Namespace) -> int:
    """Evaluate and print one row per policy and reduction."""
    from dyvte.commands.options import config_from
    from dyvte.evaluation.report import results_table
    from dyvte.evaluation.runner import EvalConfig, evaluate

    results = evaluate(config_from(EvalConfig, args))
    if results:  # of several processes, the first has them
        print(results_table(results))
        print(f"results: {results[0].folder.parent}")
    return 0
