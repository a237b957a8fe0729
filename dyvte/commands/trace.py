"""Run the teacher once over LLaVA data and keep what it yields; goes on where it stopped.

Model, data and teacher settings come from a training configuration and the options here. Under torchrun every
process takes its share.
"""

from __future__ import annotations

import argparse

from dyvte.commands.training_options import add_tracing, tracing_config_of

EXAMPLES = """
dyvte trace --config configs/embedded.yaml --data_path data/scenes/instruct/test.json \\
    --output runs/trace_test
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
    return 0
