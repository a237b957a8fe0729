"""A gates checkpoint on disk: `gate_config.json`, `gates.safetensors`, and `groups.safetensors` where
thresholds were calibrated by group; each file is written whole or not at all."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from dyvte.errors import CheckpointError, DyvteError
from dyvte.files import write_atomically
from dyvte.gates.config import CONFIG_FILE, GateConfig
from dyvte.gates.groups import GroupFinder

WEIGHTS_FILE = "gates.safetensors"
GROUPS_FILE = "groups.safetensors"
# Layers, or units of a layer, of the largest backbone that a configuration may speak of.
_LARGEST = 1_000_000


def read_checkpoint(folder: str | os.PathLike[str]) -> tuple[GateConfig, dict[str, Tensor] | None]:
    """Config and tensors of a checkpoint folder or hub repository; no tensors: a fixed exit.

    Raises
    ------
    CheckpointError
        If there is no checkpoint, or a file of it cannot be read.
    """
    path = _local_folder(folder)
    if not (path / CONFIG_FILE).is_file():
        raise CheckpointError(
            f"no {CONFIG_FILE} in {path}: this is not a dyvte gates checkpoint (see `dyvte init`)"
        )
    config = _read_config(path / CONFIG_FILE)
    weights = path / WEIGHTS_FILE
    if not weights.is_file():
        return config, None
    return config, _read_tensors(weights)


def read_groups(folder: str | os.PathLike[str], config: GateConfig) -> GroupFinder | None:
    """What tells rows' groups in a checkpoint; None where it has no groups.

    Parameters
    ----------
    folder
        Of the checkpoint, or its repository on the hub.
    config
        Of the same checkpoint.

    Raises
    ------
    CheckpointError
        If it has groups and their file is missing, does not fit, or is of another calibration.
    """
    if config.groups is None:
        return None
    path = _local_folder(folder) / GROUPS_FILE
    if not path.is_file():
        raise CheckpointError(
            f"{folder}: {CONFIG_FILE} has thresholds by group, but there is no {GROUPS_FILE}: copy it along, "
            "or calibrate again"
        )
    try:
        finder = GroupFinder.of(_read_tensors(path), config.feature_size, len(config.groups.names))
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from error
    if config.groups.finder and config.groups.finder != finder.digest():
        raise CheckpointError(
            f"{path} is not what the thresholds of {CONFIG_FILE} were certified with: one of the two is of "
            "another calibration, or one was stopped half-way; calibrate again"
        )
    return finder


def write_groups(folder: str | os.PathLike[str], finder: GroupFinder | None) -> None:
    """Write `groups.safetensors`, or take away the one that is there.

    Parameters
    ----------
    folder
        Of the checkpoint.
    finder
        What tells groups; None: there are none.
    """
    from safetensors.torch import save

    path = Path(folder) / GROUPS_FILE
    if finder is None:
        path.unlink(missing_ok=True)
        return
    plain = {name: tensor.detach().float().cpu().contiguous() for name, tensor in finder.tensors().items()}
    _write(path, save(plain, metadata={"format": "pt"}))


def _read_tensors(path: Path) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except SafetensorError as error:
        raise CheckpointError(f"{path} is not a readable safetensors file: {error}") from error


def _read_config(path: Path) -> GateConfig:
    try:
        config = GateConfig.from_json(path.read_text(encoding="utf-8"))
    except DyvteError as error:
        raise type(error)(f"{path}: {error}") from error
    except (OSError, TypeError, ValueError, AttributeError, OverflowError, RecursionError) as error:
        raise CheckpointError(f"{path} is not a readable gates configuration: {error}") from error
    sizes = {"num_layers": config.num_layers, "hidden_size": config.hidden_size}
    for name, value in sizes.items():
        if type(value) is not int or not 1 <= value <= _LARGEST:
            raise CheckpointError(f"{path}: {name} is {value!r}: expected a whole number in 1..{_LARGEST}")
    return config


def write_checkpoint(
    folder: str | os.PathLike[str], config: GateConfig, tensors: Mapping[str, Tensor]
) -> None:
    """Weights first, config last: a folder with a config is complete.

    Parameters
    ----------
    folder
        Made if need be.
    config
        Of the gates.
    tensors
        Their weights by name.
    """
    from safetensors.torch import save

    plain = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    _write(Path(folder) / WEIGHTS_FILE, save(plain, metadata={"format": "pt"}))
    save_config(config, folder)


def save_config(config: GateConfig, folder: str | os.PathLike[str]) -> None:
    """Write `gate_config.json` alone: after calibration, or for a fixed exit without gates.

    Parameters
    ----------
    config
        Of the gates.
    folder
        Made if need be.
    """
    _write(Path(folder) / CONFIG_FILE, config.to_json())


def _local_folder(folder: str | os.PathLike[str]) -> Path:
    path = Path(folder)
    if path.is_dir():
        return path
    if path.is_file() or str(folder).count("/") != 1 or str(folder).startswith((".", "/", "~")):
        raise CheckpointError(f"no gates checkpoint folder at {folder}")
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(str(folder), allow_patterns=[CONFIG_FILE, WEIGHTS_FILE, GROUPS_FILE]))
    except Exception as error:
        raise CheckpointError(
            f"{folder} is neither a local folder nor a repository the hub gave: {error}"
        ) from error


def _write(path: Path, content: bytes | str) -> None:
    try:
        write_atomically(path, content)
    except OSError as error:
        raise CheckpointError(f"cannot write to {path}: {error}") from error
