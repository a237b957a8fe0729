"""A user's DeepSpeed file: read, checked, and what it means for the frozen backbone of a teacher pass."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from dyvte.distributed import import_deepspeed
from dyvte.errors import ConfigError
from dyvte.registry import nearest
from dyvte.tracing.config import TracingConfig

ZERO = "zero_optimization"
# Gates, gradients and optimiser state stay in fp32. With a bf16 section DeepSpeed at stage 0 lets a zero
# gradient move Adam; the backbone's own precision is the model's dtype and no concern of the engine.
_DROPPED = ("bf16", "fp16", "amp", "optimizer", "scheduler")
# What DeepSpeed reads at the top of a file; it passes over all else without a word.
_SECTIONS = (
    *(ZERO, *_DROPPED, "train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps"),
    *("gradient_clipping", "prescale_gradients", "gradient_predivide_factor", "communication_data_type"),
    *("activation_checkpointing", "zero_allow_untested_optimizer", "zero_force_ds_cpu_optimizer"),
    *("flops_profiler", "wall_clock_breakdown", "memory_breakdown", "steps_per_print", "dump_state"),
    *("comms_logger", "tensorboard", "wandb", "csv_monitor", "comet", "checkpoint", "data_types", "aio"),
    *("data_efficiency", "torch_autocast", "compile", "timers", "elasticity", "autotuning"),
)


def read_deepspeed(path: Path | None) -> dict[str, Any]:
    """A DeepSpeed JSON file, checked; stage 0 without one.

    ``"auto"`` (a convention of other trainers) is dropped, and DeepSpeed's own default takes its place.
    Sections on precision, optimiser and scheduler are dropped too: they are settings of the run.

    Raises
    ------
    ConfigError
        If the file cannot be read or is no JSON object, names a section that is nearly one of DeepSpeed's, or
        has a ``zero_optimization`` that DeepSpeed does not know how to read.
    """
    if path is None:
        return {ZERO: {"stage": 0}}
    given = _read_json(path)
    for name in given:
        near = nearest(name, _SECTIONS, cutoff=0.8)
        if near and name not in _SECTIONS:
            raise ConfigError(f"{path}: unknown section {name!r}; did you mean {near!r}?")
    if not isinstance(given.get(ZERO, {}), dict):
        raise ConfigError(
            f'{path}: {ZERO}: expected a group of settings such as {{"stage": 2}}, found {given[ZERO]!r}'
        )
    config = _without_auto({name: value for name, value in given.items() if name not in _DROPPED})
    zero = config.setdefault(ZERO, {})
    stage = zero.setdefault("stage", 0)
    if type(stage) is not int or not 0 <= stage <= 3:
        raise ConfigError(f"{path}: {ZERO}.stage: expected 0, 1, 2 or 3, found {stage!r}")
    _check_zero(path, zero)
    return config


def stage_of(config: dict[str, Any]) -> int:
    """The ZeRO stage of a DeepSpeed configuration."""
    return config[ZERO]["stage"]


def shards_backbone(cfg: TracingConfig) -> bool:
    """True where the file asks for stage 3: then the teacher's backbone is sharded."""
    return cfg.deepspeed is not None and stage_of(read_deepspeed(cfg.deepspeed)) == 3


def backbone_engine(cfg: TracingConfig, dtype: str, world_size: int) -> dict[str, Any]:
    """The dictionary for a frozen backbone under ZeRO-3: the file's stage 3 and ``offload_param``.

    Parameters
    ----------
    dtype
        Precision of the weights; the engine must know it before it reads them.
    """
    zero = dict(read_deepspeed(cfg.deepspeed)[ZERO])
    zero.pop("offload_optimizer", None)  # it has none
    # Its replacement for torch's linear would stay behind when the engine is gone.
    zero["memory_efficient_linear"] = False
    config: dict[str, Any] = {
        ZERO: zero,
        "train_micro_batch_size_per_gpu": 1,  # not used: nothing of it is trained
        "train_batch_size": world_size,
        "steps_per_print": 10**9,
    }
    if dtype in ("bfloat16", "float16"):
        config["bf16" if dtype == "bfloat16" else "fp16"] = {"enabled": True}
    return config


def start_engine(file: Path | None, config: dict[str, Any], **arguments: Any) -> Any:
    """``deepspeed.initialize``; the engine.

    Parameters
    ----------
    file
        That the settings come from, for the message.
    config
        The settings.
    **arguments
        Of ``deepspeed.initialize``.

    Raises
    ------
    ConfigError
        If DeepSpeed refuses the settings, naming the file they come from.
    """
    deepspeed = import_deepspeed()
    from deepspeed.runtime.config import DeepSpeedConfigError
    from pydantic import ValidationError

    try:
        return deepspeed.initialize(config=config, **arguments)[0]
    except (DeepSpeedConfigError, ValidationError) as error:
        raise ConfigError(f"{file or 'the run'}: DeepSpeed refuses its settings: {error}") from error


def _check_zero(path: Path, zero: dict[str, Any]) -> None:
    """Let DeepSpeed read the section; where it is not installed, the run says so itself."""
    try:
        import_deepspeed()
    except ConfigError:
        return
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
    from pydantic import ValidationError

    try:
        DeepSpeedZeroConfig(**zero)
    except ValidationError as error:
        wrong = "; ".join(f"{'.'.join(map(str, one['loc']))}: {one['msg']}" for one in error.errors())
        raise ConfigError(f"{path}: {ZERO}: DeepSpeed cannot read it: {wrong}") from error


def _read_json(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{path}: the DeepSpeed file cannot be read ({error})") from error
    except ValueError as error:
        raise ConfigError(f"{path}: the DeepSpeed file is not valid JSON ({error})") from error
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: expected a JSON object of DeepSpeed settings")
    return values


def _without_auto(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _without_auto(item) for name, item in value.items() if item != "auto"}
    return value
