"""Small models that vLLM's attention on a CPU takes: the embedded backbone with wider heads, random ones."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoProcessor, LlavaForConditionalGeneration

HEAD_SIZE = 64
_PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj")


def write_padded(source: Path, folder: Path) -> Path:
    """The LLaVA at ``source`` in float32 with heads of size 64, zeros in new dimensions: the same answers.

    A head of size d turns dimension i with i + d / 2, by an angle that falls with i / d. In the wider head
    they are i and i + 32, and a larger base makes the angles what they were.
    """
    model = LlavaForConditionalGeneration.from_pretrained(source, dtype=torch.float32)
    config, text = model.config, model.config.text_config
    old = text.head_dim
    turned = torch.cat([torch.arange(old // 2), torch.arange(old // 2) + HEAD_SIZE // 2])
    plain = torch.arange(old)
    weights = model.state_dict()
    for name, tensor in weights.items():
        if "language_model" not in name or not any(part in name for part in _PROJECTIONS):
            continue
        if "o_proj" in name:
            weights[name] = _widened(tensor.t(), old, plain).t().contiguous()
        else:
            # attention divides by the root of the head's size
            scale = (HEAD_SIZE / old) ** 0.5 if "q_proj" in name else 1.0
            weights[name] = _widened(tensor * scale, old, plain if "v_proj" in name else turned)
    text.head_dim = HEAD_SIZE
    text.rope_parameters["rope_theta"] **= HEAD_SIZE / old
    config.dtype = torch.float32
    padded = LlavaForConditionalGeneration(config)
    padded.load_state_dict(weights)
    padded.generation_config = model.generation_config
    padded.save_pretrained(folder)
    AutoProcessor.from_pretrained(source).save_pretrained(folder)
    return folder


def _widened(rows: Tensor, old: int, places: Tensor) -> Tensor:
    """(heads x old, D) to (heads x 64, D)."""
    heads = rows.unflatten(0, (-1, old))
    wide = heads.new_zeros(len(heads), HEAD_SIZE, heads.shape[-1])
    wide[:, places] = heads
    return wide.flatten(0, 1)
