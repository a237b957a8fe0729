"""Choose the gates' threshold on calibration data and write it into their gate_config.json.

--budget: the largest threshold whose visual compute on the calibration samples meets it, and with
--kv-budget its KV bytes (--budget 1: those alone). Gates with a freeze head: both thresholds, moved
together at the distance that gate_config.json has. --alpha: the
earliest-leaving threshold whose mean loss is at most alpha, with probability 1 - delta over the draw of the
calibration images; if none is certified, visual tokens never leave, and that is said. With --groups, so for
every group of questions apart: a row is decided by its group's thresholds, and stays at full depth where the
group has no certificate or the row is like none of them.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dyvte.commands import profile
from dyvte.commands.training_options import add_tracing, tracing_config_of

if TYPE_CHECKING:
    from dyvte.calibration import Grouping

EXAMPLES = """
dyvte calibrate --gates runs/embedded/gates --trace runs/trace_calibration --budget 0.5
dyvte calibrate --gates runs/embedded/gates --config configs/embedded.yaml \\
    --data_path data/scenes/instruct/calibration.json --trace runs/trace_calibration \\
    --alpha 0.02 --delta 0.1
dyvte calibrate --gates runs/embedded/gates --trace runs/trace_calibration --alpha 0.02 --delta 0.1 \\
    --groups data/scenes/instruct/calibration.json:type
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
        "--groups",
        metavar="FILE[:FIELD]|clusters:N",
        help="with --alpha: bound each group's loss apart; groups are FIELD (type) of the records of FILE, "
        "which the traces were made from, or clusters of gate features",
    )
    parser.add_argument(
        "--group-layer", type=int, help="with --groups: layers behind the features that tell a row's group"
    )
    parser.add_argument(
        "--group-share",
        type=float,
        default=0.25,
        help="with --groups: share of the images to learn that from",
    )
    parser.add_argument(
        "--guard",
        type=float,
        default=0.01,
        help="with --groups: share of rows like those calibrated on that may be taken for others; 0: none",
    )
    parser.add_argument(
        "--joint", action="store_true", help="with --groups: delta for all bounds together, not for each"
    )
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

    from dyvte.calibration import calibrate_compute, calibrate_groups, calibrate_risk, write_calibration
    from dyvte.calibration.apply import trained_on
    from dyvte.errors import ConfigError
    from dyvte.gates import GateStack
    from dyvte.teacher import TraceStore

    if missing := [f"--{name}" for name in ("gates", "trace") if getattr(args, name) is None]:
        raise ConfigError(f"{' and '.join(missing)} must be given, see dyvte calibrate --help")
    if args.groups is not None and (args.alpha is None or args.table):
        raise ConfigError(
            "--groups bounds a risk in each group: give --alpha, and neither --budget nor --table"
        )
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
    elif args.groups is not None:
        found = calibrate_groups(
            gates, store, _grouping(args), args.alpha, args.delta,
            loss=args.loss, method=args.method, seed=args.image_seed,
        )  # fmt: skip
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


def _grouping(args: argparse.Namespace) -> Grouping:
    """How --groups and its companions group the samples."""
    from dyvte.calibration import Grouping

    names, clusters = None, 0
    head, _, tail = args.groups.rpartition(":")
    if head == "clusters" and tail.isdigit():
        clusters = int(tail)
    else:
        names = named_groups(args.groups)
    return Grouping(
        names=names,
        clusters=clusters,
        layer=args.group_layer,
        guard=args.guard,
        share=args.group_share,
        joint=args.joint,
    )


def named_groups(text: str) -> dict[str, str]:
    """Group of every record by its id.

    Parameters
    ----------
    text
        ``FILE[:FIELD]``: a json or jsonl file of records with ``id`` and the field, ``type`` if not named.

    Raises
    ------
    DataError
        If the file is not readable so, or a record lacks one of the two.
    """
    from dyvte.readers.rows import read_jsonl, read_rows

    path, _, field = text.rpartition(":")
    if not path or Path(text).exists():
        path, field = text, "type"
    rows = read_jsonl(Path(path)) if path.endswith(".jsonl") else read_rows(Path(path))
    return {row.text("id"): row.text(field) for row in rows}


def _freezing(record: dict[str, Any]) -> str:
    """What a freeze head adds to the line; nothing without one."""
    if "mean_freeze_layer" not in record:
        return ""
    return f"mean freeze layer {record['mean_freeze_layer']:.2f}, KV bytes {record['kv_memory']:.1%}, "
