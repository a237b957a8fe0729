"""The DeepSpeed configuration of a run: the user's JSON, completed and made safe for fp32 gates."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from dyvte.errors import ConfigError
from dyvte.training.config import TrainConfig

# The engine's own fields follow from the run's settings; a file may repeat them only as "auto".
_OURS = (
    "train_batch_size",
    "train_micro_batch_size_per_gpu",
    "gradient_accumulation_steps",
    "gradient_clipping",
)
# Gates, gradients and optimiser state stay in fp32. With a bf16 section DeepSpeed at stage 0 lets a zero
# gradient move Adam; the backbone's own precision is the model's dtype and no concern of the engine.
_DROPPED = ("bf16", "fp16", "amp", "optimizer", "scheduler")
_BACKBONE_ONLY = ("offload_param", "offload_optimizer")


def engine_config(cfg: TrainConfig, world_size: int) -> dict[str, Any]:
    """The dictionary for ``deepspeed.initialize``.

    Raises
    ------
    ConfigError
        If the file cannot be read, sets a batch size of its own, or asks for what the objective cannot do.
    """
    given = read_json(cfg.deepspeed) if cfg.deepspeed is not None else {}
    config = _cleaned(given)
    clash = [name for name in _OURS if name in config]
    if clash:
        raise ConfigError(
            f"{cfg.deepspeed}: {', '.join(clash)}: set batch_size, accumulation and max_grad_norm in the "
            'run\'s configuration, and "auto" (or nothing) here'
        )
    zero = config.setdefault("zero_optimization", {})
    zero.setdefault("stage", 0)
    for name in _BACKBONE_ONLY:  # gates are small, and offloaded moments need an optimiser that is compiled
        zero.pop(name, None)
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


def shards_backbone(cfg: TrainConfig) -> bool:
    """True where the file asks for stage 3: then the teacher's backbone is sharded too."""
    return cfg.deepspeed is not None and stage_of(_cleaned(read_json(cfg.deepspeed))) == 3


def backbone_config(cfg: TrainConfig, dtype: str, world_size: int) -> dict[str, Any]:
    """The dictionary for a frozen backbone under ZeRO-3: the file's stage 3 and ``offload_param``.

    Parameters
    ----------
    dtype
        Precision of the weights; the engine must know it before it reads them.
    """
    zero = dict(_cleaned(read_json(cfg.deepspeed)).get("zero_optimization", {}))  # type: ignore[arg-type]
    zero.pop("offload_optimizer", None)  # it has none
    # Its replacement for torch's linear would stay behind when the engine is gone.
    zero["memory_efficient_linear"] = False
    config: dict[str, Any] = {
        "zero_optimization": zero,
        "train_micro_batch_size_per_gpu": 1,  # not used: nothing of it is trained
        "train_batch_size": world_size,
        "steps_per_print": 10**9,
    }
    if dtype in ("bfloat16", "float16"):
        config["bf16" if dtype == "bfloat16" else "fp16"] = {"enabled": True}
    return config


def stage_of(config: dict[str, Any]) -> int:
    """The ZeRO stage of an engine configuration."""
    return int(config.get("zero_optimization", {}).get("stage", 0))


def read_json(path: Path) -> dict[str, Any]:
    """A DeepSpeed JSON file; ConfigError if it is missing or no object."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{path}: the DeepSpeed file cannot be read ({error})") from error
    except ValueError as error:
        raise ConfigError(f"{path}: the DeepSpeed file is not valid JSON ({error})") from error
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: expected a JSON object of DeepSpeed settings")
    return values


def _cleaned(given: dict[str, Any]) -> dict[str, Any]:
    return _without_auto({name: value for name, value in given.items() if name not in _DROPPED})


def _without_auto(value: Any) -> Any:
    """Drop "auto" entries (a convention of other trainers): DeepSpeed's own defaults take their place."""
    if isinstance(value, dict):
        return {name: _without_auto(item) for name, item in value.items() if item != "auto"}
    return value
