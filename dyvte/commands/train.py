"""Train gates: one teacher pass over LLaVA data, then gates from its traces in a DeepSpeed engine.

With --lora: train an adapter of the backbone instead, so that its answers survive an earlier exit.

Settings come from --config (YAML), then from the options here. Options are spelled with - or _, as in LLaVA's
and DyVTE's training scripts. The same command started again goes on where it stopped.

--lora distils a LoRA adapter (PEFT) of the decoder's deeper layers: the adapted model, its visual tokens gone
after a layer drawn for each row from first_exit..last_exit, learns to answer as the model without adapter and
with all its visual tokens does. Nothing else is changed. The run prints how every fixed exit fares before and
after on held-out images, and leaves an ordinary PEFT checkpoint in OUTPUT_DIR/adapter: give it with --adapter
to trace, train (gates of their own), search-k and eval, or load it with peft. epochs, batch_size and
learning_rate mean the same as for gates, but here every step runs the backbone: one to three epochs, small
batches.
"""

from __future__ import annotations

import argparse
import os
import sys
from typing import TYPE_CHECKING

from dyvte.commands.training_options import add_training, config_of

if TYPE_CHECKING:
    from dyvte.distributed import Launch
    from dyvte.training.config import TrainConfig
    from dyvte.training.lora.train import LoraResult
    from dyvte.training.train import TrainResult


EXAMPLES = """
dyvte train --config configs/llava_v1_5_7b.yaml --output_dir runs/7b
dyvte train --model_name_or_path llava-hf/llava-1.5-7b-hf --data_path llava_v1_5_mix665k.json \\
    --image_folder data --output_dir runs/7b --bf16 True --fraction 0.01
dyvte train --lora --config configs/embedded_lora.yaml
dyvte train --lora --model_name_or_path llava-hf/llava-1.5-7b-hf --data_path llava_v1_5_mix665k.json \\
    --image_folder data --output_dir runs/7b-lora --bf16 True --fraction 0.01 --num_train_epochs 1 \\
    --per_device_train_batch_size 4 --learning_rate 2e-4 --first_exit 8 --last_exit 31
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of ``dyvte train``."""
    parser.add_argument(
        "--lora", action="store_true", help="train an adapter in place of gates [lora.enabled]"
    )
    parser.add_argument("--dry-run", action="store_true", help="print sizes, counts and estimates, and exit")
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)  # launchers pass it
    add_training(parser)


def run(args: argparse.Namespace) -> int:
    """Train, print where the gates are and how they fare."""
    import logging
    import warnings

    from dyvte.distributed import launch

    cfg = config_of(args, ["lora.enabled=true"] if args.lora else [])
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    logging.getLogger("httpx").setLevel(logging.WARNING)
    # One for every collective of ZeRO-3; DeepSpeed's to mend.
    warnings.filterwarnings("ignore", r"`torch\.distributed\..*is deprecated", FutureWarning)
    started = launch()
    if cfg.lora.enabled:
        return _run_lora(cfg, args.dry_run, started)
    if args.dry_run:
        from dyvte.training.dryrun import dry_run

        if started.rank == 0:
            print(dry_run(cfg, started.world_size))
        return 0
    from dyvte.training.train import train

    result = train(cfg)
    if started.rank == 0:
        _print_result(result)
    if started.world_size > 1:
        # With ZeRO-3, DeepSpeed's threads may abort the interpreter on its way out, after all work is done.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)
    return 0


def _run_lora(cfg: TrainConfig, dry: bool, started: Launch) -> int:
    from dyvte.training.lora.dryrun import lora_dry_run
    from dyvte.training.lora.train import train_lora

    if dry:
        if started.rank == 0:
            print(lora_dry_run(cfg, started.world_size))
        return 0
    result = train_lora(cfg)
    if started.rank == 0:
        _print_lora(result)
    return 0


def _print_lora(result: LoraResult) -> None:
    summary = result.summary
    first, last = summary.record.layers_adapted
    sizes = f"{summary.parameters:,} parameters in layers {first}..{last}"
    print(f"\n{summary.record.num_samples} samples, {summary.record.steps} steps, {sizes}")
    print(f"answers {summary.answer_seconds:.0f} s, training {summary.train_seconds:.0f} s")
    for text in summary.dropped:
        print(f"dropped: {text}", file=sys.stderr)
    print(f"\non {summary.num_judged} {summary.judged_on}, against the full model without the adapter:")
    print(result.table())
    print(f"\nadapter: {result.adapter}\nnext: dyvte train --adapter {result.adapter} ... for gates on it")


def _print_result(result: TrainResult) -> None:
    summary = result.summary
    record = summary.record
    print(f"\n{record.num_samples} samples, {record.steps} steps, {summary.parameters:,} parameters")
    print(f"teacher {summary.trace_seconds:.0f} s, gates {summary.train_seconds:.0f} s")
    for text in summary.dropped:
        print(f"dropped: {text}", file=sys.stderr)
    if result.choice is not None:
        print(f"\n{result.choice.table()}")
    print(f"\non {summary.num_judged} {summary.judged_on}, beside fixed K at the same compute:")
    print(result.table())
    exits = ", ".join(f"{k} ({share:.0%})" for k, share in enumerate(summary.exit_rate) if share)
    print(f"at threshold 0.5 they leave after layer {exits}")
    print(f"\ngates: {result.gates}\nnext: dyvte calibrate --gates {result.gates} --budget 0.5 ...")
