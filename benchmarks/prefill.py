"""Prefill time behind freezes and exits, against the ideal; and what the block itself costs.

Every ratio comes from interleaved runs: all variants run once in each round, in a new order, and medians of
the per-round ratios are reported, so that a machine that slows down for a while slows all of them. The price
of gates that never fire, and of an exit that never happens, comes from pairs of their own with the stock one.

The ideal is what the layers alone cost, called directly on the model's own layers: f layers on all tokens,
k-f on the text with the image's keys and values made by their projections, L-k on the text; plus the rest of
the model (vision tower, embedding, norm, head).

    python benchmarks/prefill.py --hidden 1024 --layers 8
    python benchmarks/prefill.py --hidden 1024 --layers 8 --key-heads 4 --schedule 2:8 --schedule 2:4
"""

from __future__ import annotations

import argparse
import statistics

import torch
from common import TEXT, TOKENS, Report, arguments, interleaved, ratio, schedule, setting_of, timed
from passes import frozen_pass, layer_pass, prefill_pass, rest_pass
from random_llava import build_model, make_inputs, oracle, silent_gates

import dyvte

MIN_PAIRS = 20


def measure(args: argparse.Namespace, model: torch.nn.Module, f: int, k: int, report: Report) -> None:
    """One schedule beside its ideal and the stock model."""
    name, inputs = f"({f}, {k})", make_inputs(model, args.batch)
    runs = {
        "stock": prefill_pass(model, inputs),
        name: prefill_pass(model, inputs, oracle([k] * args.batch, [f] * args.batch)),
        "rest": rest_pass(model, inputs),
        "full layers": layer_pass(model, args.batch, TOKENS, 0, f),
        "frozen layers": frozen_pass(model, args.batch, f, k),
        "text layers": layer_pass(model, args.batch, TEXT, k, args.layers),
    }
    if args.batch > 1:
        others = [args.layers if row % 2 else k for row in range(args.batch)]
        freezes = [args.layers if row % 2 else f for row in range(args.batch)]
        runs["half of the rows"] = prefill_pass(model, inputs, oracle(others, freezes))
    timers = {one: timed(run, model.device, args.clock) for one, run in runs.items()}
    times = interleaved(timers, args.rounds)
    ideal = ["rest", "full layers", "frozen layers", "text layers"]
    ratios = {
        f"{name} / stock": ratio(times, [name], ["stock"]),
        f"{name}: ideal / stock": ratio(times, ideal, ["stock"]),
        f"{name} / ideal": ratio(times, [name], ideal, "at most 1.05"),
    }
    if args.batch > 1:
        ratios[f"{name}: half of the rows / stock"] = ratio(times, ["half of the rows"], ["stock"])
    report.add(times, ratios)
    if f:
        print(f"one full layer: {1e3 * statistics.median(times['full layers']) / f:.1f} ms\n", flush=True)


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument(
        "--schedule",
        type=schedule,
        action="append",
        metavar="F:K",
        help="freeze and exit layer, or an exit layer alone; several. Default: L/2, L/4:L and L/4:L/2",
    )
    parser.add_argument("--pairs", type=int, default=30, help="with the stock model, at least 20; 0: none")
    args = parser.parse_args()
    if 0 < args.pairs < MIN_PAIRS:
        parser.error(f"--pairs {args.pairs}: fewer than {MIN_PAIRS} give no useful bound")
    torch.set_num_threads(args.threads)
    layers = args.layers
    schedules = args.schedule or [(layers // 2,) * 2, (layers // 4, layers), (layers // 4, layers // 2)]
    if any(k > layers for _, k in schedules):
        parser.error(f"--schedule: the model has {layers} layers")

    model = build_model(args)
    report = Report(setting_of(args, rounds=args.rounds, pairs=args.pairs, clock=args.clock), args.json)
    for f, k in schedules:
        measure(args, model, f, k, report)
    if not args.pairs:
        return
    inputs = make_inputs(model, args.batch)
    stock = prefill_pass(model, inputs)
    prices = {
        "exit that never fires": dyvte.VisualExit.fixed(layers),
        "silent gates": silent_gates(model),
        "silent gates with two heads": silent_gates(model, freeze_head=True),
    }
    for name, exits in prices.items():
        pair = {"stock": stock, name: prefill_pass(model, inputs, exits)}
        timers = {one: timed(run, model.device, args.clock) for one, run in pair.items()}
        times = interleaved(timers, args.pairs)
        price = ratio(times, [name], ["stock"], "lower bound at most 1.01")
        report.add({name: times[name]}, {f"{name} / stock": price})


if __name__ == "__main__":
    main()
