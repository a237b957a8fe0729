"""What all benchmarks share: options, interleaved timing, ratios with bounds, and what is reported.

Prompts have the published proportions: 35 tokens before the image, 576 visual tokens, 40 after.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import random
import re
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
import transformers

import dyvte
from dyvte.heap import keep_memory
from dyvte.progress import progress

PREFIX, VISUAL, PROMPT = 35, 576, 40
TOKENS, TEXT = PREFIX + VISUAL + PROMPT, PREFIX + PROMPT
IMAGE_ID, FILLER_ID = 5, 9

Times = dict[str, list[float]]


# -- time --------------------------------------------------------------------------------------------------
def now(device: torch.device) -> float:
    """Seconds, once the device is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def timed(run: Callable[[], None], device: torch.device, clock: str = "wall") -> Callable[[], float]:
    """The seconds that `run` takes, or (clock "processor") those that this process's threads compute."""

    def seconds() -> float:
        start = _on(clock, device)
        run()
        return _on(clock, device) - start

    return seconds


def _on(clock: str, device: torch.device) -> float:
    wall = now(device)
    return time.process_time() if clock == "processor" else wall


def interleaved(variants: dict[str, Callable[[], float]], rounds: int, seed: int = 0) -> Times:
    """Seconds of each variant in each round, in a new order every round; the first round is not counted."""
    times: Times = {name: [] for name in variants}
    order = random.Random(seed)
    keep_memory()
    with progress((rounds + 1) * len(variants), "timing", "run") as advance:
        for round_index in range(rounds + 1):
            for name in order.sample(list(variants), len(variants)):
                with torch.inference_mode():
                    seconds = variants[name]()
                if round_index:
                    times[name].append(seconds)
                advance(1)
    return times


# -- ratios ------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Ratio:
    """A median of ratios with its 95 % bounds (NaN where there are too few), and what is aimed at."""

    median: float
    low: float
    high: float
    target: str = ""


def ratio(times: Times, over: Sequence[str], under: Sequence[str], target: str = "") -> Ratio:
    """The per-round ratio of two sums of variants."""
    top = [sum(values) for values in zip(*(times[n] for n in over), strict=True)]
    bottom = [sum(values) for values in zip(*(times[n] for n in under), strict=True)]
    ratios = sorted(a / b for a, b in zip(top, bottom, strict=True))
    rank = median_rank(len(ratios))
    low, high = (ratios[rank - 1], ratios[-rank]) if rank else (math.nan, math.nan)
    return Ratio(statistics.median(ratios), low, high, target)


def median_rank(count: int) -> int:
    """r such that the r-th smallest and r-th largest of `count` values bound the median at 95 %; 0: none.

    Order statistics: the number of values below the median is binomial(count, 1/2). 20 values give r = 6.
    """
    below, rank = 0.0, 0
    while True:
        below += math.comb(count, rank) / 2**count
        if 2 * below > 0.05:
            return rank
        rank += 1


# -- options and report -----------------------------------------------------------------------------------
def arguments(description: str | None, *, batch: int = 1) -> argparse.ArgumentParser:
    """Options that every benchmark takes."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--key-heads", type=int, help="heads of keys and values, default: as many as queries")
    parser.add_argument("--batch", type=int, default=batch)
    parser.add_argument("--vocabulary", type=int, default=1000)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--attention", default="sdpa")
    parser.add_argument("--device", default="cpu")
    parser.add_argument(
        "--clock",
        choices=("wall", "processor"),
        default="wall",
        help="processor: seconds of this process's threads, for a machine that is not quiet (CPU alone)",
    )
    parser.add_argument("--json", help="also write the ratios to this file")
    return parser


def schedule(text: str) -> tuple[int, int]:
    """``F:K``, or ``K`` where nothing is frozen before it leaves."""
    match = re.fullmatch(r"(?:(\d+):)?(\d+)", text)
    if match is None or int(match[1] or match[2]) > int(match[2]):
        raise argparse.ArgumentTypeError(f"{text!r}: expected F:K with F <= K, or K")
    return int(match[1] or match[2]), int(match[2])


def setting_of(args: argparse.Namespace, **more: object) -> dict[str, str]:
    """Machine, versions and sizes."""
    device = torch.device(args.device)
    return {
        "machine": f"{platform.machine()}, {os.cpu_count()} logical cores, {args.threads} threads",
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else _cpu_name(),
        "versions": f"torch {torch.__version__}, transformers {transformers.__version__}, "
        f"dyvte {dyvte.__version__}",
        "model": f"{args.layers} layers, hidden {args.hidden}, {args.dtype}, {args.attention}"
        + (f", {args.key_heads} heads of keys" if getattr(args, "key_heads", None) else ""),
        "tokens": f"{PREFIX} + {VISUAL} visual + {PROMPT} per row, batch {args.batch}",
        **{name: str(value) for name, value in more.items()},
    }


class Report:
    """Prints what a benchmark finds as it comes, and keeps it as JSON where asked: a long one may be killed.

    Parameters
    ----------
    setting
        Machine, versions and sizes; printed first.
    path
        JSON file of all that was found so far, or None.
    """

    def __init__(self, setting: dict[str, str], path: str | None) -> None:
        self.path = path
        self.found: dict[str, Any] = {"setting": setting, "ratios": {}, "seconds": {}}
        print_setting(setting)

    def add(self, times: Times, ratios: dict[str, Ratio]) -> None:
        """Print medians and ratios, and keep them."""
        for name, values in times.items():
            print(f"{name:34} {1e3 * statistics.median(values):9.2f} ms")
        print(f"\n{'median of ratios':40} {'':6}   95 % bounds        target")
        for name, one in ratios.items():
            print(f"{name:40} {one.median:6.3f}   {one.low:.3f} .. {one.high:.3f}     {one.target}".rstrip())
        print(flush=True)
        self.found["seconds"] |= times
        self.found["ratios"] |= {name: vars(one) for name, one in ratios.items()}
        write_json(self.path, self.found)


def print_setting(setting: dict[str, str]) -> None:
    """One line each."""
    for name, value in setting.items():
        print(f"{name:16} {value}")
    print(flush=True)


def write_json(path: str | None, content: dict[str, Any]) -> None:
    """Where asked."""
    if path:
        with open(path, "w", encoding="utf-8") as stream:
            json.dump(content, stream, indent=2)


def _cpu_name() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as stream:
            return next(line.split(":", 1)[1].strip() for line in stream if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or "unknown"
