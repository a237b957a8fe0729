"""Which learning rate, for gates of a wide backbone? The same traces, as if a layer had more numbers.

Gates of a 7B read 8,192 numbers, those of the embedded backbones 288 and 1,152, and Adam moves every
weight by about the learning rate in a step, so that more inputs move a gate further. Each part of the traced
features is turned into a space of more dimensions by a fixed random isometry: what can be learned from it
stays the same, every coordinate is a mixture as in a wide model, and only the width differs.

    python experiments/widths.py --scenes data/scenes/instruct --config configs/embedded.yaml
"""

from __future__ import annotations

import dataclasses
import json
from functools import partial
from pathlib import Path

import torch
from recipes import judged, table
from torch import Tensor
from workbench import SPLITS, Workbench, arguments, hidden_size

from dyvte.comparison.records import plain
from dyvte.evaluation.latency import machine
from dyvte.files import write_atomically
from dyvte.gates import DEFAULT_FEATURES
from dyvte.teacher.trace import Trace
from dyvte.training.target import TargetConfig

WIDTHS = (1152, 8192)
RATES = (5e-3, 1e-3, 2e-4)


def isometry(size: int, wider: int) -> Tensor:
    """(size, wider) with orthonormal rows, always the same."""
    drawn = torch.randn(wider, size, generator=torch.Generator().manual_seed(size + wider))
    return torch.linalg.qr(drawn).Q.T


def widened(trace: Trace, turn_DW: Tensor) -> Trace:
    """The trace with every part of its features turned into more dimensions; lengths stay those of RMS 1."""
    scale = (turn_DW.shape[1] / turn_DW.shape[0]) ** 0.5

    def wide(features: Tensor) -> Tensor:
        parts = features.float().unflatten(-1, (len(DEFAULT_FEATURES), -1))
        return (parts @ turn_DW * scale).flatten(-2).to(features.dtype)

    grid = trace.grid
    if grid is not None:
        changed = {name: wide(getattr(grid, name)) for name in ("embeddings", "features")}
        grid = dataclasses.replace(grid, **changed)
    return dataclasses.replace(trace, features=wide(trace.features), grid=grid)


def main() -> None:
    """Trace, widen, train with each rate, judge; print a table for each width."""
    parser = arguments(__doc__)
    parser.add_argument("--alpha", type=float, default=0.02, help="answers that may change")
    parser.add_argument("--widths", type=int, nargs="+", default=WIDTHS, help="numbers that a gate reads")
    parser.add_argument("--rates", type=float, nargs="+", default=RATES, help="learning rates")
    parser.add_argument("--json", type=Path, help="write all numbers here")
    args = parser.parse_args()
    bench = Workbench.of(args)
    for split in SPLITS:
        bench.traces(split)
    size, target, content = hidden_size(bench.work / "trace-train"), TargetConfig(alpha=args.alpha), {}
    print(machine())
    for width in (len(DEFAULT_FEATURES) * size, *args.widths):
        turn = isometry(size, width // len(DEFAULT_FEATURES))
        name = f"width-{width}"
        widen = partial(widened, turn_DW=turn)
        train, calibration, test = bench.with_features(name, widen, DEFAULT_FEATURES, width)
        folders = {
            f"{rate:g}": list(bench.gates(f"{name}-{rate:g}", f"optimizer.learning_rate={rate}", trace=train))
            for rate in args.rates
        }
        content[width] = judged(folders, calibration, test, target)
        print(f"\n{width} numbers; by learning rate\n\n{table(content[width], args.alpha)}", flush=True)
    write_atomically(args.json or bench.work / "widths.json", json.dumps(plain(content), indent=2) + "\n")


if __name__ == "__main__":
    main()
