"""How fast gates train from traces: epochs a minute through the real DeepSpeed engine and loop.

Traces are random, of the embedded backbone's size; checkpoints and log lines are as in a real run.
Measured on a machine that does nothing else, or the numbers mean little.

    python benchmarks/gate_speed.py                    # 5,000 samples, two threads
    python benchmarks/gate_speed.py --profile          # where the time goes
"""

from __future__ import annotations

import argparse
import cProfile
import pstats
import tempfile
import time
from pathlib import Path

import torch
from common import print_setting, setting_of, write_json

from dyvte.backbones import describe_config
from dyvte.config import from_dict
from dyvte.distributed import join_processes
from dyvte.gates import GateConfig, GateStack, uniform_offsets
from dyvte.teacher import Trace
from dyvte.training.config import TrainConfig
from dyvte.training.gate_training import GateTraining

ROOT = Path(__file__).resolve().parents[1]
TARGET = 50.0


def random_trace(samples: int, num_layers: int, feature_size: int) -> Trace:
    """Traces whose risk falls along the layers, as real ones do."""
    generator = torch.Generator().manual_seed(0)
    risk = torch.rand(samples, num_layers + 1, generator=generator).sort(1, descending=True).values
    risk[:, -1] = 0
    same = (risk < 0.3).float()
    return Trace(
        risk=risk,
        reverse_risk=risk,
        agreement=same,
        same_answer=same,
        loss=risk,
        features=torch.randn(samples, num_layers, feature_size, generator=generator),
        sample_ids=tuple(map(str, range(samples))),
        num_visual=torch.full((samples,), 64),
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--backbone", type=Path, default=ROOT / "checkpoints" / "tiny-llava")
    parser.add_argument("--architecture", default="compact")
    parser.add_argument("--samples", type=int, default=5000)
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--batch_size", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--profile", action="store_true", help="the functions that take most of the time")
    parser.add_argument("--json", help="also write the numbers to this file")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    shape = describe_config(args.backbone)
    config = GateConfig(
        num_layers=shape.num_layers,
        hidden_size=shape.hidden_size,
        architecture=args.architecture,
        offsets=uniform_offsets(shape.num_layers),
    )
    trace = random_trace(args.samples, shape.num_layers, config.feature_size)
    args.dtype, args.attention, args.device, args.batch = "float32", "none", "cpu", args.batch_size
    args.hidden, args.layers = shape.hidden_size, shape.num_layers
    gates = GateStack.init(config)
    size = sum(parameter.numel() for parameter in gates.parameters())
    setting = setting_of(
        args, tokens=f"{args.samples} traced samples", gates=f"{args.architecture}, {size:,}"
    )
    print_setting(setting)
    rates, seconds = [], []
    profiler = cProfile.Profile()
    for _ in range(args.rounds):
        with tempfile.TemporaryDirectory() as folder, join_processes(engine=True) as processes:
            cfg = from_dict(
                TrainConfig,
                {
                    "model": {"path": str(args.backbone)},
                    "data": {"path": "unused.json"},
                    "output_dir": folder,
                    "epochs": args.epochs,
                    "batch_size": args.batch_size,
                },
            )
            training = GateTraining(cfg, GateStack.init(config), trace, None, processes)
            start, user = time.perf_counter(), time.process_time()
            if args.profile:
                profiler.enable()
            training.run(0, lambda step, metrics: None, lambda steps: None)
            profiler.disable()
            rates.append(60 * args.epochs / (time.perf_counter() - start))
            print(f"round {len(rates)} of {args.rounds}: {rates[-1]:.1f} epochs a minute", flush=True)
            seconds.append((time.process_time() - user) / args.epochs)
            training.close()
    rates.sort()
    print(
        f"epochs a minute {rates[len(rates) // 2]:.1f}   ({rates[0]:.1f} .. {rates[-1]:.1f}), "
        f"target {TARGET:g}"
    )
    print(f"processor seconds for an epoch {min(seconds):.2f}")
    write_json(args.json, {"setting": setting, "epochs_per_minute": rates, "processor_seconds": seconds})
    if args.profile:
        pstats.Stats(profiler).sort_stats("tottime").print_stats(25)


if __name__ == "__main__":
    main()
