"""A decoder layer that does less for visual tokens than for text, with the work really omitted.

Inside the block the layer's attention function, its query and output projections and its FFN are swapped for
ones that treat visual tokens apart; everything else of the layer runs as its author wrote it.

Shapes: R rows and T tokens of a stream, H query heads, G key heads, d head size, D hidden size, Q queries.
"""

from __future__ import annotations

from collections.abc import Callable
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dyvte.decoder import replace_forward
from dyvte.decoder.attention import attention_of, use_attention
from dyvte.errors import UnsupportedBackboneError
from dyvte.reductions import Neighbourhood, VisualWork
from dyvte.runtime.streams import Stream
from dyvte.runtime.tiles import Tiles

# Attention options that the functions here do not know.
_UNKNOWN = ("softcap", "s_aux", "position_bias")


class VisualTokens:
    """Where a stream's visual and text tokens are; index tensors on its device.

    Parameters
    ----------
    visual_BN
        (B, N) bool on the host.
    places_BN3
        (B, N, 3) places on the images, see `dyvte.backbones.grids`; None where nobody needs them.
    """

    def __init__(
        self, stream: Stream, visual_BN: Tensor, places_BN3: Tensor | None, device: torch.device
    ) -> None:
        real_RT, order_RT = stream.real_RT, stream.order_RT
        visual_RT = visual_BN[stream.rows_R].gather(1, order_RT) & real_RT
        self.shape, self.device = tuple(real_RT.shape), device
        self._text_RT, self._real_RT, self._places_RT3 = real_RT & ~visual_RT, real_RT, None
        if places_BN3 is not None:
            index = order_RT[..., None].expand(-1, -1, 3)
            places_RT3 = places_BN3[stream.rows_R].gather(1, index)
            self._places_RT3 = places_RT3.masked_fill(~visual_RT[..., None], -1)
        self.visual, self.text = (_indices(mask, device) for mask in (visual_RT, self._text_RT))
        self.text_queries = Queries(self._text_RT, real_RT, device)
        self._visual_queries: Queries | None = None
        self._visual_RT = visual_RT
        self._tiles: dict[Neighbourhood, Tiles] = {}

    @property
    def visual_queries(self) -> Queries:
        """All visual tokens as queries."""
        if self._visual_queries is None:
            self._visual_queries = Queries(self._visual_RT, self._real_RT, self.device)
        return self._visual_queries

    def tiles(self, window: Neighbourhood) -> Tiles:
        """Visual tokens cut into tiles of neighbours."""
        if window not in self._tiles:
            self._tiles[window] = Tiles(self._places_RT3, self._text_RT, window, self.device)
        return self._tiles[window]


class Queries:
    """Some tokens of a stream that attend to all real tokens before them."""

    def __init__(self, chosen_RT: Tensor, real_RT: Tensor, device: torch.device) -> None:
        length = int(chosen_RT.sum(1).max())
        slots_RQ = torch.argsort((~chosen_RT).to(torch.uint8), dim=1, stable=True)[:, :length]
        is_query_RQ = chosen_RT.gather(1, slots_RQ)
        causal_RQT = torch.arange(real_RT.shape[1]) <= slots_RQ[:, :, None]
        # A pad slot sees anything, so that no softmax is empty; its result is dropped.
        allowed_RQT = (causal_RQT & real_RT[:, None]) | ~is_query_RQ[:, :, None]
        self.allowed_R1QT = allowed_RQT[:, None].to(device)
        flat_RQ = slots_RQ + torch.arange(len(real_RT))[:, None] * real_RT.shape[1]
        self.shape, self._take = slots_RQ.shape, flat_RQ.flatten().to(device)
        self._put, self._from = flat_RQ[is_query_RQ].to(device), _indices(is_query_RQ, device)

    def attend(
        self, query: Tensor, key: Tensor, value: Tensor, out: Tensor, heads: Tensor | None, scale: float
    ) -> None:
        """Write these tokens' attention into `out`; all (R, T, H, d), `heads` as in `Tiles.attend`."""
        if heads is not None:
            query, key, value = (states.index_select(2, heads) for states in (query, key, value))
        picked = query.flatten(0, 1).index_select(0, self._take)
        query_RHQd = picked.view(*self.shape, *picked.shape[1:]).transpose(1, 2)
        got_RHQd = F.scaled_dot_product_attention(
            query_RHQd, key.transpose(1, 2), value.transpose(1, 2), attn_mask=self.allowed_R1QT, scale=scale
        )
        got = got_RHQd.transpose(1, 2).flatten(0, 1).index_select(0, self._from)
        # Autocast computes attention in half precision from float32 queries and keys.
        flat, got = out.view(-1, *out.shape[2:]), got.to(out.dtype)
        if heads is None:
            flat.index_copy_(0, self._put, got)
        else:
            flat[self._put[:, None], heads] = got


class LighterLayer:
    """Around one call of a decoder layer on one stream: visual tokens get `work`, text what it always got.

    Parameters
    ----------
    weights
        Parts of weights that earlier calls took.

    Raises
    ------
    UnsupportedBackboneError
        Naming what of the layer cannot be omitted.
    """

    def __init__(
        self, layer: nn.Module, tokens: VisualTokens, work: VisualWork, weights: Weights | None = None
    ) -> None:
        self.layer, self.tokens, self.work = layer, tokens, work
        self.weights = weights or Weights()
        self._undo: list[Callable[[], None]] = []

    def __enter__(self) -> LighterLayer:
        recomputed = getattr(self.layer, "gradient_checkpointing", False) and self.layer.training
        if recomputed and torch.is_grad_enabled():
            # In the backward pass, when nobody is around it any more.
            raise _refusal(
                self.layer, "under gradient checkpointing it would be computed anew as the stock layer"
            )
        try:
            if self.work.window is not None or self.work.heads is not None:
                self._swap_attention()
            if self.work.neurons is not None:
                self._swap_ffn()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Give the layer back as it was."""
        while self._undo:
            self._undo.pop()()

    # -- attention -------------------------------------------------------------------------------------
    def _swap_attention(self) -> None:
        module = attention_of(self.layer)
        if module is None:
            raise _refusal(self.layer, "it has no attention module `self_attn` with a config")
        self._undo.append(use_attention(module, self._attention))
        if self.work.heads is not None:
            self._swap_projections(module)

    def _attention(
        self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Any, **options: Any
    ) -> tuple[Tensor, None]:
        if found := [name for name in _UNKNOWN if options.get(name) is not None]:
            raise _refusal(self.layer, f"its attention uses {', '.join(found)}")
        reach = options.get("sliding_window")
        if reach is not None and reach < query.shape[2]:
            raise _refusal(self.layer, f"its sliding window of {reach} is shorter than the prompt")
        scale = options.get("scaling")
        scale = query.shape[-1] ** -0.5 if scale is None else scale
        num_heads, groups = query.shape[1], query.shape[1] // key.shape[1]
        if groups * key.shape[1] != num_heads:
            raise _refusal(self.layer, f"{num_heads} query heads do not divide into {key.shape[1]} groups")
        if self.work.heads is not None and len(self.work.heads) != num_heads:
            # Tensor parallelism leaves each process some of the heads.
            raise _refusal(self.layer, f"it computes {num_heads} of {len(self.work.heads)} heads here")
        query_RTHd = query.transpose(1, 2)
        key_RTHd, value_RTHd = (
            states.transpose(1, 2).repeat_interleave(groups, 2) if groups > 1 else states.transpose(1, 2)
            for states in (key, value)
        )
        out_RTHd = query.new_zeros(*query_RTHd.shape[:3], value.shape[-1])
        self.tokens.text_queries.attend(query_RTHd, key_RTHd, value_RTHd, out_RTHd, None, scale)
        heads = self._active_heads(query.device)
        if heads is None or len(heads):
            window = self.work.window
            visual = self.tokens.visual_queries if window is None else self.tokens.tiles(window)
            visual.attend(query_RTHd, key_RTHd, value_RTHd, out_RTHd, heads, scale)
        return out_RTHd, None

    def _active_heads(self, device: torch.device) -> Tensor | None:
        if self.work.heads is None:
            return None
        return self.work.heads.nonzero().flatten().to(device)

    def _swap_projections(self, module: nn.Module) -> None:
        q_proj, o_proj = getattr(module, "q_proj", None), getattr(module, "o_proj", None)
        num_heads = len(self.work.heads)
        # Adapted, quantised, fused or offloaded projections are computed whole: right, only not cheaper.
        if not (_is_plain(q_proj) and _is_plain(o_proj)) or q_proj.out_features != o_proj.in_features:
            return
        if q_proj.out_features % num_heads:
            raise _refusal(self.layer, f"its queries do not divide into {num_heads} heads")
        size = q_proj.out_features // num_heads
        parts = _part(self.work.heads.repeat_interleave(size).nonzero().flatten(), q_proj.weight.device)
        stock_q, stock_o = q_proj.forward, o_proj.forward

        def project(hidden_RTD: Tensor) -> Tensor:
            if hidden_RTD.shape[:2] != self.tokens.shape:
                return stock_q(hidden_RTD)
            flat = hidden_RTD.flatten(0, 1)
            text, visual = self.tokens.text, self.tokens.visual
            of_text = stock_q(flat.index_select(0, text))
            out = of_text.new_zeros(len(flat), q_proj.out_features)
            out.index_copy_(0, text, of_text)
            bias = None if q_proj.bias is None else q_proj.bias[parts]
            got = F.linear(flat.index_select(0, visual), self.weights.rows(q_proj.weight, parts), bias)
            if isinstance(parts, slice):
                out[:, parts].index_copy_(0, visual, got)
            else:
                out[visual[:, None], parts] = got
            return out.view(*hidden_RTD.shape[:2], -1)

        def merge(heads_RTX: Tensor) -> Tensor:
            if heads_RTX.shape[:2] != self.tokens.shape:
                return stock_o(heads_RTX)
            return self._apart(
                heads_RTX,
                stock_o,
                lambda flat: F.linear(
                    flat[:, parts], self.weights.columns(o_proj.weight, parts), o_proj.bias
                ),
            )

        self._undo.append(replace_forward(q_proj, project))
        self._undo.append(replace_forward(o_proj, merge))

    # -- FFN -------------------------------------------------------------------------------------------
    def _swap_ffn(self) -> None:
        ffn, neurons = self.layer.mlp, self.work.neurons
        projections = (ffn.gate_proj, ffn.up_proj, ffn.down_proj)
        if not all(_is_plain(one) for one in projections):
            raise _refusal(self.layer, "its FFN is adapted, quantised or offloaded")
        stock = ffn.forward
        device, weights = ffn.down_proj.weight.device, self.weights
        index = neurons.of(ffn.down_proj.in_features)
        part = slice(index) if isinstance(index, int) else _part(index, device)

        def sparse(flat: Tensor) -> Tensor:
            gate, up = (
                F.linear(flat, weights.rows(one.weight, part), None if one.bias is None else one.bias[part])
                for one in projections[:2]
            )
            down = ffn.down_proj
            return F.linear(ffn.act_fn(gate) * up, weights.columns(down.weight, part), down.bias)

        def forward(hidden_RTD: Tensor) -> Tensor:
            return self._apart(hidden_RTD, stock, sparse)

        self._undo.append(replace_forward(ffn, forward))

    # -- common ----------------------------------------------------------------------------------------
    def _apart(
        self,
        states_RTD: Tensor,
        of_text: Callable[[Tensor], Tensor],
        of_visual: Callable[[Tensor], Tensor],
    ) -> Tensor:
        """Text through one function, visual tokens through another; padding gets zeros."""
        flat, (text, visual) = states_RTD.flatten(0, 1), (self.tokens.text, self.tokens.visual)
        done = of_text(flat.index_select(0, text))
        out = done.new_zeros(len(flat), done.shape[-1])
        out.index_copy_(0, text, done)
        out.index_copy_(0, visual, of_visual(flat.index_select(0, visual)))
        return out.view(*states_RTD.shape[:2], -1)


class Weights:
    """Parts of weights that visual tokens use, taken once for a block instead of once for every prompt.

    A contiguous part is a view and costs nothing. Others are copies: while the block is open they take the
    memory of the heads and neurons that are left. With gradients nothing is kept.
    """

    def __init__(self) -> None:
        self._taken: dict[int, tuple[Tensor, int, Tensor]] = {}

    def rows(self, weight: Tensor, part: slice | Tensor) -> Tensor:
        """``weight[part]``."""
        return weight[part] if isinstance(part, slice) else self._take(weight, part, 0)

    def columns(self, weight: Tensor, part: slice | Tensor) -> Tensor:
        """``weight[:, part]``."""
        return weight[:, part] if isinstance(part, slice) else self._take(weight, part, 1)

    def _take(self, weight: Tensor, part: Tensor, dim: int) -> Tensor:
        if torch.is_grad_enabled() and weight.requires_grad:
            return weight.index_select(dim, part)
        version = 0 if weight.is_inference() else weight._version
        known = self._taken.get(id(weight))
        if known is None or known[0] is not weight or known[1] != version:
            known = self._taken[id(weight)] = (weight, version, weight.detach().index_select(dim, part))
        return known[2]


def _part(index: Tensor, device: torch.device) -> slice | Tensor:
    """Ascending indices; a slice where they have no gap."""
    if len(index) == 0:
        return slice(0)
    first, last = int(index[0]), int(index[-1])
    return slice(first, last + 1) if last - first + 1 == len(index) else index.to(device)


def _is_plain(module: Any) -> bool:
    if type(module) is not nn.Linear or "forward" in module.__dict__:
        return False
    weight = module.weight
    # Sharded weights (ZeRO-3, tensor parallelism) are of another type, or empty outside their own call.
    whole = type(weight) in (Tensor, nn.Parameter) and weight.shape == (
        module.out_features,
        module.in_features,
    )
    return whole and weight.device.type != "meta"


def _indices(mask: Tensor, device: torch.device) -> Tensor:
    return mask.flatten().nonzero().flatten().to(device)


def _refusal(layer: nn.Module, reason: str) -> UnsupportedBackboneError:
    return UnsupportedBackboneError(
        f"{type(layer).__name__} cannot do less for visual tokens: {reason}. Omit that reduction"
    )
