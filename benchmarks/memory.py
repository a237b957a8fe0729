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
from typing import Any

import torch
from decode import inside, step
from prefill import PREFIX, PROMPT, VISUAL, arguments, build_model, make_inputs, setting_of

import dyvte
from dyvte.gates import GateConfig, GateStack

VARIANTS = ("full", "VTW", "gates")
NEW_TOKENS = 4


def gates_that_fire_at(k: int, layers: int, hidden: int) -> dyvte.VisualExit:
    """Gates 1..k are asked, and gate k sends every row away."""
    offsets = tuple(-1e4 if layer < k else 1e4 for layer in range(1, layers + 1))
    config = GateConfig(num_layers=layers, hidden_size=hidden, offsets=offsets)
    return dyvte.VisualExit(GateStack.init(config))


@torch.inference_mode()
def measure_one(args: argparse.Namespace) -> dict[str, int]:
    """Cache and peak bytes of one variant, above what the model itself takes."""
    torch.set_num_threads(args.threads)
    device, dtype = torch.device(args.device), getattr(torch, args.dtype)
    model = build_model(args.hidden, args.layers, dtype, args.attention).to(device)
    inputs = {name: value.to(device) for name, value in make_inputs(args.batch, dtype).items()}
    k = args.layers // 2
    exits = {
        "full": None,
        "VTW": dyvte.VisualExit.fixed(k),
        "gates": gates_that_fire_at(k, args.layers, args.hidden),
    }[args.only]
    before = start_counting(device)
    with inside(model, exits):
        cache = model(**inputs, use_cache=True, logits_to_keep=1).past_key_values
        kv = sum(s.untyped_storage().nbytes() for layer in cache.layers for s in (layer.keys, layer.values))
        for _ in range(NEW_TOKENS):
            step(model, torch.full((args.batch, 1), 9, device=device), cache)
    return {"kv": kv, "peak": peak(device) - before}


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
    parser = arguments(__doc__)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--only", choices=VARIANTS, help="measure this one in this process, print JSON")
    args = parser.parse_args()
    if args.only:
        print(json.dumps(measure_one(args)))
        return
    found: dict[str, dict[str, Any]] = {}
    for name in VARIANTS:
        command = [sys.executable, __file__, *sys.argv[1:], "--only", name]
        output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
        found[name] = json.loads(output.splitlines()[-1])
    setting = setting_of(args, torch.device(args.device))
    del setting["rounds"]
    setting["tokens"] = f"{PREFIX} + {VISUAL} visual + {PROMPT} per row, {args.batch} rows"
    setting["exit layer"] = f"{args.layers // 2} of {args.layers}"
    for name, value in setting.items():
        print(f"{name:16} {value}")
    print(f"\n{'':10} {'KV cache':>12} {'/ full':>7} {'peak above the model':>22} {'/ full':>7}")
    for name, one in found.items():
        shares = [one[what] / found["full"][what] for what in ("kv", "peak")]
        print(
            f"{name:10} {one['kv'] / 2**20:8.1f} MiB {shares[0]:7.3f} {one['peak'] / 2**20:18.1f} MiB "
            f"{shares[1]:7.3f}"
        )
    if args.json:
        content = json.dumps({"setting": setting, "bytes": found}, indent=2)
        Path(args.json).write_text(content, encoding="utf-8")


if __name__ == "__main__":
    main()
