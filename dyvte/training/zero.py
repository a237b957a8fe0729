"""DeepSpeed's engine for gates or adapters: the user's file, completed and made safe for fp32 weights."""

from __future__ import annotations

from typing import Any

from dyvte.errors import ConfigError
from dyvte.tracing.zero import ZERO, read_deepspeed, stage_of
from dyvte.training.config import TrainConfig

# The engine's own fields follow from the run's settings; a file may repeat them only as "auto".
_OURS = (
    "train_batch_size",
    "train_micro_batch_size_per_gpu",
    "gradient_accumulation_steps",
    "gradient_clipping",
)
_BACKBONE_ONLY = ("offload_param", "offload_optimizer")


def engine_config(cfg: TrainConfig, world_size: int) -> dict[str, Any]:
    """The dictionary for ``deepspeed.initialize``.

    Parameters
    ----------
    cfg
        Of the run.
    world_size
        Number of processes.

    Raises
    ------
    ConfigError
        If the file cannot be read, sets a batch size of its own, or asks for what the objective cannot do.
    """
    config = read_deepspeed(cfg.deepspeed)
    clash = [name for name in _OURS if name in config]
    if clash:
        raise ConfigError(
            f"{cfg.deepspeed}: {', '.join(clash)}: set batch_size, accumulation and max_grad_norm in the "
            'run\'s configuration, and "auto" (or nothing) here'
        )
    for name in _BACKBONE_ONLY:  # gates are small, and offloaded moments need an optimiser that is compiled
        config[ZERO].pop(name, None)
    if cfg.objective.one_layer_per_step and stage_of(config) > 0:
        raise ConfigError(
            "one_layer_per_step needs ZeRO stage 0: at higher stages Adam also moves gates that were not "
            "drawn"
        )
    config.update(
        train_batch_size=cfg.batch_size * cfg.accumulation * world_size,
        train_micro_batch_size_per_gpu=cfg.batch_size,
        gradient_accumulation_steps=cfg.accumulation,
        gradient_clipping=cfg.optimizer.max_grad_norm,
        steps_per_print=10**9,
    )
    return config
