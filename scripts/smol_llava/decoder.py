"""A lean decoder for training: frozen matrices, LoRA, many questions packed behind one prefix.

One flat row of N tokens: [prefix of P tokens][group 0: G x T0][group 1: G x T1]... Every question of a group
sees the prefix and itself only, and its positions start where the prefix ends, so each is trained exactly as
if it stood alone. A text without questions is a prefix with no groups.

Matrix products run in `compute` (float32, or bfloat16 where the CPU has instructions for it); the residual
stream, the norms, the attention weights and the trained parameters stay in float32.

Letters: N tokens, P prefix, G questions of a group, T their padded width, H heads, K key heads, R = H / K.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional as F

PARTS = {
    "qkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "o": ("self_attn.o_proj",),
    "gate_up": ("mlp.gate_proj", "mlp.up_proj"),
    "down": ("mlp.down_proj",),
}
MAX_POSITIONS = 1024


class _Adapted(torch.autograd.Function):
    """x W' + scale (x A') B' with a frozen W; adapters of one input share one stacked A."""

    @staticmethod
    def forward(ctx, x, weight, scale, a, *bs):
        low = x.to(weight.dtype)
        a_low = a.to(weight.dtype)
        bs_low = [b.to(weight.dtype) for b in bs]
        out, hidden = low @ weight.t(), low @ a_low.t()
        start = 0
        for i, b in enumerate(bs_low):
            rank = b.shape[1]
            out[:, start : start + b.shape[0]].addmm_(
                hidden[:, i * rank : (i + 1) * rank], b.t(), alpha=scale
            )
            start += b.shape[0]
        ctx.save_for_backward(low, weight, a_low, hidden, *bs_low)
        ctx.scale = scale
        return out.float()

    @staticmethod
    def backward(ctx, grad):
        low, weight, a, hidden, *bs = ctx.saved_tensors
        grad = grad.to(weight.dtype)
        grad_hidden, grads_b, start = torch.empty_like(hidden), [], 0
        for i, b in enumerate(bs):
            rank, part = b.shape[1], grad[:, start : start + b.shape[0]]
            grad_hidden[:, i * rank : (i + 1) * rank] = part @ b
            grads_b.append((part.t() @ hidden[:, i * rank : (i + 1) * rank]).float().mul_(ctx.scale))
            start += b.shape[0]
        grad_hidden.mul_(ctx.scale)
        grad_x = None
        if ctx.needs_input_grad[0]:
            grad_x = torch.addmm(grad @ weight, grad_hidden, a).float()
        return grad_x, None, None, (grad_hidden.t() @ low).float(), *grads_b


class _Frozen(torch.autograd.Function):
    """x W' with a frozen W (the tied output embedding)."""

    @staticmethod
    def forward(ctx, x, weight):
        ctx.save_for_backward(weight)
        return (x.to(weight.dtype) @ weight.t()).float()

    @staticmethod
    def backward(ctx, grad):
        (weight,) = ctx.saved_tensors
        return (grad.to(weight.dtype) @ weight).float(), None


class _Norm(torch.autograd.Function):
    """RMS norm with a frozen gain."""

    @staticmethod
    def forward(ctx, x, gain, eps):
        inverse = torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)
        ctx.save_for_backward(x, gain, inverse)
        return (x * inverse).mul_(gain)

    @staticmethod
    def backward(ctx, grad):
        x, gain, inverse = ctx.saved_tensors
        grad = grad * gain
        along = (grad * x).mean(-1, keepdim=True) * inverse.pow(3)
        return grad.mul_(inverse).addcmul_(x, along, value=-1), None, None


class _SwiGLU(torch.autograd.Function):
    """silu(gate) * up on a stacked [gate, up], keeping one tensor for the way back."""

    @staticmethod
    def forward(ctx, stacked):
        ctx.save_for_backward(stacked)
        gate, up = stacked.chunk(2, -1)
        return F.silu(gate).mul_(up)

    @staticmethod
    def backward(ctx, grad):
        gate, up = ctx.saved_tensors[0].chunk(2, -1)
        chance = torch.sigmoid(gate)
        silu = gate * chance
        slope = chance * (1 + gate - silu)
        return torch.cat((grad * up * slope, grad * silu), -1)


@dataclass(frozen=True)
class Layout:
    """Where the rows of a packed sequence lie: prefix length and (questions, padded width) per group."""

    prefix: int
    groups: tuple[tuple[int, int], ...] = ()

    @property
    def positions(self) -> torch.Tensor:
        """Position of every token, (N,)."""
        after = [torch.arange(self.prefix, self.prefix + t).repeat(g) for g, t in self.groups]
        return torch.cat([torch.arange(self.prefix), *after])


def _future(width: int) -> torch.Tensor:
    return torch.full((width, width), float("-inf")).triu(1)


def _rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    a, b = x.chunk(2, -1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), -1)


class LoraDecoder(nn.Module):
    """Training double of a stock LLaMA decoder; its only parameters are the adapters'."""

    def __init__(self, language, rank: int, scale: float, seed: int, compute: torch.dtype = torch.float32):
        super().__init__()
        config = language.config
        self.heads, self.key_heads, self.head_dim = (
            config.num_attention_heads,
            config.num_key_value_heads,
            config.head_dim,
        )
        self.rank, self.scale, self.eps = rank, scale, config.rms_norm_eps
        self.embedding = language.embed_tokens.weight.detach()
        self.readout = self.embedding.to(compute)
        self.final_gain = language.norm.weight.detach()
        generator = torch.Generator().manual_seed(seed)
        self.a, self.b = nn.ParameterDict(), nn.ParameterDict()
        self.layers: list[dict[str, torch.Tensor]] = []
        for i, layer in enumerate(language.layers):
            frozen = {
                "attention_gain": layer.input_layernorm.weight.detach(),
                "mlp_gain": layer.post_attention_layernorm.weight.detach(),
            }
            for part, names in PARTS.items():
                weights = [layer.get_submodule(n).weight.detach() for n in names]
                frozen[part] = torch.cat(weights).to(compute).contiguous()
                width = weights[0].shape[1]
                start = torch.rand(rank * len(names), width, generator=generator) * 2 - 1
                self.a[f"{i}_{part}"] = nn.Parameter(start / math.sqrt(width))
                for name, weight in zip(names, weights, strict=True):
                    key = f"{i}_{name.replace('.', '-')}"
                    self.b[key] = nn.Parameter(torch.zeros(weight.shape[0], rank))
            self.layers.append(frozen)
        theta = config.rope_parameters["rope_theta"]
        rates = theta ** -(torch.arange(0, self.head_dim, 2).float() / self.head_dim)
        angles = torch.arange(MAX_POSITIONS).float()[:, None] * rates
        self.cos, self.sin = angles.cos(), angles.sin()
        self.adapted = True

    def linear(self, index: int, part: str, x: torch.Tensor) -> torch.Tensor:
        """One stacked linear map of layer `index`, with its adapters unless `adapted` is False."""
        if not self.adapted:
            return _Frozen.apply(x, self.layers[index][part])
        bs = [self.b[f"{index}_{n.replace('.', '-')}"] for n in PARTS[part]]
        return _Adapted.apply(x, self.layers[index][part], self.scale, self.a[f"{index}_{part}"], *bs)

    def adapters(self) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
        """(A, B) of every adapted linear layer, by its name inside the decoder."""
        found = {}
        for i in range(len(self.layers)):
            for part, names in PARTS.items():
                stacked = self.a[f"{i}_{part}"].detach().split(self.rank)
                for name, a in zip(names, stacked, strict=True):
                    b = self.b[f"{i}_{name.replace('.', '-')}"].detach()
                    found[f"layers.{i}.{name}"] = (a, b)
        return found

    @torch.no_grad()
    def load_adapters(self, parts: dict[str, torch.Tensor]) -> None:
        """Take adapters in by the names of a checkpoint, ``layers.0.mlp.up_proj.lora_A`` and so on."""
        for name, (a, b) in self.adapters().items():
            a.copy_(parts[f"{name}.lora_A"])
            b.copy_(parts[f"{name}.lora_B"])

    def attention(
        self, qkv: torch.Tensor, layout: Layout, cos: torch.Tensor, sin: torch.Tensor
    ) -> torch.Tensor:
        """(N, (H + 2 K) d) to (N, H d): the prefix is causal, a question sees the prefix and itself."""
        h, k, d, p = self.heads, self.key_heads, self.head_dim, layout.prefix
        r = h // k
        heads = qkv.view(-1, h + 2 * k, d).transpose(0, 1)
        turned = _rotate(heads[: h + k], cos, sin)
        # split, not sliced: the way back of a slice fills a whole tensor with zeros
        sizes = [p, *(g * t for g, t in layout.groups)]
        query_p, *queries = (turned[:h] * d**-0.5).split(sizes, 1)
        key_p, *keys = turned[h:].split(sizes, 1)
        value_p, *values = heads[h + k :].split(sizes, 1)
        scores = (query_p.reshape(k, r * p, d) @ key_p.transpose(1, 2)).view(k, r, p, p) + _future(p)
        mixed = scores.softmax(-1).view(k, r * p, p) @ value_p
        out = [mixed.view(h, p, d).transpose(0, 1).reshape(p, h * d)]
        for (g, t), query, key, value in zip(layout.groups, queries, keys, values, strict=True):
            query = query.reshape(k, r, g, t, d).transpose(1, 2)
            flat = query.reshape(k, g * r * t, d)
            to_prefix = (flat @ key_p.transpose(1, 2)).view(k, g, r, t, p)
            to_self = query.reshape(k, g, r * t, d) @ key.reshape(k, g, t, d).transpose(2, 3)
            to_self = to_self.view(k, g, r, t, t) + _future(t)
            weights = torch.cat((to_prefix, to_self), -1).softmax(-1)
            weights_p, weights_g = weights.split([p, t], -1)
            mixed = (weights_p.reshape(k, g * r * t, p) @ value_p).view(k, g, r * t, d)
            mixed = mixed + weights_g.reshape(k, g, r * t, t) @ value.reshape(k, g, t, d)
            out.append(mixed.view(k, g, r, t, d).permute(1, 3, 0, 2, 4).reshape(g * t, h * d))
        return torch.cat(out)

    def layer(
        self, index: int, x: torch.Tensor, layout: Layout, cos: torch.Tensor, sin: torch.Tensor
    ) -> torch.Tensor:
        """One decoder layer on a packed row, (N, D) to (N, D)."""
        frozen = self.layers[index]
        normed = _Norm.apply(x, frozen["attention_gain"], self.eps)
        mixed = self.attention(self.linear(index, "qkv", normed), layout, cos, sin)
        x = x + self.linear(index, "o", mixed)
        normed = _Norm.apply(x, frozen["mlp_gain"], self.eps)
        return x + self.linear(index, "down", _SwiGLU.apply(self.linear(index, "gate_up", normed)))

    def forward(self, x: torch.Tensor, layout: Layout) -> torch.Tensor:
        """Input embeddings (N, D) to normed last hidden states (N, D)."""
        positions = layout.positions
        cos, sin = self.cos[positions], self.sin[positions]
        for i in range(len(self.layers)):
            x = self.layer(i, x, layout, cos, sin)
        return _Norm.apply(x, self.final_gain, self.eps)

    @torch.no_grad()
    def with_exits(self, x: torch.Tensor, layout: Layout, visual: slice, exits: Sequence[int]) -> dict:
        """Normed last hidden states (N - P, D) of the questions for each exit layer.

        At exit layer k the rows of `visual` leave after layer k; all others keep their positions. One full
        pass is shared.
        """
        positions = layout.positions
        cos, sin = self.cos[positions], self.sin[positions]
        keep = torch.ones(len(positions), dtype=torch.bool)
        keep[visual] = False
        short = Layout(layout.prefix - (visual.stop - visual.start), layout.groups)
        found, depth = {}, len(self.layers)
        for k in range(depth + 1):
            if k in exits:
                if k == depth:
                    states = x[layout.prefix :]
                else:
                    states = x[keep]
                    for i in range(k, depth):
                        states = self.layer(i, states, short, cos[keep], sin[keep])
                    states = states[short.prefix :]
                found[k] = _Norm.apply(states, self.final_gain, self.eps)
            if k < depth:
                x = self.layer(k, x, layout, cos, sin)
        return found

    def logits(self, states: torch.Tensor) -> torch.Tensor:
        """Logits (n, V) in float32 of some last hidden states (n, D)."""
        return _Frozen.apply(states, self.readout)
