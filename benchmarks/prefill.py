"""Prefill time behind an exit, against the full model and against the ideal; and what the block itself costs.

Every ratio comes from interleaved runs: all variants run once in each round, in a new order, and medians of
the per-round ratios are reported, so that a machine that slows down for a while slows all of them. The price
of gates that never fire, and of an exit that never happens, comes from pairs of their own with the stock one.

The ideal is what the layers alone cost: k layers on all tokens and L-k layers on text tokens, called
directly on the model's own layers, plus the rest of the model (vision tower, embedding, norm, head).

    python benchmarks/prefill.py --hidden 1024 --layers 8
"""

from __future__ import annotations

import statistics

import torch
from common import (
    TEXT,
    TOKENS,
    Report,
    arguments,
    build_model,
    interleaved,
    layer_pass,
    make_inputs,
    oracle,
    prefill_pass,
    ratio,
    rest_pass,
    setting_of,
    silent_gates,
    timed,
)

import dyvte

MIN_PAIRS = 20


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--exit-layer", type=int, help="default: half of the layers")
    parser.add_argument("--pairs", type=int, default=30, help="with the stock model, at least 20")
    args = parser.parse_args()
    if args.pairs < MIN_PAIRS:
        parser.error(f"--pairs {args.pairs}: fewer than {MIN_PAIRS} give no useful bound")
    torch.set_num_threads(args.threads)
    k = args.layers // 2 if args.exit_layer is None else args.exit_layer

    model = build_model(args)
    inputs = make_inputs(model, args.batch)
    variants = {
        "stock": prefill_pass(model, inputs),
        "exit": prefill_pass(model, inputs, dyvte.VisualExit.fixed(k)),
        "rest": rest_pass(model, inputs),
        "full layers": layer_pass(model, args.batch, TOKENS, 0, k),
        "text layers": layer_pass(model, args.batch, TEXT, k, args.layers),
    }
    if args.batch > 1:
        half = [k if row % 2 else args.layers for row in range(args.batch)]
        variants["half of the rows exit"] = prefill_pass(model, inputs, oracle(half))
    report = Report(setting_of(args, rounds=args.rounds, pairs=args.pairs, exit_layer=k), args.json)
    times = interleaved({name: timed(run, model.device) for name, run in variants.items()}, args.rounds)

    ideal = ["rest", "full layers", "text layers"]
    ratios = {
        "exit / stock": ratio(times, ["exit"], ["stock"]),
        "ideal / stock": ratio(times, ideal, ["stock"]),
        "exit / ideal": ratio(times, ["exit"], ideal, "at most 1.05"),
    }
    if args.batch > 1:
        ratios["half of the rows exit / stock"] = ratio(times, ["half of the rows exit"], ["stock"])
    report.add(times, ratios)
    print(f"one full layer: {1e3 * statistics.median(times['full layers']) / max(1, k):.1f} ms\n", flush=True)
    prices = {
        "exit that never fires": dyvte.VisualExit.fixed(args.layers),
        "silent gates": silent_gates(model),
    }
    for name, exits in prices.items():
        pair = {"stock": variants["stock"], name: prefill_pass(model, inputs, exits)}
        times = interleaved({n: timed(run, model.device) for n, run in pair.items()}, args.pairs)
        price = ratio(times, [name], ["stock"], "lower bound at most 1.01")
        report.add({name: times[name]}, {f"{name} / stock": price})


if __name__ == "__main__":
    main()
