"""Is this the backbone that these gates, or these traces, were made with?"""

from __future__ import annotations

import hashlib
import json
import os
from typing import Any

import torch
from torch import nn

# Fields that change how a model is run or stored, not what it is.
_INCIDENTAL = {
    "_name_or_path",
    "_attn_implementation",
    "_attn_implementation_internal",
    "attn_implementation",
    "architectures",
    "auto_map",
    "dtype",
    "experts_implementation",
    "gradient_checkpointing",
    "name_or_path",
    "output_attentions",
    "output_hidden_states",
    "quantization_config",
    "return_dict",
    "torch_dtype",
    "transformers_version",
    "use_cache",
}
_SAMPLES_PER_TENSOR = 32


def fingerprint(path_or_model: str | os.PathLike[str] | nn.Module) -> str:
    """Identity of a backbone's architecture, the same from its `config.json` and from the loaded model.

    Two models of equal architecture share it; `weights_digest` tells them apart.
    """
    if isinstance(path_or_model, nn.Module):
        from .describe import unwrap

        return config_fingerprint(unwrap(path_or_model).config)
    from .describe import describe_config

    return describe_config(path_or_model).fingerprint


def config_fingerprint(config: Any) -> str:
    """Hash of a transformers config without the fields that only say how it is run."""
    text = json.dumps(_essential(config.to_dict()), sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


@torch.no_grad()
def weights_digest(model: nn.Module) -> str | None:
    """Hash of a sample of every decoder weight, rounded to bfloat16: the same for fp32, fp16 and bf16 loads.

    None where the weights are not plain floating-point tensors in memory (quantised, offloaded, sharded).
    """
    from .describe import describe

    samples = []
    for parameter in describe(model).layers.parameters():
        if not parameter.is_floating_point() or parameter.is_meta or parameter.numel() == 0:
            return None
        flat = parameter.detach().reshape(-1)
        step = max(1, flat.numel() // _SAMPLES_PER_TENSOR)
        samples.append(flat[::step][:_SAMPLES_PER_TENSOR].to(torch.bfloat16).cpu())
    return hashlib.sha256(torch.cat(samples).view(torch.int16).numpy().tobytes()).hexdigest()[:16]


def _essential(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(k): _essential(v) for k, v in value.items() if k not in _INCIDENTAL}
    if isinstance(value, (list, tuple)):
        return [_essential(v) for v in value]
    return value
