"""A gates checkpoint on disk: `gate_config.json` and `gates.safetensors`; written whole or not at all."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from dyvte.errors import CheckpointError, DyvteError
from dyvte.files import write_atomically
from dyvte.gates.config import CONFIG_FILE, GateConfig

WEIGHTS_FILE = "gates.safetensors"
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
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return config, load_file(weights)
    except SafetensorError as error:
        raise CheckpointError(f"{weights} is not a readable safetensors file: {error}") from error


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
        return Path(snapshot_download(str(folder), allow_patterns=[CONFIG_FILE, WEIGHTS_FILE]))
    except Exception as error:
        raise CheckpointError(
            f"{folder} is neither a local folder nor a repository the hub gave: {error}"
        ) from error


def _write(path: Path, content: bytes | str) -> None:
    try:
        write_atomically(path, content)
    except OSError as error:
        raise CheckpointError(f"cannot write to {path}: {error}") from error
