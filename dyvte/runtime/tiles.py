"""Neighbours on a grid, tile by tile: attention whose cost is linear in the number of visual tokens.

A tile of t x t queries attends to the (t + 2r) x (t + 2r) cells around it, and a mask picks each query's own
window. Gathering a whole halo once per tile costs a small factor over the keys themselves, where gathering
every query's window would cost (2r + 1)^2.

Shapes: R rows and T tokens of a stream, W tiles, Q = t * t queries, K = (t + 2r)^2 keys, P text tokens before
the last visual one in the longest row, H heads, d head size.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from dyvte.reductions import Neighbourhood


class Tiles:
    """Index tensors of one stream's neighbourhoods, worked out on the host once.

    Parameters
    ----------
    places_RT3
        (R, T, 3) int64: image, row and column of visual tokens, -1 elsewhere.
    text_RT
        (R, T) bool: text tokens of the stream.
    """

    def __init__(
        self, places_RT3: Tensor, text_RT: Tensor, window: Neighbourhood, device: torch.device
    ) -> None:
        tokens, side = text_RT.shape[1], max(4, 4 * window.radius)
        queries, keys, rows = [], [], []
        for row, places_T3 in enumerate(places_RT3):
            for image in places_T3[:, 0].unique().tolist():
                if image < 0:
                    continue
                slots = (places_T3[:, 0] == image).nonzero().flatten()
                of_tiles, around = _cut(slots, places_T3[slots, 1:], side, window.radius)
                queries.append(of_tiles)
                keys.append(around)
                rows.append(torch.full((len(of_tiles),), row))
        slots_WQ, slots_WK, rows_W = torch.cat(queries), torch.cat(keys), torch.cat(rows)
        # Tiles without a query, where tokens were dropped, cost nothing.
        used_W = (slots_WQ >= 0).any(1)
        slots_WQ, slots_WK, rows_W = slots_WQ[used_W], slots_WK[used_W], rows_W[used_W]
        text_WP = self._text_before(places_RT3, text_RT)[rows_W]
        # Of a radius beyond the image, much of the halo holds no token anywhere.
        used_K = (slots_WK >= 0).any(0)
        window_1QK, slots_WK = _window(side, window.radius)[:, :, used_K], slots_WK[:, used_K]
        slots_WK = torch.cat([text_WP, slots_WK], 1)
        allowed_WQK = (
            torch.cat(
                [
                    # text that comes before the query
                    (text_WP[:, None] < slots_WQ[:, :, None]).expand(-1, -1, text_WP.shape[1]),
                    window_1QK.expand(len(rows_W), -1, -1),
                ],
                2,
            )
            & (slots_WK >= 0)[:, None]
        )
        if window.causal:
            allowed_WQK = allowed_WQK & (slots_WK[:, None] <= slots_WQ[:, :, None])
        # A slot without a query sees anything, so that no softmax is empty; its result is dropped.
        self.allowed_W1QK = (allowed_WQK | (slots_WQ < 0)[:, :, None])[:, None].to(device)
        base_W1 = rows_W[:, None] * tokens
        self.shape = slots_WQ.shape
        self._queries = (slots_WQ.clamp(min=0) + base_W1).flatten().to(device)
        self._keys = (slots_WK.clamp(min=0) + base_W1).flatten().to(device)
        real_WQ = slots_WQ >= 0
        self._put = (slots_WQ + base_W1)[real_WQ].to(device)
        self._from = real_WQ.flatten().nonzero().flatten().to(device)

    def attend(
        self, query: Tensor, key: Tensor, value: Tensor, out: Tensor, heads: Tensor | None, scale: float
    ) -> None:
        """Write the attention of visual tokens into `out`.

        Parameters
        ----------
        query, out
            (R, T, H, d).
        key, value
            (R, T, H, d), one for each query head.
        heads
            Indices of the heads that are computed; None: all.
        """
        parts = [_heads(states.flatten(0, 1), heads) for states in (query, key, value)]
        tiles, num = self.shape[0], parts[0].shape[1]
        index = (self._queries, self._keys, self._keys)
        query_WHQd, key_WHKd, value_WHKd = (
            part.index_select(0, take).view(tiles, -1, num, part.shape[-1]).transpose(1, 2)
            for part, take in zip(parts, index, strict=True)
        )
        got_WHQd = F.scaled_dot_product_attention(
            query_WHQd, key_WHKd, value_WHKd, attn_mask=self.allowed_W1QK, scale=scale
        )
        got = got_WHQd.transpose(1, 2).reshape(-1, num, got_WHQd.shape[-1]).index_select(0, self._from)
        # Autocast computes attention in half precision from float32 queries and keys.
        flat, got = out.view(-1, *out.shape[2:]), got.to(out.dtype)
        if heads is None:
            flat.index_copy_(0, self._put, got)
        else:
            flat[self._put[:, None], heads] = got

    @staticmethod
    def _text_before(places_RT3: Tensor, text_RT: Tensor) -> Tensor:
        """(R, P) slots of text with a visual token behind it, -1 where a row has fewer."""
        is_visual_RT = places_RT3[..., 0] >= 0
        behind_RT = is_visual_RT.flip(1).cumsum(1).flip(1) > 0
        before_RT = text_RT & behind_RT
        length = int(before_RT.sum(1).max())
        order_RP = torch.argsort((~before_RT).to(torch.uint8), dim=1, stable=True)[:, :length]
        return torch.where(before_RT.gather(1, order_RP), order_RP, -1)


def _heads(states: Tensor, heads: Tensor | None) -> Tensor:
    return states if heads is None else states.index_select(1, heads)


def _cut(slots: Tensor, cells: Tensor, side: int, radius: int) -> tuple[Tensor, Tensor]:
    """One image's tiles: (W, t * t) slots of the queries, (W, (t + 2r)^2) slots around them; -1: no token."""
    height, width = ((int(cells[:, axis].max()) // side + 1) * side for axis in (0, 1))
    grid = torch.full((height + 2 * radius, width + 2 * radius), -1)
    grid[cells[:, 0] + radius, cells[:, 1] + radius] = slots
    inner = grid[radius : radius + height, radius : radius + width]
    queries = inner.unfold(0, side, side).unfold(1, side, side)
    around = grid.unfold(0, side + 2 * radius, side).unfold(1, side + 2 * radius, side)
    return queries.reshape(-1, side**2), around.reshape(-1, (side + 2 * radius) ** 2)


def _window(side: int, radius: int) -> Tensor:
    """(1, t * t, (t + 2r)^2) bool: cells of the halo within the radius of each cell of the tile."""
    inner, outer = torch.arange(side) + radius, torch.arange(side + 2 * radius)
    near = (inner[:, None] - outer).abs() <= radius
    return (near[:, None, :, None] & near[None, :, None, :]).reshape(1, side**2, -1)
