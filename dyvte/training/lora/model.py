"""The adapter of an exit-aware distillation: put on the backbone, and saved as a PEFT checkpoint."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from dyvte.backbones import describe
from dyvte.backbones.adapter import LORA_RECORD, import_peft, wrapping_quietly
from dyvte.errors import ConfigError
from dyvte.files import publish_folder, write_atomically
from dyvte.training.lora.config import LoraConfig


def add_adapter(model: nn.Module, cfg: LoraConfig, seed: int) -> Any:
    """``model`` inside a ``PeftModel`` with a new adapter that changes nothing yet; all else stays frozen.

    Parameters
    ----------
    model
        The backbone.
    cfg
        Of the adapter.
    seed
        Of its weights.

    Raises
    ------
    ConfigError
        If layers or target modules are not those of the backbone.
    """
    peft = import_peft()
    pattern = target_pattern(model, cfg)
    settings = peft.LoraConfig(
        r=cfg.rank, lora_alpha=cfg.alpha, lora_dropout=cfg.dropout, target_modules=pattern, bias="none"
    )
    with torch.random.fork_rng(), wrapping_quietly():
        torch.manual_seed(seed)
        return peft.get_peft_model(model.requires_grad_(False), settings).eval()


def target_pattern(model: nn.Module, cfg: LoraConfig) -> str:
    """Regular expression of the full names of all adapted modules.

    Full names, because a vision tower often has layers and modules of the same short names.

    Parameters
    ----------
    model
        The backbone.
    cfg
        Of the adapter.
    """
    backbone = describe(model)
    numbers = cfg.layers(backbone.num_layers)
    stack = next(name for name, module in backbone.model.named_modules() if module is backbone.layers)
    found: set[str] = set()
    for number in numbers:
        for name, module in backbone.layers[number - 1].named_modules():
            if isinstance(module, nn.Linear):
                found.add(name.rpartition(".")[2])
    wanted = set(cfg.target_modules) or found
    if unknown := sorted(wanted - found):
        raise ConfigError(
            f"lora.target_modules {unknown}: the decoder layers have the linear modules {sorted(found)}"
        )
    layers = "|".join(str(number - 1) for number in numbers)
    return rf"{re.escape(stack)}\.({layers})\.(.*\.)?({'|'.join(sorted(map(re.escape, wanted)))})"


def trainable(model: nn.Module) -> list[nn.Parameter]:
    """What is trained: the adapter's parameters."""
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def save_adapter(model: Any, folder: Path, record: Mapping[str, Any]) -> None:
    """Write an ordinary PEFT checkpoint and dyvte's record of its training; whole or not there.

    Parameters
    ----------
    model
        With the adapter.
    folder
        Of the checkpoint.
    record
        How it came about, JSON-ready.
    """
    writing = folder.with_name(f".{folder.name}.tmp")
    shutil.rmtree(writing, ignore_errors=True)
    model.save_pretrained(str(writing), save_embedding_layers=False)
    write_atomically(writing / LORA_RECORD, json.dumps(record, indent=2) + "\n")
    publish_folder(writing, folder)  # in place of that of a start that was killed before its summary
