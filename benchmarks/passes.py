"""What is timed: prefills, layers called directly, decode steps."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import transformers
from common import FILLER_ID, PREFIX, TEXT, TOKENS, VISUAL, now
from random_llava import Inputs, inside

import dyvte


def prefill(model: torch.nn.Module, inputs: Inputs) -> Any:
    """One prefill up to the first token's logits; its cache."""
    return model(**inputs, use_cache=True, logits_to_keep=1).past_key_values


def prefill_pass(
    model: torch.nn.Module, inputs: Inputs, exits: dyvte.VisualExit | None = None
) -> Callable[[], None]:
    """A prefill with a K/V cache, stock or inside an exit block."""

    def run() -> None:
        with inside(model, exits):
            prefill(model, inputs)

    return run


def layer_pass(model: torch.nn.Module, rows: int, tokens: int, first: int, last: int) -> Callable[[], None]:
    """Layers first..last-1 called directly on `tokens` tokens, with a K/V cache."""
    decoder = model.get_decoder()
    states = torch.randn(rows, tokens, decoder.config.hidden_size, dtype=model.dtype, device=model.device)
    positions = torch.arange(tokens, device=model.device)[None]
    rotary = decoder.rotary_emb(states, positions)
    mask = transformers.masking_utils.create_causal_mask(decoder.config, states, None, None)

    def run() -> None:
        cache = transformers.DynamicCache(config=decoder.config)
        hidden = states
        for layer in decoder.layers[first:last]:
            hidden = layer(
                hidden,
                attention_mask=mask,
                position_ids=positions,
                past_key_values=cache,
                use_cache=True,
                position_embeddings=rotary,
            )

    return run


class _Inserting:
    """A cache that puts an image's keys and values between those of the text before and behind it."""

    def __init__(self, cache: Any, keys: torch.Tensor, values: torch.Tensor) -> None:
        self.cache, self.visual = cache, (keys, values)

    def update(
        self, keys: torch.Tensor, values: torch.Tensor, *more: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        whole = [
            torch.cat((text[:, :, :PREFIX], visual, text[:, :, PREFIX:]), 2)
            for text, visual in zip((keys, values), self.visual, strict=True)
        ]
        return self.cache.update(*whole, *more)


def frozen_pass(model: torch.nn.Module, rows: int, first: int, last: int) -> Callable[[], None]:
    """Layers first..last-1 called directly on the text, with a K/V cache; of the image, which never changes,
    each layer's input norm and its key and value projections alone."""
    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

    decoder, device = model.get_decoder(), model.device
    text, visual = (
        torch.randn(rows, tokens, decoder.config.hidden_size, dtype=model.dtype, device=device)
        for tokens in (TEXT, VISUAL)
    )
    everywhere = torch.arange(TOKENS, device=device)[None]
    is_visual = (everywhere >= PREFIX) & (everywhere < PREFIX + VISUAL)
    positions = everywhere[~is_visual][None]
    cos, sin = decoder.rotary_emb(visual, everywhere[is_visual][None])
    rotary = decoder.rotary_emb(text, positions)
    mask = (everywhere <= positions[0, :, None])[None, None]
    heads = (rows, VISUAL, -1, decoder.layers[0].self_attn.head_dim)

    def run() -> None:
        cache = transformers.DynamicCache(config=decoder.config)
        hidden = text
        for layer in decoder.layers[first:last]:
            attention, normed = layer.self_attn, layer.input_layernorm(visual)
            keys, values = (
                one(normed).view(heads).transpose(1, 2) for one in (attention.k_proj, attention.v_proj)
            )
            _, keys = apply_rotary_pos_emb(keys[:, :1], keys, cos, sin)
            hidden = layer(
                hidden,
                attention_mask=mask,
                position_ids=positions,
                past_key_values=_Inserting(cache, keys, values),
                use_cache=True,
                position_embeddings=rotary,
            )

    return run


def rest_pass(model: torch.nn.Module, inputs: Inputs) -> Callable[[], None]:
    """The model without its decoder layers."""
    config = model.get_decoder().config

    def run() -> None:
        layers, config.num_hidden_layers = config.num_hidden_layers, 0
        try:
            model(**inputs, use_cache=False, logits_to_keep=1)
        finally:
            config.num_hidden_layers = layers

    return run


def in_order(passes: Sequence[Callable[[], None]]) -> Callable[[], None]:
    """One pass after the other."""

    def run() -> None:
        for one in passes:
            one()

    return run


def kv_bytes(cache: Any) -> int:
    """Real size of all K/V tensors."""
    return sum(s.untyped_storage().nbytes() for layer in cache.layers for s in (layer.keys, layer.values))


class Decoding:
    """Decode steps on one filled cache, which is cut back after each measurement."""

    STEPS = 8

    def __init__(self, model: torch.nn.Module, inputs: Inputs, exits: dyvte.VisualExit | None) -> None:
        self.model, self.exits = model, exits
        self.token = torch.full((len(inputs["input_ids"]), 1), FILLER_ID, device=model.device)
        with inside(model, exits):
            self.cache = prefill(model, inputs)

    def step(self) -> None:
        """One token for each row; call inside the block."""
        self.model(input_ids=self.token, past_key_values=self.cache, use_cache=True)

    def seconds(self) -> float:
        """Of one step: the mean of several after one that is not counted."""
        with inside(self.model, self.exits):
            self.step()
            start = now(self.model.device)
            for _ in range(self.STEPS):
                self.step()
            seconds = now(self.model.device) - start
        self.cache.crop(-self.STEPS - 1)
        return seconds / self.STEPS
