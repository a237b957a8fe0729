"""Is this start the same run as the one that the output folder holds?"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from dyvte.config import load_config, to_dict
from dyvte.errors import ConfigError
from dyvte.training.config import TrainConfig

# Settings that may differ between starts: they change how a run is executed or told about, not what it
# computes. The product of batch_size, accumulation and processes is checked against the checkpoint instead.
FREE = (
    "tracking",
    "checkpoint",
    "output_dir",
    "batch_size",
    "accumulation",
    "deepspeed",
    "data.max_bad_samples",
    "data.path",
    "data.hub_id",
    "data.revision",
    "data.streaming",
    "data.follow_links",
    "data.image_folder",
    "model.path",
    "model.adapter",
    "model.device",
    "model.trust_remote_code",
    "teacher.batch_size",
    "teacher.exits_per_chunk",
    "teacher.memory_budget",
    "teacher.try_answers",
    "teacher.shard_batches",
)


def check_same_run(cfg: TrainConfig, stored: Path) -> None:
    """Raise ConfigError listing every setting in which the stored configuration differs from ``cfg``.

    Where data and model lie is free: what they hold is checked by the traces' fingerprints.
    """
    before, now = flat(to_dict(load_config(TrainConfig, stored))), flat(to_dict(cfg))
    changed = [
        f"{name}: {before.get(name)!r} there, {now.get(name)!r} now"
        for name in sorted({**before, **now})
        if before.get(name) != now.get(name) and not _free(name)
    ]
    if changed:
        listed = "\n  ".join(changed)
        raise ConfigError(
            f"{stored.parent} holds a run with other settings:\n  {listed}\nChoose another output_dir (its "
            f"traces can be shared: --set trace_dir={stored.parent / 'trace'}), or remove that folder"
        )


def flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested values by dotted name.

    Parameters
    ----------
    values
        Groups as dictionaries.
    prefix
        Of the names.
    """
    found: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, dict):
            found |= flat(value, f"{prefix}{name}.")
        else:
            found[f"{prefix}{name}"] = value
    return found


def _free(name: str) -> bool:
    return any(name == one or name.startswith(f"{one}.") for one in FREE)
