"""Is this the backbone that these gates, or these traces, were made with?"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from dyvte.backbones.adapter import adapter_parameters
from dyvte.backbones.config_fingerprint import config_fingerprint
from dyvte.backbones.describe import describe, describe_config, unwrap

_SAMPLES_PER_TENSOR = 32


def fingerprint(path_or_model: str | os.PathLike[str] | nn.Module) -> str:
    """Identity of a backbone's architecture, the same from its `config.json` and from the loaded model.

    Two models of equal architecture share it; `weights_digest` tells them apart.

    Parameters
    ----------
    path_or_model
        Folder or hub id of a checkpoint, of which only the config is read, or the model itself.
    """
    if isinstance(path_or_model, nn.Module):
        return config_fingerprint(unwrap(path_or_model).config)
    return describe_config(path_or_model).fingerprint


@torch.no_grad()
def weights_digest(model: nn.Module) -> str | None:
    """Hash of a sample of every decoder weight, rounded to bfloat16: the same for fp32, fp16 and bf16 loads.

    Active PEFT adapters, wherever in the model they are, add a hash of their own: "base+adapter". With the
    adapters switched off it is that of the backbone alone. Adapters merged into the weights change the first
    hash.

    Weights that ZeRO-3 holds in shards are gathered one by one, so every process must call this. Quantised
    weights count as the integers they are stored as: another digest than before, as the answers are others.

    None where weights are not in memory (offloaded to disk).

    Parameters
    ----------
    model
        Loaded, also inside wrappers.
    """
    backbone = describe(model)
    added = {id(tensor) for _, tensor, _ in adapter_parameters(backbone.model)}
    base = tensors_digest(tensor for tensor in backbone.layers.parameters() if id(tensor) not in added)
    active = list(adapter_parameters(backbone.model, active=True))
    if base is None or not active:
        return base
    scaling = torch.tensor([value for _, _, value in active])
    adapter = tensors_digest([*(tensor for _, tensor, _ in active), scaling])
    return None if adapter is None else f"{base}+{adapter}"


@torch.no_grad()
def tensors_digest(tensors: Iterable[Tensor]) -> str | None:
    """Hash of a sample of every tensor, in their order, as `weights_digest` takes it.

    None where one is not in memory.
    """
    samples = []
    for tensor in tensors:
        with _whole(tensor) as weight:
            if weight.is_meta or weight.numel() == 0:
                return None
            flat = weight.reshape(-1)
            step = max(1, flat.numel() // _SAMPLES_PER_TENSOR)
            sample = flat[::step][:_SAMPLES_PER_TENSOR]
            sample = sample.to(torch.bfloat16).view(torch.int16) if sample.is_floating_point() else sample
            samples.append(sample.to(torch.int16).cpu())
    return hashlib.sha256(torch.cat(samples).numpy().tobytes()).hexdigest()[:16]


@contextmanager
def _whole(tensor: Tensor) -> Iterator[Tensor]:
    """A weight's values, also where ZeRO-3 has divided them among processes."""
    if not hasattr(tensor, "ds_id"):
        yield tensor.detach()
        return
    import deepspeed

    with deepspeed.zero.GatheredParameters([tensor]):
        yield tensor.detach()
