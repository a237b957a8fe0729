"""Options that name settings of a training configuration; shared by the commands that read one."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from dyvte.training.config import TrainConfig

# option -> (setting, is the value text?, help). Names with underscores are those of LLaVA's training scripts.
MODEL_AND_DATA: dict[str, tuple[str, bool, str]] = {
    "--model_name_or_path": ("model.path", True, "backbone: folder or hub id"),
    "--adapter": ("model.adapter", True, "PEFT adapter on the backbone: folder or hub id"),
    "--attn_implementation": ("model.attn_implementation", True, "sdpa, eager or flash_attention_2"),
    "--image_padding": ("model.image_padding", True, "pad images to a square: auto, square or none"),
    "--data_path": ("data.path", True, "conversations: .json, .jsonl, .parquet or a dataset folder"),
    "--dataset": ("data.hub_id", True, "conversations from a hub dataset instead"),
    "--image_folder": ("data.image_folder", True, "what its images are relative to"),
    "--turns": ("data.turns", True, "single (one-exchange conversations), first or all exchanges"),
    "--fraction": ("data.fraction", False, "random share of the eligible samples"),
    "--limit": ("data.limit", False, "at most this many samples"),
    "--max_bad_samples": ("data.max_bad_samples", False, "unusable samples tolerated"),
    "--version": ("teacher.template", True, "prompt template: v1, chat or auto"),
    "--model_max_length": ("teacher.max_length", False, "longest prompt plus answer, in tokens"),
    "--label_source": ("teacher.label_source", True, "greedy (the model's own answers) or data"),
    "--max_new_tokens": ("teacher.max_new_tokens", False, "longest greedy answer"),
    "--features": (
        "teacher.features",
        True,
        "what gates read, comma-separated: mean_prompt, last_prompt, mean_visual, last_visual",
    ),
    "--deepspeed": ("deepspeed", True, "DeepSpeed json (ZeRO stage, offload); stage 3 shards the backbone"),
    "--teacher_batch_size": ("teacher.batch_size", False, "samples per teacher forward"),
    "--exit_every": ("teacher.exit_every", False, "label every m-th exit only; gates elsewhere stay closed"),
    "--memory_budget": ("teacher.memory_budget", False, "GiB of a teacher forward beside the weights"),
}
# For commands whose --reduction is this setting.
REDUCED: dict[str, tuple[str, bool, str]] = {
    "--reduction": (
        "teacher.reductions",
        True,
        "what is spent on visual tokens before they leave, such as fastv:2:0.5; gates learn on that backbone",
    ),
}
TRAINING: dict[str, tuple[str, bool, str]] = {
    "--gates": ("gates.init_from", True, "gates to start from (see dyvte init)"),
    "--gate_architecture": ("gates.architecture", True, "compact, shared or reference, for new gates"),
    "--objective": ("objective.name", True, "expected_risk, safe_label or reference_label"),
    "--lam": ("objective.lam", False, "expected_risk: price of visual compute, in nats"),
    "--span": ("objective.span", False, "expected_risk: range of prices that the thresholds learn for"),
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
    "--output_dir": ("output_dir", True, "everything the run writes"),
    "--trace_dir": ("trace_dir", True, "traces to share between runs"),
    "--seed": ("seed", False, "gates, data order, drawn layers"),
}
LORA: dict[str, tuple[str, bool, str]] = {
    "--lora_r": ("lora.rank", False, "rank of the updates"),
    "--lora_alpha": ("lora.alpha", False, "updates are scaled by alpha / rank"),
    "--lora_dropout": ("lora.dropout", False, "dropout on the adapters' input"),
    "--lora_first_layer": ("lora.first_layer", False, "first adapted layer, 1..L; default: first_exit + 1"),
    "--first_exit": ("lora.first_exit", False, "earliest exit drawn while training; default: L / 4"),
    "--last_exit": ("lora.last_exit", False, "latest exit drawn; default: L - 1; the same K twice: fixed"),
    "--full_share": ("lora.full_share", False, "share of rows trained without an exit"),
}
_ALL = {**MODEL_AND_DATA, **REDUCED, **TRAINING, **LORA}


def add_settings(parser: argparse.ArgumentParser, options: Iterable[str]) -> None:
    """``--config``, the named options, ``--bf16`` and ``--set``."""
    parser.add_argument(
        "--config", type=Path, help="training settings (see configs/); paths in it are relative to it"
    )
    add_options(parser, options)
    parser.add_argument(
        "--bf16", nargs="?", const="True", metavar="BOOL", help="backbone in bfloat16 [model.dtype]"
    )
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="any setting, dotted")


def add_options(parser: argparse._ActionsContainer, options: Iterable[str]) -> None:
    """The named options alone."""
    for option in options:
        setting, _, text = _ALL[option]
        parser.add_argument(option, dest=setting, metavar="VALUE", help=f"{text} [{setting}]")


def config_of(args: argparse.Namespace, extra: Iterable[str] = ()) -> TrainConfig:
    """The training configuration: file, then ``extra``, then options that were given, then ``--set``."""
    from dyvte.config import load_config
    from dyvte.training.config import TrainConfig

    given = vars(args)
    overrides = list(extra)
    for setting, is_text, _ in _ALL.values():
        value = given.get(setting)
        if value is not None:
            if setting == "teacher.features":
                value = value.split(",")
            overrides.append(f"{setting}={json.dumps(value) if is_text else value}")
    if args.bf16 is not None:
        wanted = args.bf16.lower() in ("true", "1", "yes")
        overrides.append(f"model.dtype={'bfloat16' if wanted else 'float32'}")
    return load_config(TrainConfig, args.config, [*overrides, *args.set])
