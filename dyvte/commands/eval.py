"""Run a benchmark with one or several exit policies and reductions on one loaded backbone.

--policy says when visual tokens leave, --reduction what is spent on them before; every policy is run with
every reduction. Each pair gets a folder below --output (never, fixed-16, never+fastv-2-0.5, ...):
  predictions.jsonl  answers, with the benchmark's own submission format beside it
  exits.jsonl        per question: exit layer, gate probabilities, tokens that each layer processed, KV bytes
  scores.json        scores, mean exit layer, visual compute, TFLOPs in the papers' conventions, time to first
                     token and per token, KV bytes, versions, seed, settings
dyvte report makes a page of them.

A killed run goes on where it stopped, with however many processes, and ends with the same files. Settings
come from --config (YAML), then from the options here. What LLaVA's evaluation appends to a question ("Answer
the question using a single word or phrase.", for one) is appended here; --question-suffix "" puts it as it is
(configs/eval_embedded.yaml does, for its small vocabulary).
"""

from __future__ import annotations

import argparse

EXAMPLES = """
dyvte eval --model llava-hf/llava-1.5-7b-hf --benchmark gqa --data /data/gqa --output results/gqa \\
    --policy never --policy fixed:16 --policy gates:checkpoints/gates \\
    --reduction none --reduction fastv:2:0.5
torchrun --nproc-per-node 8 -m dyvte eval --config configs/eval_embedded.yaml   # one process a GPU
"""

NAMES = {"policies": ("policy",), "reductions": ("reduction",)}
"""Options of `EvalConfig` that are given once for each."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of ``dyvte eval``: the settings of its configuration."""
    from dyvte.commands.options import add_settings
    from dyvte.evaluation.runner import EvalConfig

    add_settings(parser, EvalConfig, NAMES)


def run(args: argparse.Namespace) -> int:
    """Evaluate and print one row per policy and reduction."""
    from dyvte.commands.options import config_from
    from dyvte.evaluation.runner import EvalConfig, evaluate
    from dyvte.reporting.tables import results_table

    results = evaluate(config_from(EvalConfig, args))
    if results:  # of several processes, the first has them
        print(results_table(results))
        print(f"results: {results[0].folder.parent}")
    return 0
