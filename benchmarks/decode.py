"""Time of a decode step behind an exit over the stock model's, and how often the host waits.

Caches are filled once; each round runs a few steps on every cache, in a new order, and takes the new tokens
off again. With few rows reading the weights dominates a step, with many the K/V cache does.

    python benchmarks/decode.py --hidden 1024 --layers 8 --batch 1
    python benchmarks/decode.py --hidden 512 --layers 8 --batch 16
"""

from __future__ import annotations

from typing import Any

import torch
from common import Report, arguments, interleaved, ratio, setting_of
from passes import Decoding, kv_bytes
from random_llava import build_model, inside, make_inputs, oracle, silent_gates, spread_exits
from torch.utils._python_dispatch import TorchDispatchMode

import dyvte

NOT_GROUPED = "at most 1.03"


class Waits(TorchDispatchMode):
    """Counts operations that make the host wait for a device."""

    NAMES = ("_local_scalar_dense", "nonzero", "equal", "masked_select", "unique")

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        # Index work of the runtime is on host tensors, which nothing waits for.
        self.count += any(func.__name__.startswith(name) for name in self.NAMES)
        return func(*args, **(kwargs or {}))


def waits_of(decoding: Decoding) -> int:
    """In one decode step."""
    with inside(decoding.model, decoding.exits):
        decoding.step()
        with Waits() as counter:
            decoding.step()
    decoding.cache.crop(-2)
    return counter.count


@torch.inference_mode()
def main() -> None:
    args = arguments(__doc__, batch=4).parse_args()
    torch.set_num_threads(args.threads)
    model = build_model(args)
    inputs = make_inputs(model, args.batch)
    half, spread = args.layers // 2, spread_exits(args.batch, args.layers)
    variants = {
        "stock": None,
        "exit that never fires": dyvte.VisualExit.fixed(args.layers),
        "silent gates": silent_gates(model),
        f"all leave after {half}": dyvte.VisualExit.fixed(half),
        "all leave before the first layer": dyvte.VisualExit.fixed(0),
    }
    if args.batch > 1:
        variants["rows leave one by one"] = oracle(spread)
    decodings = {name: Decoding(model, inputs, exits) for name, exits in variants.items()}
    waits = {name: waits_of(one) for name, one in decodings.items()}
    weights = sum(p.numel() * p.element_size() for p in model.get_decoder().parameters())
    cache = kv_bytes(decodings["stock"].cache)
    setting = setting_of(
        args,
        rounds=f"{args.rounds} of {Decoding.STEPS} steps",
        exit_layers=f"one by one: {spread}",
        reads=f"{cache / (cache + weights):.0%} of what a stock step reads is K/V, the rest weights",
    )
    report = Report(setting, args.json)
    for name, count in waits.items():
        print(f"waits of the host in one step, {name:34} {count}")
    times = interleaved({name: one.seconds for name, one in decodings.items()}, args.rounds)
    ratios = {
        f"{name} / stock": ratio(
            times, [name], ["stock"], "" if name == "rows leave one by one" else NOT_GROUPED
        )
        for name in variants
        if name != "stock"
    }
    report.add(times, ratios)


if __name__ == "__main__":
    main()
