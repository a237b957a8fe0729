"""Time of a decode step behind an exit over the stock model's, and how often the host waits.

Caches are filled once; each round runs a few steps on every cache, in a shuffled order, and takes the new
tokens off again. LLaVA proportions, random weights.

    python benchmarks/decode.py --hidden 512 --layers 8 --batch 4 --rounds 40
"""

from __future__ import annotations

import random
import statistics
import time
from contextlib import nullcontext
from typing import Any

import torch
from prefill import (
    PREFIX,
    PROMPT,
    VISUAL,
    arguments,
    build_model,
    make_inputs,
    ratio,
    report,
    setting_of,
    silent_gates,
)
from torch.utils._python_dispatch import TorchDispatchMode

import dyvte
from dyvte.policies import OraclePolicy

STEPS = 8


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


def inside(model: torch.nn.Module, exits: dyvte.VisualExit | None) -> Any:
    return nullcontext() if exits is None else exits(model)


def step(model: torch.nn.Module, token: torch.Tensor, cache: Any) -> None:
    model(input_ids=token, past_key_values=cache, use_cache=True)


@torch.inference_mode()
def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--batch", type=int, default=4)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    device, dtype = torch.device(args.device), getattr(torch, args.dtype)
    model = build_model(args.hidden, args.layers, dtype, args.attention).to(device)
    inputs = {name: value.to(device) for name, value in make_inputs(args.batch, dtype).items()}
    token = torch.full((args.batch, 1), 9, device=device)
    half = args.layers // 2
    spread = [max(1, args.layers * (row + 1) // args.batch) for row in range(args.batch)]
    variants = {
        "stock": None,
        "exit that never fires": dyvte.VisualExit.fixed(args.layers),
        "silent gates": silent_gates(model, args.layers, args.hidden),
        f"all leave after {half}": dyvte.VisualExit.fixed(half),
        "all leave before the first layer": dyvte.VisualExit.fixed(0),
        "rows leave one by one": dyvte.VisualExit.from_policy(OraclePolicy(spread)),
    }
    caches, waits = {}, {}
    for name, exits in variants.items():
        with inside(model, exits):
            caches[name] = model(**inputs, use_cache=True, logits_to_keep=1).past_key_values
            step(model, token, caches[name])
            with Waits() as counter:
                step(model, token, caches[name])
            waits[name] = counter.count

    def run(name: str) -> float:
        with inside(model, variants[name]):
            step(model, token, caches[name])
            _wait(device)
            start = time.perf_counter()
            for _ in range(STEPS):
                step(model, token, caches[name])
            _wait(device)
            seconds = time.perf_counter() - start
        caches[name].crop(-STEPS - 1)
        return seconds / STEPS

    times: dict[str, list[float]] = {name: [] for name in variants}
    order = random.Random(0)
    for round_index in range(args.rounds + 1):
        names = list(variants)
        order.shuffle(names)
        for name in names:
            seconds = run(name)
            if round_index:
                times[name].append(seconds)
    figures = {f"{name} / stock": ratio(times, [name], ["stock"]) for name in variants if name != "stock"}
    setting = {
        **setting_of(args, device),
        "tokens": f"{PREFIX} + {VISUAL} visual + {PROMPT} per row, {args.batch} rows, {STEPS} steps a round",
        "exit layers": f"one by one: {spread}",
    }
    report(setting, times, figures, args.json)
    print()
    for name, count in waits.items():
        print(f"waits of the host in one step, {name:34} {count}")
    print(f"\none stock step takes {1e3 * statistics.median(times['stock']):.2f} ms")


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


if __name__ == "__main__":
    main()
