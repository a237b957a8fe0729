"""What the tiny families share: text and vision sizes, ids of rows with and without images, noise."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

PAD, BOS, EOS, IMAGE, START, END, VIDEO = range(7)
TEXT = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "initializer_range": 0.15,
    "bos_token_id": BOS,
    "eos_token_id": EOS,
    "pad_token_id": PAD,
}
CLIP = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 16,
    "patch_size": 4,
    "initializer_range": 0.15,
}
Built = tuple[Any, dict[str, torch.Tensor], tuple[int, ...]]
SIGLIP = {"model_type": "siglip_vision_model", **CLIP, "vision_use_head": False}
MROPE = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 10000.0}


def _finish(model: Any) -> Any:
    model.generation_config.suppress_tokens = [IMAGE, START, END, VIDEO]
    model.generation_config.pad_token_id = PAD
    model.generation_config.eos_token_id = None
    return model.requires_grad_(False).eval()


def make(kind: Any, config: Any) -> Any:
    """A frozen model of seeded random weights that never says a placeholder."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return _finish(kind(config))


def ids_of(rows: Sequence[Sequence[int | Sequence[int]]]) -> dict[str, torch.Tensor]:
    """Left-padded ids and mask; a row holds numbers of random text tokens, and runs that stand for images."""
    generator = torch.Generator().manual_seed(1)
    lines = []
    for row in rows:
        line: list[int] = []
        for part in row:
            text = isinstance(part, int)
            line += torch.randint(7, 64, (part,), generator=generator).tolist() if text else part
        lines.append(line)
    width = max(map(len, lines))
    ids = torch.tensor([[PAD] * (width - len(line)) + line for line in lines])
    mask = torch.tensor([[0] * (width - len(line)) + [1] * len(line) for line in lines])
    return {"input_ids": ids, "attention_mask": mask}


def one_none_two(
    alone: list[int], first: list[int] | None = None, second: list[int] | None = None
) -> dict[str, torch.Tensor]:
    """Rows with one image, none and two; a run is what an image becomes, alone or as one of two."""
    first = first or alone
    return ids_of([[3, alone, 6], [7], [2, first, 3, second or first, 5]])


def noise(*shape: int) -> torch.Tensor:
    """Pixels."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(2))
