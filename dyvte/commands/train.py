"""Train gates: one teacher pass over LLaVA data, then gates from its traces in a DeepSpeed engine.

Settings come from --config (YAML, see configs/), then from the options here. The names with underscores are
those of LLaVA's and DyVTE's training scripts. The same command started again goes on where it stopped.

  dyvte train --config configs/llava_v1_5_7b.yaml --output_dir runs/7b
  dyvte train --model_name_or_path llava-hf/llava-1.5-7b-hf --data_path llava_v1_5_mix665k.json \\
      --image_folder data --output_dir runs/7b --bf16 True --fraction 0.01
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from typing import TYPE_CHECKING

from dyvte.commands.training_options import MODEL_AND_DATA, TRAINING, add_settings, config_of

if TYPE_CHECKING:
    from dyvte.training.train import TrainResult


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of ``dyvte train``."""
    add_settings(parser, [*MODEL_AND_DATA, *TRAINING])
    parser.add_argument(
        "--report_to", metavar="NAMES", help="wandb, tensorboard, all or none; comma-separated"
    )
    parser.add_argument("--dry-run", action="store_true", help="print sizes, counts and estimates, and leave")
    parser.add_argument("--local_rank", "--local-rank", type=int, help=argparse.SUPPRESS)  # launchers pass it


def run(args: argparse.Namespace) -> int:
    """Train, print where the gates are and how they fare."""
    import logging
    import warnings

    cfg = config_of(args, _trackers(args.report_to))
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    logging.getLogger("httpx").setLevel(logging.WARNING)
    # One for every collective of ZeRO-3; DeepSpeed's to mend.
    warnings.filterwarnings("ignore", r"`torch\.distributed\..*is deprecated", FutureWarning)
    first, world_size = os.environ.get("RANK", "0") == "0", int(os.environ.get("WORLD_SIZE", "1"))
    if args.dry_run:
        from dyvte.training.dryrun import describe_dry_run, dry_run

        if first:
            print(describe_dry_run(dry_run(cfg, world_size)))
        return 0
    from dyvte.training.train import train

    result = train(cfg)
    if first:
        _print_result(result)
    if world_size > 1:
        # With ZeRO-3, DeepSpeed's threads may abort the interpreter on its way out, after all work is done.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)
    return 0


def _print_result(result: TrainResult) -> None:
    summary = result.summary
    print(
        f"\n{summary['num_samples']} samples, {summary['steps']} steps, {summary['parameters']:,} parameters"
    )
    print(f"teacher {summary['trace_seconds']:.0f} s, gates {summary['train_seconds']:.0f} s")
    for text in summary["dropped"]:
        print(f"dropped: {text}", file=sys.stderr)
    print(f"\non {summary['num_judged']} {summary['judged_on']}, beside fixed K at the same compute:")
    print(result.table())
    exits = ", ".join(f"{k} ({share:.0%})" for k, share in enumerate(summary["exit_rate"]) if share)
    print(f"at threshold 0.5 they leave after layer {exits}")
    print(f"\ngates: {result.gates}\nnext: dyvte calibrate --gates {result.gates} --budget 0.5 ...")


def _trackers(names: str | None) -> list[str]:
    """``--report_to`` as an override."""
    if names is None:
        return []
    listed = [name.strip() for name in names.split(",") if name.strip() not in ("", "none")]
    listed = ["wandb", "tensorboard"] if "all" in listed else listed
    return [f"tracking.report_to={json.dumps(listed)}"]
