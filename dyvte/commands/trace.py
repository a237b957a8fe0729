"""Run the teacher once over LLaVA data and keep what it yields; goes on where it stopped.

Model, data and teacher settings come from a training configuration and the options here. Under torchrun every
process takes its share.
"""

from __future__ import annotations

import argparse
import math
from typing import TYPE_CHECKING

from dyvte.commands.training_options import add_tracing, tracing_config_of

if TYPE_CHECKING:
    from dyvte.teacher import Trace

EXAMPLES = """
dyvte trace --config configs/embedded.yaml --data_path data/scenes/instruct/test.json \\
    --output runs/trace_test
dyvte trace --config configs/embedded.yaml --freeze_every 3 --output runs/trace_grid
torchrun --nproc-per-node 8 -m dyvte trace --config configs/llava_v1_5_7b.yaml --output runs/trace
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of ``dyvte trace``."""
    parser.add_argument("--output", required=True, help="folder of the traces (required)")
    add_tracing(parser)


def run(args: argparse.Namespace) -> int:
    """Trace; print what is there."""
    from dyvte.tracing import trace_data

    store = trace_data(tracing_config_of(args), args.output)
    if store is None:  # not the first process
        return 0
    trace = store.trace()
    print(
        f"{len(trace)} samples, {trace.num_layers} layers, {trace.features.shape[2]} features: {store.folder}"
    )
    for text in store.dropped():
        print(f"dropped: {text}")
    for name, count in store.notes().items():
        if count:
            print(f"{name.replace('_', ' ')}: {count}")
    print("exit layer    " + " ".join(f"{k:7d}" for k in trace.exits))
    for name in ("risk", "same_answer"):
        means = getattr(trace, name)[:, list(trace.exits)].double().mean(0).tolist()
        print(f"{name.replace('_', ' '):13s} " + " ".join(f"{value:7.4f}" for value in means))
    if trace.grid is not None:
        for name in ("risk", "same_answer"):
            print(f"\n{name.replace('_', ' ')}, visual tokens updated in layers 1..f and read in layers 1..k")
            print(_grid(trace, name))
    return 0


def _grid(trace: Trace, name: str) -> str:
    """Means by freeze layer (rows; the last, L, is the plain exit) and exit layer (columns)."""
    means_FK = trace.labels(name).double().mean(0)
    lines = ["     f \\ k    " + " ".join(f"{k:7d}" for k in trace.exits)]
    for f, means_K in zip((*trace.freezes, trace.num_layers), means_FK.tolist(), strict=True):
        cells = ["" if math.isnan(means_K[k]) else f"{means_K[k]:.4f}" for k in trace.exits]
        row = f"{f if f < trace.num_layers else 'none':>10}    "
        lines.append(row + " ".join(f"{cell:>7}" for cell in cells))
    return "\n".join(lines)
