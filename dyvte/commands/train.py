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
import sys
from pathlib import Path

# option -> (setting, is the value text?, help)
OPTIONS: dict[str, tuple[str, bool, str]] = {
    "--model_name_or_path": ("model.path", True, "backbone: folder or hub id"),
    "--attn_implementation": ("model.attn_implementation", True, "sdpa, eager or flash_attention_2"),
    "--data_path": ("data.path", True, "LLaVA conversation json"),
    "--image_folder": ("data.image_folder", True, "what its images are relative to"),
    "--fraction": ("data.fraction", False, "random share of the eligible samples"),
    "--limit": ("data.limit", False, "at most this many samples"),
    "--max_bad_samples": ("data.max_bad_samples", False, "unusable samples tolerated"),
    "--version": ("teacher.template", True, "prompt template: v1, chat or auto"),
    "--model_max_length": ("teacher.max_length", False, "longest prompt plus answer, in tokens"),
    "--label_source": ("teacher.label_source", True, "greedy (the model's own answers) or data"),
    "--teacher_batch_size": ("teacher.batch_size", False, "samples per teacher forward"),
    "--gates": ("gates.init_from", True, "gates to start from (see dyvte init)"),
    "--gate_architecture": ("gates.architecture", True, "compact or reference, for new gates"),
    "--objective": ("objective.name", True, "expected_risk, safe_label or reference_label"),
    "--lam": ("objective.lam", False, "expected_risk: price of visual compute, in nats"),
    "--num_train_epochs": ("epochs", False, "passes over the samples"),
    "--per_device_train_batch_size": ("batch_size", False, "samples per process and micro-step"),
    "--gradient_accumulation_steps": ("accumulation", False, "micro-steps per optimiser step"),
    "--learning_rate": ("optimizer.learning_rate", False, "peak learning rate"),
    "--lr_scheduler_type": ("optimizer.schedule", True, "cosine, linear or constant"),
    "--warmup_ratio": ("optimizer.warmup_ratio", False, "share of the steps spent warming up"),
    "--weight_decay": ("optimizer.weight_decay", False, "decoupled weight decay"),
    "--max_grad_norm": ("optimizer.max_grad_norm", False, "clipping norm; 0: none"),
    "--logging_steps": ("tracking.log_every", False, "steps between log lines"),
    "--save_steps": ("checkpoint.every_steps", False, "steps between checkpoints"),
    "--save_total_limit": ("checkpoint.keep", False, "checkpoints kept"),
    "--run_name": ("tracking.run_name", True, "name of the run in wandb"),
    "--deepspeed": ("deepspeed", True, "DeepSpeed json (ZeRO stage, offload)"),
    "--output_dir": ("output_dir", True, "everything the run writes"),
    "--trace_dir": ("trace_dir", True, "traces to share between runs"),
    "--seed": ("seed", False, "gates, data order, drawn layers"),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of ``dyvte train``."""
    parser.add_argument("--config", type=Path, help="YAML settings; relative paths in it are relative to it")
    for option, (setting, _, text) in OPTIONS.items():
        parser.add_argument(option, dest=setting, metavar="VALUE", help=f"{text} [{setting}]")
    parser.add_argument(
        "--bf16", nargs="?", const="True", metavar="BOOL", help="backbone in bfloat16 [model.dtype]"
    )
    parser.add_argument(
        "--report_to", metavar="NAMES", help="wandb, tensorboard, all or none; comma-separated"
    )
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="any setting, dotted")
    parser.add_argument("--dry-run", action="store_true", help="print sizes, counts and estimates, and leave")
    parser.add_argument("--local_rank", "--local-rank", type=int, help=argparse.SUPPRESS)  # launchers pass it


def run(args: argparse.Namespace) -> int:
    """Train, print where the gates are and how they fare."""
    import logging

    from dyvte.config import load_config
    from dyvte.training.config import TrainConfig

    cfg = load_config(TrainConfig, args.config, overrides_of(args))
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    logging.getLogger("httpx").setLevel(logging.WARNING)
    if args.dry_run:
        from dyvte.training.dryrun import describe_dry_run, dry_run

        print(describe_dry_run(dry_run(cfg)))
        return 0
    import os

    from dyvte.training.train import train

    result = train(cfg)
    if int(os.environ.get("RANK", "0")) == 0:
        summary = result.summary
        print(
            f"\n{summary['num_samples']} samples, {summary['steps']} steps, "
            f"{summary['parameters']:,} parameters; teacher {summary['trace_seconds']:.0f} s, "
            f"gates {summary['train_seconds']:.0f} s"
        )
        for text in summary["dropped"]:
            print(f"dropped: {text}", file=sys.stderr)
        print(f"\non {summary['num_judged']} {summary['judged_on']}, beside fixed K at the same compute:")
        print(result.table())
        print(f"\ngates: {result.gates}\nnext: dyvte calibrate --gates {result.gates} --budget 0.5 ...")
    return 0


def overrides_of(args: argparse.Namespace) -> list[str]:
    """Options that were given, as overrides; ``--set`` comes last and wins."""
    given = vars(args)
    overrides = []
    for setting, is_text, _ in OPTIONS.values():
        value = given.get(setting)
        if value is not None:
            overrides.append(f"{setting}={json.dumps(value) if is_text else value}")
    if args.bf16 is not None:
        wanted = args.bf16.lower() in ("true", "1", "yes")
        overrides.append(f"model.dtype={'bfloat16' if wanted else 'float32'}")
    if args.report_to is not None:
        names = [name.strip() for name in args.report_to.split(",") if name.strip() not in ("", "none")]
        names = ["wandb", "tensorboard"] if "all" in names else names
        overrides.append(f"tracking.report_to={json.dumps(names)}")
    return overrides + args.set
