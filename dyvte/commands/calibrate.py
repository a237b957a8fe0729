"""Choose the gates' threshold on calibration data and write it into their gate_config.json.

--budget: the largest threshold whose visual compute on the calibration samples meets it, and with
--kv-budget its KV bytes (--budget 1: those alone). Gates with a freeze head: both thresholds, moved
together at the distance that gate_config.json has. --alpha: the
earliest-leaving threshold whose mean loss is at most alpha, with probability 1 - delta over the draw of the
calibration images; if none is certified, visual tokens never leave, and that is said.
"""

from __future__ import annotations

import argparse
import sys
from typing import Any

from dyvte.commands import profile
from dyvte.commands.training_options import add_tracing, tracing_config_of

EXAMPLES = """
dyvte calibrate --gates runs/embedded/gates --trace runs/trace_calibration --budget 0.5
dyvte calibrate --gates runs/embedded/gates --config configs/embedded.yaml \\
    --data_path data/scenes/instruct/calibration.json --trace runs/trace_calibration \\
    --alpha 0.02 --delta 0.1
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of ``dyvte calibrate``."""
    parser.add_argument("--gates", help="gates checkpoint; its gate_config.json is rewritten (required)")
    parser.add_argument(
        "--trace",
        help="traces of the calibration data; made first if --data_path or --dataset is given (required)",
    )
    goal = parser.add_mutually_exclusive_group(required=True)
    goal.add_argument("--budget", type=float, help="share of the full model's visual compute")
    parser.add_argument(
        "--kv-budget", type=float, help="with --budget: share of the visual tokens' KV bytes, too"
    )
    goal.add_argument("--alpha", type=float, help="bound on the mean loss")
    parser.add_argument("--delta", type=float, default=0.1, help="with --alpha: chance that the bound fails")
    parser.add_argument(
        "--loss", default="same_answer", help="with --alpha: same_answer, or risk:C for min(KL, C) / C"
    )
    parser.add_argument("--method", choices=("betting", "bentkus"), default="betting", help="p-values")
    parser.add_argument("--image-seed", type=int, default=0, help="order in which images are bet on")
    parser.add_argument(
        "--table",
        action="store_true",
        help="also record thresholds for other budgets and bounds, which dyvte serve offers to requests",
    )
    # `dyvte profile` was an option here.
    goal.add_argument("--reduction", choices=("yopo",), help=argparse.SUPPRESS)
    profile.add_own_arguments(parser, hidden=True)
    add_tracing(parser, omit=("teacher.reductions",))


def run(args: argparse.Namespace) -> int:
    """Calibrate; print what the threshold does."""
    if args.reduction is not None:
        print("note: this is `dyvte profile` now", file=sys.stderr)
        return profile.run(args)
    import json

    from dyvte.calibration import calibrate_compute, calibrate_risk, write_calibration
    from dyvte.calibration.apply import trained_on
    from dyvte.errors import ConfigError
    from dyvte.gates import GateStack
    from dyvte.teacher import TraceStore

    if missing := [f"--{name}" for name in ("gates", "trace") if getattr(args, name) is None]:
        raise ConfigError(f"{' and '.join(missing)} must be given, see dyvte calibrate --help")
    gates = GateStack.from_pretrained(args.gates).eval()
    if "data.path" in args or "data.hub_id" in args:
        from dyvte.tracing import trace_data

        model = gates.config.backbone.get("id")
        known = [f"model.path={json.dumps(model)}"] if model and args.config is None else []
        if known and (adapter := gates.config.backbone.get("adapter")):
            known.append(f"model.adapter={json.dumps(adapter)}")
        if "reference" in gates.config.training.get("trace", {}):  # judged against what they learned from
            known.append("teacher.reference=base")
        if (reductions := gates.config.training.get("reductions", "none")) != "none":
            known.append(f"teacher.reductions={json.dumps(reductions)}")
        trace_data(tracing_config_of(args, [*known]), args.trace)
    store = TraceStore.open(args.trace)
    if args.budget is not None:
        if trained_on(gates.config, store):
            print("note: these are the samples that the gates were trained on; new ones may cost more")
        found = calibrate_compute(gates, store, args.budget, memory_budget=args.kv_budget)
    else:
        found = calibrate_risk(
            gates, store, args.alpha, args.delta, loss=args.loss, method=args.method, seed=args.image_seed
        )
    if args.table:
        from dyvte.calibration.tables import calibration_tables

        how = {"delta": args.delta, "loss": args.loss, "method": args.method, "seed": args.image_seed}
        found.record.update(calibration_tables(gates, store, **how))
    write_calibration(args.gates, found)
    record = found.record
    print(found.text)
    print(
        f"on {record['num_samples']} samples of {record['num_images']} images: mean exit layer "
        f"{record['mean_exit_layer']:.2f} of {gates.config.num_layers}, "
        f"{_freezing(record)}visual compute "
        f"{record['visual_compute']:.1%}, same answer {record['same_answer']:.1%}, "
        f"risk {record['risk']:.4f} nats"
    )
    print(f"written: {args.gates}/gate_config.json")
    return 0


def _freezing(record: dict[str, Any]) -> str:
    """What a freeze head adds to the line; nothing without one."""
    if "mean_freeze_layer" not in record:
        return ""
    return f"mean freeze layer {record['mean_freeze_layer']:.2f}, KV bytes {record['kv_memory']:.1%}, "
