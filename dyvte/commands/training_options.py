"""The options of a training configuration, by the names of LLaVA's training scripts too."""

from __future__ import annotations

import argparse
from collections.abc import Collection, Iterable
from typing import TYPE_CHECKING

from dyvte.commands.options import add_settings, config_from

if TYPE_CHECKING:
    from dyvte.tracing import TracingConfig
    from dyvte.training.config import TrainConfig

# setting -> options: short ones, and those of LLaVA's and transformers' training scripts
TRACING_NAMES: dict[str, tuple[str, ...]] = {
    "model.path": (
        "model",
        "model_name_or_path",
    ),
    "data.path": ("data_path",),
    "data.hub_id": ("dataset",),
    "data.image_folder": ("image_folder",),
    "data.turns": ("turns",),
    "data.fraction": ("fraction",),
    "data.limit": ("limit",),
    "data.max_bad_samples": ("max_bad_samples",),
    "teacher.template": ("template",),
    "teacher.max_length": ("model_max_length",),
    "teacher.label_source": ("label_source",),
    "teacher.max_new_tokens": ("max_new_tokens",),
    "teacher.features": ("features",),
    "teacher.batch_size": ("teacher_batch_size",),
    "teacher.exit_every": ("exit_every",),
    "teacher.freeze_every": ("freeze_every",),
    "teacher.memory_budget": ("memory_budget",),
    "teacher.reductions": ("reduction",),
}
TRAINING_NAMES: dict[str, tuple[str, ...]] = {
    **TRACING_NAMES,
    "gates.init_from": ("gates",),
    "gates.architecture": ("gate_architecture",),
    "objective.name": ("objective",),
    "objective.lam": ("lam",),
    "objective.span": ("span",),
    "target.alpha": ("target_alpha",),
    "target.budget": ("target_budget",),
    "epochs": (
        "epochs",
        "num_train_epochs",
    ),
    "batch_size": (
        "batch_size",
        "per_device_train_batch_size",
    ),
    "accumulation": (
        "accumulation",
        "gradient_accumulation_steps",
    ),
    "optimizer.learning_rate": ("learning_rate",),
    "optimizer.schedule": ("lr_scheduler_type",),
    "optimizer.warmup_ratio": ("warmup_ratio",),
    "optimizer.weight_decay": ("weight_decay",),
    "optimizer.max_grad_norm": ("max_grad_norm",),
    "tracking.log_every": ("logging_steps",),
    "tracking.run_name": ("run_name",),
    "tracking.report_to": ("report_to",),
    "checkpoint.every_steps": ("save_steps",),
    "checkpoint.keep": ("save_total_limit",),
    "lora.rank": ("lora_r",),
    "lora.alpha": ("lora_alpha",),
    "lora.dropout": ("lora_dropout",),
    "lora.first_layer": ("lora_first_layer",),
    "lora.first_exit": ("first_exit",),
    "lora.last_exit": ("last_exit",),
    "lora.full_share": ("full_share",),
}


def add_training(parser: argparse.ArgumentParser) -> None:
    """``--config``, ``--set``, an option for every setting of a training, and LLaVA's further ones."""
    from dyvte.training.config import TrainConfig

    add_settings(parser, TrainConfig, TRAINING_NAMES, omit=("lora.enabled",))
    _add_bf16(parser)
    # LLaVA's training script calls the prompt template so.
    parser.add_argument(
        "--version", dest="teacher.template", default=argparse.SUPPRESS, help=argparse.SUPPRESS
    )


def add_tracing(parser: argparse.ArgumentParser, *, omit: Collection[str] = ()) -> None:
    """``--config``, ``--set`` and an option for every setting of a run of the teacher.

    Parameters
    ----------
    parser
        Of the command.
    omit
        Settings without an option.
    """
    from dyvte.tracing import TracingConfig

    add_settings(parser, TracingConfig, TRACING_NAMES, omit=omit)
    _add_bf16(parser)


def config_of(args: argparse.Namespace, extra: Iterable[str] = ()) -> TrainConfig:
    """The training configuration: file, then ``extra``, then options that were given, then ``--set``.

    Parameters
    ----------
    args
        Parsed options.
    extra
        Overrides that options take precedence over.
    """
    from dyvte.training.config import TrainConfig

    return config_from(TrainConfig, args, before=extra, after=_bf16(args))


def tracing_config_of(args: argparse.Namespace, extra: Iterable[str] = ()) -> TracingConfig:
    """What of it a run of the teacher needs; the file may be that of a whole training.

    Parameters
    ----------
    args
        Parsed options.
    extra
        Overrides that options take precedence over.
    """
    from dyvte.tracing import TracingConfig
    from dyvte.training.config import TrainConfig

    return config_from(TracingConfig, args, before=extra, after=_bf16(args), within=TrainConfig)


def _bf16(args: argparse.Namespace) -> list[str]:
    if args.bf16 is None:
        return []
    wanted = args.bf16.lower() in ("true", "1", "yes")
    return [f"model.dtype={'bfloat16' if wanted else 'float32'}"]


def _add_bf16(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--bf16",
        nargs="?",
        const="True",
        metavar="{True,False}",
        help="the backbone in bfloat16, or in float32 [model.dtype]",
    )
