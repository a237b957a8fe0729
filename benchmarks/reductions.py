"""Does the prefill's time fall with its FLOPs when visual tokens are fewer or cheaper before they leave?

FLOPs are counted by torch over the very runs that are timed, vision tower and head included; times come from
interleaved rounds, all variants in each. `time / FLOPs` is the share of the stock time over the share of the
stock FLOPs: what an implementation that only masks would show is 1 over the FLOPs' share.

    python benchmarks/reductions.py --hidden 1024 --layers 8
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from common import Ratio, Report, arguments, interleaved, ratio, setting_of, timed
from passes import prefill_pass
from random_llava import build_model, make_inputs
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import dyvte
from dyvte.reductions import FastV, InactiveHeads, Neighbours, Reduction, SparseFFN


def plans(layers: int, heads: int) -> dict[str, dyvte.VisualExit]:
    """Reductions alone and behind an exit at L/2."""
    half = torch.zeros(layers, heads, dtype=torch.bool)
    half[:, : heads // 2] = True
    yopo = {
        "neighbours, radius 2": [Neighbours(2)],
        "half of the heads": [InactiveHeads(half)],
        "half of the neurons": [SparseFFN(0.5)],
        "YOPO, these three": [Neighbours(2), InactiveHeads(half), SparseFFN(0.5)],
    }
    found: dict[str, dyvte.VisualExit] = {}
    for name, reductions in {"FastV, K = 2, R = 50 %": [FastV(2, 0.5)], **yopo}.items():
        found[name] = dyvte.VisualExit(reductions=reductions)
    three: list[Reduction] = yopo["YOPO, these three"]
    for name, more in (
        ("FastV", [FastV(2, 0.5)]),
        ("YOPO", three),
        ("FastV + YOPO", [FastV(2, 0.5), *three]),
    ):
        found[f"{name}, exit at L/2"] = dyvte.VisualExit.fixed(layers // 2, reductions=more)
    return found


def counted(run: Callable[[], None]) -> int:
    """FLOPs of one run, two per multiply-add."""
    # The counter does not know the fused attention of a CPU.
    plain = sdpa_kernel(SDPBackend.MATH)
    with torch.inference_mode(), plain, FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops()


def main() -> None:
    args = arguments(__doc__).parse_args()
    torch.set_num_threads(args.threads)
    model = build_model(args)
    inputs = make_inputs(model, args.batch)
    heads = model.get_decoder().config.num_attention_heads
    variants = {"stock": prefill_pass(model, inputs)}
    variants |= {name: prefill_pass(model, inputs, plan) for name, plan in plans(args.layers, heads).items()}
    flops = {name: counted(run) for name, run in variants.items()}
    report = Report(setting_of(args), args.json)
    times = interleaved({name: timed(run, model.device) for name, run in variants.items()}, args.rounds)

    ratios: dict[str, Ratio] = {}
    for name in list(variants)[1:]:
        share = flops[name] / flops["stock"]
        time = ratio(times, [name], ["stock"])
        ratios[f"{name}: FLOPs"] = Ratio(share, share, share)
        ratios[f"{name}: time"] = time
        ratios[f"{name}: time / FLOPs"] = Ratio(
            time.median / share, time.low / share, time.high / share, "at most 1.25"
        )
    report.add(times, ratios)


if __name__ == "__main__":
    main()
