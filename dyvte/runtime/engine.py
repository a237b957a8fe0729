"""What runs in place of each decoder layer's forward while a block is active.

Shapes: B rows, N tokens of this forward pass, D hidden size, L decoder layers.
"""

from __future__ import annotations

import contextlib
import inspect
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..backbones import Backbone
from ..gates import prompt_features, reads_visual
from ..policies import Plan, Policy, Rows
from ..reductions import Reduction, ReductionPlan, TokenRows
from .attention_row import LastRow
from .cache import Capture, ExitLayer, layer_bytes, put_layer, records_past
from .masks import causal_mask, decode_mask, window_needs_mask
from .positions import check_rearrange, close_up, dropped_before
from .records import PrefillRecord, Run
from .streams import Layout, Partition, Stream
from .windows import Window, layer_windows


class Prefill:
    """State of one prefill that contains visual tokens."""

    def __init__(
        self, engine: Engine, layout: Layout, plan: Plan, reducing: Sequence[ReductionPlan], plain: bool
    ) -> None:
        self.engine, self.layout, self.plan, self.reducing = engine, layout, plan, reducing
        # True where the decoder makes an ordinary causal mask itself.
        self.plain = plain
        self.num_layers = engine.backbone.num_layers
        self.logits_BL = torch.full((layout.batch, self.num_layers), torch.nan)
        self.visual_tokens_BL = torch.zeros((layout.batch, self.num_layers), dtype=torch.int64)
        # What reductions left of each row; exits come on top.
        self.kept_BN = layout.spans.valid_BN
        self._now: tuple[Tensor, Tensor, Tensor, Tensor] | None = None
        self.partition: Partition | None = None
        self.cache: Any = None
        self.dropped_BN = dropped_before(layout) if engine.rearranges else None
        exits_B = plan.exit_layers_B
        # Rows without an image join the text stream only if the block can change anything: else it is stock.
        self.active = bool((exits_B[layout.has_image_B] < self.num_layers).any()) or any(
            plan.asks(k) or any(one.drops(k) for one in reducing) for k in range(1, self.num_layers)
        )

    def run_layer(
        self, index: int, forward: Callable[..., Any], hidden_BND: Tensor, kwargs: dict[str, Any]
    ) -> Any:
        """Layer `index` (0-based) on at most two streams, then its gate, then its reductions."""
        self.cache = kwargs.get("past_key_values")
        in_text_B, carried_BN = self._carried(index)
        partition = self._partition(carried_BN, in_text_B, hidden_BND.device)
        rows = self._last_row(index, partition, hidden_BND.device)
        with contextlib.nullcontext() if rows is None else rows:
            if partition is None:
                output = forward(hidden_BND, **kwargs)
            else:
                output = self._run_streams(partition, index, forward, hidden_BND, kwargs, rows)
        k = index + 1
        if self.plan.asks(k):
            self._ask(k, _hidden(output))
        self._reduce(k, carried_BN, rows)
        return output

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
        )

    def _carried(self, index: int) -> tuple[Tensor, Tensor]:
        """(B,) bool: rows of text only; (B, N) bool: tokens that go through layer `index`."""
        in_text_B = (self.plan.exit_layers_B <= index) | ~self.layout.has_image_B
        now = self._now
        # Most layers are as the one before.
        if now is None or now[0] is not self.kept_BN or not torch.equal(now[1], in_text_B):
            carried_BN = torch.where(in_text_B[:, None], self.kept_BN & self.layout.text_BN, self.kept_BN)
            num_visual_B = (carried_BN & self.layout.spans.visual_BN).sum(1)
            now = self._now = (self.kept_BN, in_text_B, carried_BN, num_visual_B)
        self.visual_tokens_BL[:, index] = now[3]
        return now[1], now[2]

    def _partition(self, carried_BN: Tensor, in_text_B: Tensor, device: torch.device) -> Partition | None:
        if not self.active:
            return None
        if not in_text_B.any() and torch.equal(carried_BN, self.layout.spans.valid_BN):
            return None
        if self.partition is None or not self.partition.is_of(carried_BN, in_text_B, device):
            self.partition = Partition(self.layout, carried_BN, in_text_B, device, self.dropped_BN)
        return self.partition

    def _last_row(self, index: int, partition: Partition | None, device: torch.device) -> LastRow | None:
        if not any(one.reads_attention(index + 1) for one in self.reducing):
            return None
        if partition is None:
            rows_R, valid_BN = torch.arange(self.layout.batch), self.layout.spans.valid_BN
            stream = Stream(self.layout, rows_R, valid_BN, device, compact=False)
        elif partition.visual is None:
            return None
        else:
            stream = partition.visual
        return LastRow(self.engine.backbone.layers[index], stream, self.engine.windows[index])

    def _run_streams(
        self,
        part: Partition,
        index: int,
        forward: Callable[..., Any],
        hidden_BND: Tensor,
        kwargs: dict[str, Any],
        rows: LastRow | None,
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
            if rows is not None and stream is part.visual:
                # Only this stream's call is of interest.
                rows.close()
            stream.scatter(out_BND, _hidden(output))
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
                stream.closed_up = close_up(self.engine.rotary, hidden_RTD, given, stream.dropped_RT)
            given = {**given, **stream.closed_up}
        return self.engine.without_jumps(given)

    def _mask(self, stream: Stream, index: int, mask: Any, hidden_RTD: Tensor) -> Any:
        if not stream.is_compact:
            return stream.mask(mask) if isinstance(mask, Tensor) else mask
        window = self.engine.windows[index]
        is_short = window is not None and window.size < self.layout.tokens
        if isinstance(mask, Tensor) and mask.dim() == 4 and (is_short or not self.plain):
            return stream.mask(mask)
        if is_short:
            raise window_needs_mask(self.engine.config._attn_implementation)
        # Without a 4D mask the attention function is causal by itself; compact rows have no padding to hide.
        if stream.causal_mask is None:
            stream.causal_mask = (causal_mask(self.engine.config, hidden_RTD),)
        return stream.causal_mask[0]

    def _store(self, part: Partition, index: int, captures: Sequence[Capture]) -> None:
        windows, tokens = self.engine.windows, self.layout.tokens
        first = 0
        # Assisted generation asks the cache to keep more than its window, to be able to go back.
        if windows[index] is not None and not records_past(self.cache, index):
            first = windows[index].first_needed(tokens)
        packing = part.packing(first, with_places=any(windows))
        keys = packing.states([capture.keys for capture in captures])
        values = packing.states([capture.values for capture in captures])
        layer = ExitLayer(keys, values, packing.columns, tokens, windows[index], is_cut=first > 0)
        put_layer(self.cache, index, layer)

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

    def _reduce(self, k: int, carried_BN: Tensor, rows: LastRow | None) -> None:
        scores_BN = None
        dropped = [one for one in self.reducing if k < self.num_layers and one.drops(k)]
        for one in dropped:
            if one.reads_attention(k):
                if rows is None:
                    # No row carries visual tokens any more.
                    continue
                if scores_BN is None:
                    scores_BN = rows.stream.spread(rows.scores_RT, -torch.inf)
            kept_BN = one.keep(k, carried_BN, scores_BN)
            # The row's next token is read from its last one, whatever it is.
            kept_BN[torch.arange(self.layout.batch), self.layout.last_B] = True
            self.kept_BN = self.kept_BN & (kept_BN | ~carried_BN)
            carried_BN = carried_BN & self.kept_BN
        if dropped:
            has_visual_B = (self.kept_BN & self.layout.spans.visual_BN).any(1)
            self.plan.settle(self.layout.has_image_B & ~has_visual_B, k)


class Engine:
    """Decides, for every forward pass of a model inside a block, what its layers do."""

    def __init__(
        self,
        backbone: Backbone,
        policy: Policy,
        run: Run,
        positions: str = "keep",
        reductions: Sequence[Reduction] = (),
    ) -> None:
        self.backbone, self.policy, self.run, self.reductions = backbone, policy, run, reductions
        self.config = backbone.decoder.config
        self.windows = layer_windows(self.config, backbone.num_layers)
        self.rotary = getattr(backbone.decoder, "rotary_emb", None)
        self.rearranges = positions == "rearrange"
        if self.rearranges:
            check_rearrange(backbone, self.windows)
        self.prefill: Prefill | None = None
        self._closed_up: dict[int, tuple[Any, dict[str, Any]]] = {}
        self._masks: dict[tuple[int, Window | None], tuple[Any, Tensor | None]] = {}
        self._new_valid_BQ: Tensor | None = None

    def wrap(self, index: int, forward: Callable[..., Any]) -> Callable[..., Any]:
        """The replacement of a layer's forward."""
        names = list(inspect.signature(forward).parameters)

        def exit_forward(hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
            if self.prefill is None and not _is_exit_layer(kwargs.get("past_key_values"), index) and not args:
                return forward(hidden_states, **kwargs)
            # Some families pass the mask by position.
            kwargs.update(zip(names[1:], args, strict=False))
            if self.prefill is not None:
                return self.prefill.run_layer(index, forward, hidden_states, kwargs)
            if _is_exit_layer(kwargs.get("past_key_values"), index):
                self._expect(kwargs["past_key_values"].layers[index], hidden_states, kwargs)
            return forward(hidden_states, **kwargs)

        exit_forward._dyvte_engine = self  # type: ignore[attr-defined]
        return exit_forward

    def start_prefill(self, layout: Layout, sample_ids: list[str], plain: bool) -> bool:
        """Take up a prefill with visual tokens; False where it will be the stock model's."""
        rows = Rows(self.backbone.num_layers, layout.num_visual_B, layout.num_prompt_B, sample_ids)
        plan = self.policy.start(rows)
        stuck_B = layout.has_image_B & (layout.num_prompt_B == 0)
        if stuck_B.any():
            # Its next token is read from a visual token, which therefore must stay.
            warnings.warn(
                f"{int(stuck_B.sum())} rows have no text after the image: their visual tokens never leave",
                stacklevel=2,
            )
            plan.exit_layers_B[stuck_B] = self.backbone.num_layers
        tokens = TokenRows(self.backbone.num_layers, layout.spans, sample_ids)
        reducing = [reduction.start(tokens) for reduction in self.reductions]
        self.prefill = Prefill(self, layout, plan, reducing, plain)
        return self.prefill.active

    def start_decode(self, new_valid_BQ: Tensor | None) -> None:
        """Take up a pass that continues a cache."""
        self._masks.clear()
        self._closed_up.clear()
        self._new_valid_BQ = new_valid_BQ

    def without_jumps(self, kwargs: dict[str, Any]) -> dict[str, Any]:
        """Layer arguments of a text stream such that no attention function takes it for packed sequences."""
        # Flash attention looks for jumps in a single row's ids, and waits for the device to do so.
        is_flash = str(self.config._attn_implementation).startswith("flash_attention")
        if is_flash and kwargs.get("position_embeddings") is not None:
            return {**kwargs, "position_ids": None}
        return kwargs

    def finish(self, *, failed: bool) -> None:
        """The decoder has returned or raised; drop the state of the pass."""
        prefill, self.prefill = self.prefill, None
        self._masks.clear()
        self._closed_up.clear()
        self._new_valid_BQ = None
        if prefill is None or failed:
            return
        record = prefill.record()
        if record.gate_fallbacks:
            warnings.warn(
                f"{record.gate_fallbacks} rows had a gate output that is not finite: they take the fallback",
                stacklevel=2,
            )
        self.run.records.append(record)

    def _expect(self, layer: ExitLayer, hidden_BND: Tensor, kwargs: dict[str, Any]) -> None:
        new_tokens = hidden_BND.shape[1]
        layer.expect(new_tokens, self._new_valid_BQ)
        # Layers of equal content share their columns, hence their mask.
        key = (id(layer.columns), layer.window)
        if key not in self._masks:
            self._masks[key] = (layer.columns, decode_mask(self.config, hidden_BND, layer, new_tokens))
        kwargs["attention_mask"] = self._masks[key][1]
        if layer.columns.shift_B is not None:
            kwargs.update(self._closed(layer, hidden_BND, kwargs))

    def _closed(self, layer: ExitLayer, hidden_BND: Tensor, kwargs: dict[str, Any]) -> dict[str, Any]:
        key = id(layer.columns)
        if key not in self._closed_up:
            shift_B1 = layer.columns.shift_B[:, None]
            self._closed_up[key] = (layer.columns, close_up(self.rotary, hidden_BND, kwargs, shift_B1))
        return self._closed_up[key][1]


def _is_exit_layer(cache: Any, index: int) -> bool:
    layers = getattr(cache, "layers", ())
    return index < len(layers) and isinstance(layers[index], ExitLayer)


def _hidden(output: Any) -> Tensor:
    return output[0] if isinstance(output, tuple) else output
