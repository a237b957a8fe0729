"""SAM by the names of segment-anything: random weights, and what they compute, written as plain functions.

Shares no code with transformers or with the conversion. Shapes: C width, E side of the image embedding.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

SIDE, PATCH, WIDTH, HEADS, DEPTH, WINDOW = 32, 4, 16, 2, 2, 3
GLOBAL = (1,)
PROMPT, MLP, IOU = 24, 32, 12
"""The prompt encoder's and mask decoder's width, their inner width, that of the quality head."""
GRID = SIDE // PATCH


def random_state(seed: int = 0) -> dict[str, Tensor]:
    """Every key of a checkpoint of segment-anything, with its shape; the sizes are those above."""
    generator = torch.Generator().manual_seed(seed)
    state: dict[str, Tensor] = {}

    def put(name: str, *shape: int) -> None:
        state[name] = torch.randn(*shape, generator=generator) * 0.25

    def layer(name: str, *shape: int, bias: bool = True) -> None:
        put(f"{name}.weight", *shape)
        if bias:
            put(f"{name}.bias", shape[1] if "output_upscaling" in name and len(shape) == 4 else shape[0])

    put("pixel_mean", 3, 1, 1)
    put("pixel_std", 3, 1, 1)
    put("image_encoder.pos_embed", 1, GRID, GRID, WIDTH)
    layer("image_encoder.patch_embed.proj", WIDTH, 3, PATCH, PATCH)
    for i in range(DEPTH):
        block = f"image_encoder.blocks.{i}"
        span = GRID if i in GLOBAL else WINDOW
        for part in ("norm1", "norm2"):
            layer(f"{block}.{part}", WIDTH)
        put(f"{block}.attn.rel_pos_h", 2 * span - 1, WIDTH // HEADS)
        put(f"{block}.attn.rel_pos_w", 2 * span - 1, WIDTH // HEADS)
        layer(f"{block}.attn.qkv", 3 * WIDTH, WIDTH)
        layer(f"{block}.attn.proj", WIDTH, WIDTH)
        layer(f"{block}.mlp.lin1", 2 * WIDTH, WIDTH)
        layer(f"{block}.mlp.lin2", WIDTH, 2 * WIDTH)
    layer("image_encoder.neck.0", PROMPT, WIDTH, 1, 1, bias=False)
    layer("image_encoder.neck.1", PROMPT)
    layer("image_encoder.neck.2", PROMPT, PROMPT, 3, 3, bias=False)
    layer("image_encoder.neck.3", PROMPT)
    put("prompt_encoder.pe_layer.positional_encoding_gaussian_matrix", 2, PROMPT // 2)
    for name in (*(f"point_embeddings.{i}" for i in range(4)), "not_a_point_embed", "no_mask_embed"):
        put(f"prompt_encoder.{name}.weight", 1, PROMPT)
    for number, *shape in ((0, 4, 1, 2, 2), (1, 4), (3, 16, 4, 2, 2), (4, 16), (6, PROMPT, 16, 1, 1)):
        layer(f"prompt_encoder.mask_downscaling.{number}", *shape)
    for i in range(2):
        name = f"mask_decoder.transformer.layers.{i}"
        for n in range(1, 5):
            layer(f"{name}.norm{n}", PROMPT)
        layer(f"{name}.mlp.lin1", MLP, PROMPT)
        layer(f"{name}.mlp.lin2", PROMPT, MLP)
        _attention_keys(layer, f"{name}.self_attn", PROMPT)
        for attention in ("cross_attn_token_to_image", "cross_attn_image_to_token"):
            _attention_keys(layer, f"{name}.{attention}", PROMPT // 2)
    _attention_keys(layer, "mask_decoder.transformer.final_attn_token_to_image", PROMPT // 2)
    layer("mask_decoder.transformer.norm_final_attn", PROMPT)
    put("mask_decoder.iou_token.weight", 1, PROMPT)
    put("mask_decoder.mask_tokens.weight", 4, PROMPT)
    layer("mask_decoder.output_upscaling.0", PROMPT, PROMPT // 4, 2, 2)
    layer("mask_decoder.output_upscaling.1", PROMPT // 4)
    layer("mask_decoder.output_upscaling.3", PROMPT // 4, PROMPT // 8, 2, 2)
    sizes = [(PROMPT, PROMPT), (PROMPT, PROMPT), (PROMPT // 8, PROMPT)]
    for i in range(4):
        for n, shape in enumerate(sizes):
            layer(f"mask_decoder.output_hypernetworks_mlps.{i}.layers.{n}", *shape)
    for n, shape in enumerate([(IOU, PROMPT), (IOU, IOU), (4, IOU)]):
        layer(f"mask_decoder.iou_prediction_head.layers.{n}", *shape)
    return state


def _attention_keys(layer, name: str, inner: int) -> None:
    for part in "qkv":
        layer(f"{name}.{part}_proj", inner, PROMPT)
    layer(f"{name}.out_proj", PROMPT, inner)


def mask_logits(state: dict[str, Tensor], pixels_3SS: Tensor, prompt_C: Tensor) -> Tensor:
    """(4E, 4E): the first mask for one image and one text prompt."""
    image_CEE = embed(state, pixels_3SS)
    at = {key.removeprefix("mask_decoder."): t for key, t in state.items() if key.startswith("mask_decoder.")}
    keys = (image_CEE + state["prompt_encoder.no_mask_embed.weight"][0, :, None, None]).flatten(1).T
    centres = (torch.arange(GRID) + 0.5) / GRID * 2 - 1
    y, x = torch.meshgrid(centres, centres, indexing="ij")
    turns = torch.stack([x, y], -1) @ state["prompt_encoder.pe_layer.positional_encoding_gaussian_matrix"]
    where = torch.cat([(2 * math.pi * turns).sin(), (2 * math.pi * turns).cos()], -1).flatten(0, 1)
    asked = torch.cat([at["iou_token.weight"], at["mask_tokens.weight"], prompt_C[None]])
    queries = asked
    for i in range(2):
        name = f"transformer.layers.{i}"
        if i == 0:
            queries = _attend(at, f"{name}.self_attn", queries, queries, queries)
        else:
            queries = queries + _attend(at, f"{name}.self_attn", queries + asked, queries + asked, queries)
        queries = _norm(at, f"{name}.norm1", queries)
        found = _attend(at, f"{name}.cross_attn_token_to_image", queries + asked, keys + where, keys)
        queries = _norm(at, f"{name}.norm2", queries + found)
        inner = F.relu(_linear(at, f"{name}.mlp.lin1", queries))
        queries = _norm(at, f"{name}.norm3", queries + _linear(at, f"{name}.mlp.lin2", inner))
        found = _attend(at, f"{name}.cross_attn_image_to_token", keys + where, queries + asked, queries)
        keys = _norm(at, f"{name}.norm4", keys + found)
    found = _attend(at, "transformer.final_attn_token_to_image", queries + asked, keys + where, keys)
    queries = _norm(at, "transformer.norm_final_attn", queries + found)
    grid = keys.T.reshape(1, PROMPT, GRID, GRID)
    grid = F.conv_transpose2d(grid, *_pair(at, "output_upscaling.0"), stride=2)
    grid = F.gelu(_channel_norm(at, "output_upscaling.1", grid))
    grid = F.gelu(F.conv_transpose2d(grid, *_pair(at, "output_upscaling.3"), stride=2))
    weights = queries[1]
    for n in range(3):
        weights = _linear(at, f"output_hypernetworks_mlps.0.layers.{n}", weights)
        weights = F.relu(weights) if n < 2 else weights
    return torch.einsum("c,chw->hw", weights, grid[0])


def embed(state: dict[str, Tensor], pixels_3SS: Tensor) -> Tensor:
    """(C, E, E): the image encoder."""
    at = {
        key.removeprefix("image_encoder."): t for key, t in state.items() if key.startswith("image_encoder.")
    }
    grid = F.conv2d(pixels_3SS[None], *_pair(at, "patch_embed.proj"), stride=PATCH)[0].permute(1, 2, 0)
    grid = grid + at["pos_embed"][0]
    for i in range(DEPTH):
        name = f"blocks.{i}"
        normed = F.layer_norm(grid, (WIDTH,), *_pair(at, f"{name}.norm1"), eps=1e-6)
        if i in GLOBAL:
            seen = _see(at, f"{name}.attn", normed)
        else:  # windows of zero-padded cells, each by itself
            wide = -(-GRID // WINDOW) * WINDOW
            padded = F.pad(normed, (0, 0, 0, wide - GRID, 0, wide - GRID))
            seen = torch.zeros_like(padded)
            for top in range(0, wide, WINDOW):
                for left in range(0, wide, WINDOW):
                    window = slice(top, top + WINDOW), slice(left, left + WINDOW)
                    seen[window] = _see(at, f"{name}.attn", padded[window])
            seen = seen[:GRID, :GRID]
        grid = grid + seen
        normed = F.layer_norm(grid, (WIDTH,), *_pair(at, f"{name}.norm2"), eps=1e-6)
        grid = grid + _linear(at, f"{name}.mlp.lin2", F.gelu(_linear(at, f"{name}.mlp.lin1", normed)))
    image = F.conv2d(grid.permute(2, 0, 1)[None], at["neck.0.weight"])
    image = F.conv2d(_channel_norm(at, "neck.1", image), at["neck.2.weight"], padding=1)
    return _channel_norm(at, "neck.3", image)[0]


def _see(at: dict[str, Tensor], name: str, cells: Tensor) -> Tensor:
    """Attention over a square of cells, with decomposed relative positions, one pair of cells at a time."""
    side, size = cells.shape[0], WIDTH // HEADS
    query, key, value = (
        part.reshape(side, side, HEADS, size) for part in _linear(at, f"{name}.qkv", cells).chunk(3, -1)
    )
    out = torch.zeros_like(query)
    offset = torch.arange(side)
    for y in range(side):
        for x in range(side):
            scores = torch.einsum("hc,uvhc->huv", query[y, x], key) / math.sqrt(size)
            scores += torch.einsum("hc,uc->hu", query[y, x], at[f"{name}.rel_pos_h"][y - offset + side - 1])[
                :, :, None
            ]
            scores += torch.einsum("hc,vc->hv", query[y, x], at[f"{name}.rel_pos_w"][x - offset + side - 1])[
                :, None
            ]
            shares = scores.flatten(1).softmax(-1).reshape(HEADS, side, side)
            out[y, x] = torch.einsum("huv,uvhc->hc", shares, value)
    return _linear(at, f"{name}.proj", out.flatten(2))


def _attend(at: dict[str, Tensor], name: str, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    heads = [
        _linear(at, f"{name}.{part}_proj", tokens).unflatten(-1, (HEADS, -1)).transpose(0, 1)
        for part, tokens in (("q", query), ("k", key), ("v", value))
    ]
    shares = (heads[0] @ heads[1].mT / math.sqrt(heads[0].shape[-1])).softmax(-1)
    return _linear(at, f"{name}.out_proj", (shares @ heads[2]).transpose(0, 1).flatten(1))


def _pair(at: dict[str, Tensor], name: str) -> tuple[Tensor, Tensor]:
    return at[f"{name}.weight"], at[f"{name}.bias"]


def _linear(at: dict[str, Tensor], name: str, tokens: Tensor) -> Tensor:
    return F.linear(tokens, *_pair(at, name))


def _norm(at: dict[str, Tensor], name: str, tokens: Tensor) -> Tensor:
    return F.layer_norm(tokens, (PROMPT,), *_pair(at, name), eps=1e-5)  # nn.LayerNorm's own


def _channel_norm(at: dict[str, Tensor], name: str, image: Tensor) -> Tensor:
    weight, bias = _pair(at, name)
    centred = image - image.mean(1, keepdim=True)
    scaled = centred / (centred.square().mean(1, keepdim=True) + 1e-6).sqrt()
    return scaled * weight[:, None, None] + bias[:, None, None]
