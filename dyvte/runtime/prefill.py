"""One prefill that contains visual tokens: every layer on at most two streams, then its gate and reductions.

Shapes: B rows, N tokens of the padded batch, R rows and T tokens of a stream, D hidden size, L layers.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from dyvte.decoder import Layout, hidden_of
from dyvte.decoder.caches import Capture
from dyvte.errors import UnsupportedBackboneError
from dyvte.gates import prompt_features, reads_visual
from dyvte.policies import Plan
from dyvte.reductions import ReductionPlan, VisualWork, merged
from dyvte.runtime.attention_row import LastRow
from dyvte.runtime.cache import ExitLayer, layer_bytes, put_layer, records_past
from dyvte.runtime.masks import causal_mask, window_needs_mask
from dyvte.runtime.packing import Packing
from dyvte.runtime.positions import close_up, dropped_before
from dyvte.runtime.records import PrefillRecord
from dyvte.runtime.replay import Replay
from dyvte.runtime.stack import Stack
from dyvte.runtime.streams import Partition, Stream
from dyvte.runtime.visual_work import LighterLayer, VisualTokens


class Prefill:
    """State of one prefill that contains visual tokens."""

    def __init__(
        self,
        stack: Stack,
        layout: Layout,
        plan: Plan,
        reducing: Sequence[ReductionPlan],
        places_BN3: Tensor | None,
        plain: bool,
        replay: Replay | None = None,
    ) -> None:
        self.replay = replay
        self.stack, self.layout, self.plan, self.reducing = stack, layout, plan, reducing
        # Where visual tokens lie on their images, if a reduction must know.
        self.places_BN3 = places_BN3
        self._whole_stream: Stream | None = None
        self._visual_tokens: tuple[Stream, VisualTokens] | None = None
        # True where the decoder makes an ordinary causal mask itself.
        self.plain = plain
        self.num_layers = stack.backbone.num_layers
        self.logits_BL = torch.full((layout.batch, self.num_layers), torch.nan)
        self.visual_tokens_BL = torch.zeros((layout.batch, self.num_layers), dtype=torch.int64)
        self.text_tokens_BL = torch.zeros_like(self.visual_tokens_BL)
        self.score_layers: list[int] = []
        # What reductions left of each row; exits come on top.
        self.kept_BN = layout.spans.valid_BN
        self._now: tuple[Tensor, Tensor, Tensor, Tensor, Tensor] | None = None
        self.partition: Partition | None = None
        self._packings: tuple[Partition, dict[int, Packing]] | None = None
        self.cache: Any = None
        self.dropped_BN = dropped_before(layout) if stack.rearranges else None
        exits_B = plan.exit_layers_B
        # Rows without an image join the text stream only if the block can change anything: else it is stock.
        self.active = bool((exits_B[layout.has_image_B] < self.num_layers).any()) or any(
            plan.asks(k) or any(one.drops(k) for one in reducing) for k in range(1, self.num_layers)
        )
        self.active |= any(
            not one.visual_work(k).is_stock for one in reducing for k in range(1, self.num_layers + 1)
        )

    def run_layer(
        self, index: int, forward: Callable[..., Any], hidden_BND: Tensor, kwargs: dict[str, Any]
    ) -> Any:
        """Layer `index` (0-based) on at most two streams, then its gate, then its reductions."""
        self.cache = kwargs.get("past_key_values")
        in_text_B, carried_BN = self._carried(index)
        replay = self.replay
        if replay is not None and replay.takes(index):
            return self._replayed(replay, index)
        partition = self._partition(carried_BN, in_text_B, hidden_BND.device)
        visual = self._whole(hidden_BND.device) if partition is None else partition.visual
        with contextlib.ExitStack() as around:
            rows = self._around(index, visual, hidden_BND.device, around)
            if partition is None:
                output = forward(hidden_BND, **kwargs)
            else:
                output = self._run_streams(partition, index, forward, hidden_BND, kwargs, around)
        k = index + 1
        if self.plan.asks(k):
            self._ask(k, hidden_of(output))
        gone_B = self._reduce(k, carried_BN, rows)
        if replay is not None:
            replay.add(output, self.kept_BN, gone_B, rows is not None, self.cache, index)
        return output

    def _replayed(self, replay: Replay, index: int) -> Any:
        """Layer `index` as an earlier pass over the same inputs left it."""
        step = replay.steps[index]
        if step.cache_layer is not None and self.cache is not None:
            put_layer(self.cache, index, replay.copied(step.cache_layer))
        self.kept_BN = step.kept_BN
        if step.has_scores:
            self.score_layers.append(index + 1)
        if step.gone_B is not None:
            self.plan.settle(step.gone_B, index + 1)
        # Some decoders add to what a layer returned, in place.
        if isinstance(step.output, tuple):
            return (step.output[0].clone(), *step.output[1:])
        return step.output.clone()

    def record(self) -> PrefillRecord:
        """What happened, for the user."""
        exits_B = torch.where(self.layout.has_image_B, self.plan.exit_layers_B, -1)
        layers = getattr(self.cache, "layers", ())
        return PrefillRecord(
            exit_layers_B=exits_B,
            gate_logits_BL=self.logits_BL,
            num_visual_B=self.layout.num_visual_B,
            kv_bytes=tuple(layer_bytes(layer) for layer in layers),
            gate_fallbacks=self.plan.num_fallbacks,
            visual_tokens_BL=self.visual_tokens_BL,
            text_tokens_BL=self.text_tokens_BL,
            score_layers=tuple(self.score_layers),
        )

    def _carried(self, index: int) -> tuple[Tensor, Tensor]:
        """(B,) bool: rows of text only; (B, N) bool: tokens that go through layer `index`."""
        in_text_B = (self.plan.exit_layers_B <= index) | ~self.layout.has_image_B
        now = self._now
        # Most layers are as the one before.
        if now is None or now[0] is not self.kept_BN or not torch.equal(now[1], in_text_B):
            carried_BN = torch.where(in_text_B[:, None], self.kept_BN & self.layout.text_BN, self.kept_BN)
            num_visual_B = (carried_BN & self.layout.spans.visual_BN).sum(1)
            num_text_B = carried_BN.sum(1) - num_visual_B
            now = self._now = (self.kept_BN, in_text_B, carried_BN, num_visual_B, num_text_B)
        self.visual_tokens_BL[:, index], self.text_tokens_BL[:, index] = now[3], now[4]
        return now[1], now[2]

    def _partition(self, carried_BN: Tensor, in_text_B: Tensor, device: torch.device) -> Partition | None:
        if not self.active:
            return None
        if not in_text_B.any() and torch.equal(carried_BN, self.layout.spans.valid_BN):
            return None
        if self.partition is None or not self.partition.is_of(carried_BN, in_text_B, device):
            self.partition = Partition(self.layout, carried_BN, in_text_B, device, self.dropped_BN)
        return self.partition

    def _whole(self, device: torch.device) -> Stream | None:
        """All rows as one stream, for what reductions do around the stock call."""
        if not self.reducing:
            return None
        if self._whole_stream is None or self._whole_stream.rows.device != device:
            rows_R, valid_BN = torch.arange(self.layout.batch), self.layout.spans.valid_BN
            self._whole_stream = Stream(self.layout, rows_R, valid_BN, device, compact=False)
        return self._whole_stream

    def _around(
        self, index: int, visual: Stream | None, device: torch.device, around: contextlib.ExitStack
    ) -> LastRow | None:
        """Enter what the reductions want around layer `index` on the stream that carries visual tokens."""
        if visual is None:
            return None
        layer, work = self.stack.backbone.layers[index], self._work(index)
        if not work.is_stock:
            around.enter_context(LighterLayer(layer, self._tokens(visual, device), work, self.stack.weights))
        if not any(one.reads_attention(index + 1) for one in self.reducing):
            return None
        self.score_layers.append(index + 1)
        return around.enter_context(LastRow(layer, visual, self.stack.windows[index]))

    def _work(self, index: int) -> VisualWork:
        work = merged([one.visual_work(index + 1) for one in self.reducing])
        if (work.window is not None or work.heads is not None) and not self.plain:
            raise UnsupportedBackboneError(
                f"{self.stack.backbone.model.config.model_type}'s visual tokens attend by a rule of their "
                "own (sliding windows or bidirectional images): reductions of their attention cannot serve it"
            )
        return work

    def _tokens(self, stream: Stream, device: torch.device) -> VisualTokens:
        if self._visual_tokens is None or self._visual_tokens[0] is not stream:
            tokens = VisualTokens(stream, self.layout.spans.visual_BN, self.places_BN3, device)
            self._visual_tokens = (stream, tokens)
        return self._visual_tokens[1]

    def _run_streams(
        self,
        part: Partition,
        index: int,
        forward: Callable[..., Any],
        hidden_BND: Tensor,
        kwargs: dict[str, Any],
        around: contextlib.ExitStack,
    ) -> Any:
        mask = kwargs.pop("attention_mask", None)
        kwargs.pop("past_key_values", None)
        # What is in no stream keeps its last state: visual tokens of text rows, and what reductions dropped.
        out_BND = hidden_BND.clone(memory_format=torch.contiguous_format)
        captures, output = [], None
        for stream in part.streams:
            capture = Capture() if self.cache is not None else None
            captures.append(capture)
            hidden_RTD = stream.gather(hidden_BND)
            output = forward(
                hidden_RTD,
                attention_mask=self._mask(stream, index, mask, hidden_RTD),
                past_key_values=capture,
                **self._arguments(stream, kwargs, hidden_RTD),
            )
            if stream is part.visual:
                # Text runs as it always does.
                around.close()
            stream.scatter(out_BND, hidden_of(output))
        # Under gradient checkpointing a layer drops its cache, as in the stock model.
        if captures[-1] is not None and captures[-1].keys is not None:
            self._store(part, index, captures)
        return (out_BND, *output[1:]) if isinstance(output, tuple) else out_BND

    def _arguments(self, stream: Stream, kwargs: dict[str, Any], hidden_RTD: Tensor) -> dict[str, Any]:
        given = stream.arguments(kwargs)
        if not stream.is_compact:
            return given
        if stream.dropped_RT is not None:
            if stream.closed_up is None:
                stream.closed_up = close_up(self.stack.rotary, hidden_RTD, given, stream.dropped_RT)
            given = {**given, **stream.closed_up}
        return self.stack.without_jumps(given)

    def _mask(self, stream: Stream, index: int, mask: Any, hidden_RTD: Tensor) -> Any:
        if not stream.is_compact:
            return stream.mask(mask) if isinstance(mask, Tensor) else mask
        window = self.stack.windows[index]
        is_short = window is not None and window.size < self.layout.tokens
        if isinstance(mask, Tensor) and mask.dim() == 4 and (is_short or not self.plain):
            return stream.mask(mask)
        if is_short:
            raise window_needs_mask(self.stack.config._attn_implementation)
        # Without a 4D mask the attention function is causal by itself; compact rows have no padding to hide.
        if stream.causal_mask is None:
            stream.causal_mask = (causal_mask(self.stack.config, hidden_RTD),)
        return stream.causal_mask[0]

    def _store(self, part: Partition, index: int, captures: Sequence[Capture]) -> None:
        windows, tokens = self.stack.windows, self.layout.tokens
        first = 0
        # Assisted generation asks the cache to keep more than its window, to be able to go back.
        if windows[index] is not None and not records_past(self.cache, index):
            first = windows[index].first_needed(tokens)
        packing = self._packing(part, first)
        keys = packing.states([capture.keys for capture in captures])
        values = packing.states([capture.values for capture in captures])
        layer = ExitLayer(keys, values, packing.columns, tokens, windows[index], is_cut=first > 0)
        put_layer(self.cache, index, layer)

    def _packing(self, part: Partition, first: int) -> Packing:
        """What the layers of a partition keep from column `first` on: worked out once for all of them."""
        if self._packings is None or self._packings[0] is not part:
            self._packings = (part, {})
        known = self._packings[1]
        if first not in known:
            known[first] = Packing(part, first, with_places=any(self.stack.windows))
        return known[first]

    @torch.no_grad()
    def _ask(self, k: int, hidden_BND: Tensor) -> None:
        asking_B = self.plan.asking_rows()
        names, spans = self.plan.features, self.layout.spans
        masks = [spans.prompt_BN & self.kept_BN & asking_B[:, None]]
        if not masks[0].any():
            return
        if reads_visual(names):
            masks.append(spans.visual_BN & self.kept_BN & asking_B[:, None])
        used = torch.stack(masks).any(0).any(0).nonzero().flatten()
        span = slice(int(used[0]), int(used[-1]) + 1)
        masks = [mask_BN[:, span].to(hidden_BND.device) for mask_BN in masks]
        features_BF = prompt_features(hidden_BND[:, span], *masks, names=names)
        # The one wait for the device of a gated layer.
        logits_B = self.plan.logits(k, features_BF).float().cpu()
        self.logits_BL[asking_B, k - 1] = logits_B[asking_B]
        self.plan.step(k, logits_B)

    def _reduce(self, k: int, carried_BN: Tensor, rows: LastRow | None) -> Tensor | None:
        """Let tokens go after layer k; (B,) bool: rows without a visual token now, None where none could."""
        scores_BN = None
        dropped = [one for one in self.reducing if k < self.num_layers and one.drops(k)]
        for one in dropped:
            if one.reads_attention(k):
                if rows is None:
                    # No row carries visual tokens any more.
                    continue
                if scores_BN is None:
                    scores_BN = rows.stream.at_places(rows.scores_RT, -torch.inf)
            kept_BN = one.keep(k, carried_BN, scores_BN)
            # The row's next token is read from its last one, whatever it is.
            kept_BN[torch.arange(self.layout.batch), self.layout.last_B] = True
            self.kept_BN = self.kept_BN & (kept_BN | ~carried_BN)
            carried_BN = carried_BN & self.kept_BN
        if not dropped:
            return None
        has_visual_B = (self.kept_BN & self.layout.spans.visual_BN).any(1)
        gone_B = self.layout.has_image_B & ~has_visual_B
        self.plan.settle(gone_B, k)
        return gone_B
