"""A random LLaVA in the published proportions, its inputs, and exits for it.

Proportions: 35 tokens before the image, 576 visual tokens, 40 after. Weights and inputs are random.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import torch
import transformers
from common import IMAGE_ID, PREFIX, TOKENS, VISUAL

import dyvte
from dyvte.gates import GateConfig, GateStack
from dyvte.policies import OraclePolicy

Inputs = dict[str, torch.Tensor]


def build_model(args: argparse.Namespace) -> torch.nn.Module:
    """A LLaVA of the asked decoder size behind a vision tower too small to matter."""
    vision = transformers.CLIPVisionConfig(
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=1,
        image_size=336,
        patch_size=14,
    )
    heads = max(1, args.hidden // (128 if args.hidden >= 4096 else 64))
    text = transformers.LlamaConfig(
        vocab_size=args.vocabulary,
        hidden_size=args.hidden,
        intermediate_size=int(args.hidden * 11008 / 4096) // 64 * 64,
        num_hidden_layers=args.layers,
        num_attention_heads=heads,
        num_key_value_heads=args.key_heads or heads,
        max_position_embeddings=4096,
    )
    config = transformers.LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_id=IMAGE_ID,
        vision_feature_layer=-1,
        image_seq_length=VISUAL,
    )
    config._attn_implementation = args.attention
    torch.manual_seed(0)
    model = transformers.LlavaForConditionalGeneration(config).to(getattr(torch, args.dtype))
    return model.eval().requires_grad_(False).to(args.device)


def make_inputs(model: torch.nn.Module, rows: int, more_text: int = 0) -> Inputs:
    """Equal rows of random text and pixels; `more_text` tokens are added behind."""
    ids = torch.randint(10, model.config.text_config.vocab_size, (rows, TOKENS + more_text))
    ids[:, PREFIX : PREFIX + VISUAL] = IMAGE_ID
    pixels = torch.randn(rows, 3, 336, 336, dtype=model.dtype)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": pixels}
    return {name: value.to(model.device) for name, value in inputs.items()}


def oracle(exits: Sequence[int], freezes: Sequence[int] | None = None) -> dyvte.VisualExit:
    """Each row freezes and leaves where it is told; without freezes it is updated until it leaves."""
    return dyvte.VisualExit.from_policy(OraclePolicy(list(exits), None if freezes is None else list(freezes)))


def spread_exits(rows: int, layers: int) -> list[int]:
    """Exits spread evenly over the layers; the last row never leaves."""
    return [max(1, layers * (row + 1) // rows) for row in range(rows)]


def silent_gates(model: torch.nn.Module, *, freeze_head: bool = False) -> dyvte.VisualExit:
    """All gates run and none fires."""
    never = {"freeze_head": True, "freeze_threshold": 1.0} if freeze_head else {}
    return _gates(model, threshold=1.0, **never)


def gates_that_fire_at(k: int, model: torch.nn.Module) -> dyvte.VisualExit:
    """Gates 1..k are asked, and gate k sends every row away."""
    layers = model.get_decoder().config.num_hidden_layers
    return _gates(model, offsets=tuple(-1e4 if layer < k else 1e4 for layer in range(1, layers + 1)))


def _gates(model: torch.nn.Module, **fields: Any) -> dyvte.VisualExit:
    text = model.get_decoder().config
    config = GateConfig(num_layers=text.num_hidden_layers, hidden_size=text.hidden_size, **fields)
    return dyvte.VisualExit(GateStack.init(config).to(model.device))


def inside(model: torch.nn.Module, exits: dyvte.VisualExit | None) -> Any:
    """The exits' block, or none."""
    return nullcontext() if exits is None else exits(model)
