"""Bytes of the K/V cache, and peak memory of a prefill and a few decode steps, for full / VTW / gates.

Every variant runs in a process of its own, so that none finds another's memory. On a CPU (Linux) the peak is
that of the resident set; on a GPU that of the allocator.

    python benchmarks/memory.py --hidden 1024 --layers 8 --batch 4
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path

import torch
from common import arguments, print_setting, setting_of, write_json
from passes import Decoding, kv_bytes
from random_llava import build_model, gates_that_fire_at, inside, make_inputs

import dyvte
from dyvte.progress import progress

VARIANTS = ("full", "VTW", "DyVTE")
NEW_TOKENS = 4


def exits_of(name: str, model: torch.nn.Module, k: int) -> dyvte.VisualExit | None:
    """The exits of a variant: none, a fixed layer, or gates that all fire there."""
    if name == "full":
        return None
    return dyvte.VisualExit.fixed(k) if name == "VTW" else gates_that_fire_at(k, model)


@torch.inference_mode()
def measure_here(args: argparse.Namespace, name: str) -> dict[str, int]:
    """Cache and peak bytes of one variant, above what the model itself takes."""
    torch.set_num_threads(args.threads)
    model = build_model(args)
    inputs = make_inputs(model, args.batch)
    exits = exits_of(name, model, args.layers // 2)
    before = start_counting(model.device)
    decoding = Decoding(model, inputs, exits)
    kv = kv_bytes(decoding.cache)
    with inside(model, exits):
        for _ in range(NEW_TOKENS):
            decoding.step()
    return {"kv": kv, "peak": peak(model.device) - before}


def measure_apart(args: argparse.Namespace) -> dict[str, dict[str, int]]:
    """All variants, each in its own process."""
    options = ("hidden", "layers", "batch", "vocabulary", "threads", "dtype", "attention", "device")
    command = [sys.executable, __file__]
    for option in options:
        command += [f"--{option}", str(getattr(args, option))]
    found = {}
    with progress(len(VARIANTS), "memory", "process") as advance:
        for name in VARIANTS:
            output = subprocess.run([*command, "--only", name], check=True, stdout=subprocess.PIPE, text=True)
            found[name] = json.loads(output.stdout.splitlines()[-1])
            advance(1)
    return found


def start_counting(device: torch.device) -> int:
    """Forget earlier peaks; bytes in use now."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return torch.cuda.memory_allocated(device)
    Path("/proc/self/clear_refs").write_text("5")
    return _status("VmRSS")


def peak(device: torch.device) -> int:
    """Most bytes in use since `start_counting`."""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else _status("VmHWM")


def _status(name: str) -> int:
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(f"{name}:"))


def main() -> None:
    parser = arguments(__doc__, batch=4)
    parser.add_argument("--only", choices=VARIANTS, help="measure this one in this process, print JSON")
    args = parser.parse_args()
    if args.only:
        print(json.dumps(measure_here(args, args.only)))
        return
    setting = setting_of(args, exit_layer=f"{args.layers // 2} of {args.layers}")
    print_setting(setting)
    found = measure_apart(args)
    print(f"{'':10} {'KV cache':>12} {'/ full':>7} {'peak above the model':>22} {'/ full':>7}")
    for name, one in found.items():
        shares = [one[what] / found["full"][what] for what in ("kv", "peak")]
        print(
            f"{name:10} {one['kv'] / 2**20:8.1f} MiB {shares[0]:7.3f} {one['peak'] / 2**20:18.1f} MiB "
            f"{shares[1]:7.3f}"
        )
    write_json(args.json, {"setting": setting, "bytes": found})


if __name__ == "__main__":
    main()
