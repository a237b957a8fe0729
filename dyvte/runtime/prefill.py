"""One prefill that contains visual tokens: each layer on at most three streams, then its gate and reductions.

Shapes: B rows, N tokens of the padded batch, R rows and T tokens of a stream, D hidden size, L layers.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from dyvte.decoder import Layout, hidden_of
from dyvte.errors import UnsupportedBackboneError
from dyvte.policies import Plan
from dyvte.reductions import ReductionPlan, VisualWork, merged
from dyvte.runtime.attention_row import LastRow
from dyvte.runtime.cache import layer_bytes, put_layer
from dyvte.runtime.later_turn import LaterTurn
from dyvte.runtime.layer_rows import GateReading, LayerRows
from dyvte.runtime.positions import dropped_before
from dyvte.runtime.prompt_memory import Decided
from dyvte.runtime.records import PrefillRecord
from dyvte.runtime.replay import Replay
from dyvte.runtime.shared_rows import SharedRows
from dyvte.runtime.split import SplitLayers
from dyvte.runtime.stack import Stack
from dyvte.runtime.streams import FrozenStream, Partition, Stream
from dyvte.runtime.visual_work import LighterLayer, VisualTokens

FindShared = Callable[[Plan, Tensor, dict[str, Any]], tuple[SharedRows | None, str | None]]
"""Called with the plan and what the first layer is given: rows that read stored images, and why others do
not."""


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
        again: Decided | None = None,
        find_shared: FindShared | None = None,
        turn: LaterTurn | None = None,
    ) -> None:
        self.replay = replay
        # Where these tokens have a past, what runs the layers.
        self.turn = turn
        # Rows that read stored images are known once the first layer is given their states.
        self._find_shared = find_shared
        self.shared: SharedRows | None = None
        self.not_shared: str | None = None
        # What was decided when the same prompts passed before; it holds for their whole answers.
        self.again = again
        self._kept_after: dict[int, Tensor] = {}
        self.stack, self.layout, self.plan, self.reducing = stack, layout, plan, reducing
        # Where visual tokens lie on their images, if a reduction must know.
        self.places_BN3 = places_BN3
        self._whole_stream: Stream | None = None
        self._visual_tokens: tuple[Stream, VisualTokens] | None = None
        # True where the decoder makes an ordinary causal mask itself.
        self.plain = plain
        self.num_layers = stack.backbone.num_layers
        self.logits_BL = torch.full((layout.batch, self.num_layers), torch.nan)
        self.freeze_logits_BL = torch.full((layout.batch, self.num_layers), torch.nan)
        self.visual_tokens_BL = torch.zeros((layout.batch, self.num_layers), dtype=torch.int64)
        self.frozen_tokens_BL = torch.zeros_like(self.visual_tokens_BL)
        self.text_tokens_BL = torch.zeros_like(self.visual_tokens_BL)
        self.score_layers: list[int] = []
        # What reductions left of each row; exits come on top.
        self.kept_BN = layout.spans.valid_BN
        self._now: LayerRows | None = None
        self._reading: GateReading | None = None
        self.partition: Partition | None = None
        self.split = SplitLayers(stack, layout, plain)
        self.cache: Any = None
        self.dropped_BN = dropped_before(layout) if stack.rearranges else None
        # Where a row's next token is read from a visual token, that one goes through all layers.
        self._may_freeze_B = layout.has_image_B & (layout.num_prompt_B > 0)
        exits_B = torch.minimum(plan.exit_layers_B, plan.freeze_layers_B)
        # Rows without an image join the text stream only if the block can change anything: else it is stock.
        self.active = bool((exits_B[layout.has_image_B] < self.num_layers).any()) or any(
            plan.asks(k) or any(one.drops(k) for one in reducing) for k in range(self.num_layers)
        )
        self.active |= any(one.enters for one in reducing) or any(
            not one.visual_work(k).is_stock for one in reducing for k in range(1, self.num_layers + 1)
        )

    def run_layer(
        self, index: int, forward: Callable[..., Any], hidden_BND: Tensor, kwargs: dict[str, Any]
    ) -> Any:
        """Layer `index` (0-based) on its streams, then its gates, then its reductions."""
        self.cache = kwargs.get("past_key_values")
        if index == 0 and any(one.enters for one in self.reducing):
            hidden_BND = self._enter(hidden_BND)
        replay = self.replay
        if replay is not None and replay.takes(index):
            self._rows_of(index)
            return self._replayed(replay, index)
        if index == 0:
            if self._find_shared is not None:
                self.shared, self.not_shared = self._find_shared(self.plan, hidden_BND, kwargs)
                self.split.alone_splits = self.active
                self.active |= self.shared is not None
            if self.plan.asks(0):
                self._ask(0, hidden_BND)
        rows = self._rows_of(index)
        partition = None if self.turn is not None else self._partition(rows, hidden_BND.device)
        scores: list[LastRow] = []

        def around(stream: Stream | FrozenStream) -> contextlib.ExitStack:
            return self._around(index, stream, hidden_BND.device, scores)

        if self.turn is not None and self.active:
            output = self.turn.run(index, forward, hidden_BND, kwargs, rows.in_text_B, rows.frozen_B)
        elif partition is None:
            whole = self._whole(hidden_BND.device)
            with contextlib.nullcontext() if whole is None else around(whole):
                output = forward(hidden_BND, **kwargs)
        else:
            exits_B = self.plan.exit_layers_B
            output = self.split.run(partition, index, forward, hidden_BND, kwargs, around, exits_B)
        k = index + 1
        if self.plan.asks(k):
            self._ask(k, hidden_of(output))
        gone_B = self._reduce(k, rows.carried_BN, scores)
        if replay is not None:
            replay.add(output, self.kept_BN, gone_B, bool(scores), self.cache, index)
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

    def decided(self) -> Decided:
        """What was decided for the prompts of this pass, their answers omitted."""
        plan = self.plan
        return Decided(plan.exit_layers_B.clone(), plan.freeze_layers_B.clone(), dict(self._kept_after))

    def record(self) -> PrefillRecord:
        """What happened, for the user."""
        plan, has_image_B = self.plan, self.layout.has_image_B
        layers = getattr(self.cache, "layers", ())
        held = tuple(layer_bytes(layer) for layer in layers)
        alone = tuple(self.split.bytes_alone.get(i, own) for i, own in enumerate(held))
        none_B = torch.zeros_like(has_image_B)
        return PrefillRecord(
            exit_layers_B=torch.where(has_image_B, plan.exit_layers_B, -1),
            freeze_layers_B=torch.where(
                has_image_B, torch.minimum(plan.freeze_layers_B, plan.exit_layers_B), -1
            ),
            gate_logits_BL=self.logits_BL,
            freeze_logits_BL=self.freeze_logits_BL,
            num_visual_B=self.layout.num_visual_B,
            kv_bytes=held,
            kv_bytes_alone=alone,
            shared_B=none_B if self.shared is None else self.shared.is_shared_B,
            not_shared=self.not_shared,
            gate_fallbacks=plan.num_fallbacks,
            visual_tokens_BL=self.visual_tokens_BL,
            frozen_tokens_BL=self.frozen_tokens_BL,
            text_tokens_BL=self.text_tokens_BL,
            score_layers=tuple(self.score_layers),
            found=plan.found,
        )

    def _rows_of(self, index: int) -> LayerRows:
        """What layer `index` does with each row; counts its tokens."""
        in_text_B = (self.plan.exit_layers_B <= index) | ~self.layout.has_image_B
        frozen_B = self.plan.freeze_layers_B <= index
        if self._work(index).frozen:
            frozen_B = torch.ones_like(frozen_B)
        frozen_B = frozen_B & self._may_freeze_B & ~in_text_B
        now = self._now
        # Most layers are as the one before.
        if now is None or not now.is_of(self.kept_BN, in_text_B, frozen_B):
            now = self._now = LayerRows.of(self.layout, self.kept_BN, in_text_B, frozen_B)
        self.visual_tokens_BL[:, index] = now.num_visual_B
        self.frozen_tokens_BL[:, index] = now.num_frozen_B
        self.text_tokens_BL[:, index] = now.num_text_B
        return now

    def _partition(self, rows: LayerRows, device: torch.device) -> Partition | None:
        if not self.active:
            return None
        now = (rows.carried_BN, rows.in_text_B, rows.frozen_B, device)
        splits = rows.in_text_B.any() or rows.frozen_B.any() or self.shared is not None
        if not splits and torch.equal(rows.carried_BN, self.layout.spans.valid_BN):
            return None
        if self.partition is None or not self.partition.is_of(*now):
            shared = None
            if self.shared is not None:
                shared = self.shared.part(rows.in_text_B, rows.frozen_B, self.plan.freeze_layers_B, device)
            self.partition = Partition(self.layout, *now, self.dropped_BN, shared)
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
        self, index: int, stream: Stream | FrozenStream, device: torch.device, scores: list[LastRow]
    ) -> contextlib.ExitStack:
        """What the reductions want around layer `index` on a stream that carries visual tokens."""
        around, layer = contextlib.ExitStack(), self.stack.backbone.layers[index]
        work, is_frozen = self._work(index), isinstance(stream, FrozenStream)
        if not (is_frozen or work.frozen or work.is_stock):
            around.enter_context(LighterLayer(layer, self._tokens(stream, device), work, self.stack.weights))
        if self.again is None and any(one.reads_attention(index + 1) for one in self.reducing):
            if not scores:
                self.score_layers.append(index + 1)
            tokens, keys = (stream.text, stream.keys) if is_frozen else (stream, None)
            last = LastRow(layer, tokens, self.stack.windows[index], self.layout.last_B, keys)
            scores.append(around.enter_context(last))
        return around

    def _work(self, index: int) -> VisualWork:
        work = merged([one.visual_work(index + 1) for one in self.reducing])
        if (work.window is not None or work.heads is not None) and not (self.plain or work.frozen):
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

    @torch.no_grad()
    def _ask(self, k: int, hidden_BND: Tensor) -> None:
        asking_B = self.plan.asking_rows()
        reading = self._reading_of(asking_B, hidden_BND.device)
        if reading.reader is None:
            return
        features_BF = reading.reader(hidden_BND[:, reading.span])
        # The one wait for the device of a gated layer.
        logits = self.plan.logits(k, features_BF).float().cpu()
        exit_B, freeze_B = logits[:2] if logits.dim() == 2 else (logits, None)
        if k > 0:
            open_B = asking_B & (self.plan.exit_layers_B > k)
            self.logits_BL[open_B, k - 1] = exit_B[open_B]
        if freeze_B is not None:
            open_B = asking_B & (self.plan.freeze_layers_B > k)
            self.freeze_logits_BL[open_B, k] = freeze_B[open_B]
        self.plan.step(k, logits)

    def _reading_of(self, asking_B: Tensor, device: torch.device) -> GateReading:
        """Which tokens the gates read of the rows that ask; as for the layer before, mostly."""
        known = self._reading
        if known is None or not known.is_of(self.kept_BN, asking_B, device):
            spans = self.layout.spans
            known = GateReading.of(self.plan.features, spans, self.kept_BN, asking_B, device)
            self._reading = known
        return known

    def _enter(self, hidden_BND: Tensor) -> Tensor:
        """What the reductions let into the first layer, and in which state."""
        carried_BN = self.kept_BN & ~self.layout.spans.answer_BN
        before_BN = carried_BN
        for one in self.reducing:
            if one.enters:
                hidden_BND, kept_BN = one.enter(hidden_BND, carried_BN, self.places_BN3)
                carried_BN = carried_BN & kept_BN
        # The row's next token is read from its last one, whatever it is.
        carried_BN[torch.arange(self.layout.batch), self.layout.last_B] = True
        if self.again is not None:
            self._reduce_again(0)
            return hidden_BND
        self.kept_BN = self._kept_after[0] = self.kept_BN & (carried_BN | ~before_BN)
        self.plan.settle(self._without_visual(), 0)
        return hidden_BND

    def _without_visual(self) -> Tensor:
        """(B,) bool: rows whose last visual token is gone."""
        return self.layout.has_image_B & ~(self.kept_BN & self.layout.spans.visual_BN).any(1)

    def _reduce(self, k: int, carried_BN: Tensor, scores: Sequence[LastRow]) -> Tensor | None:
        """Let tokens go after layer k; (B,) bool: rows without a visual token now, None where none could."""
        if self.again is not None:
            self._reduce_again(k)
            return None
        scores_BN, answer_BN = None, self.layout.spans.answer_BN
        carried_BN = carried_BN & ~answer_BN
        dropped = [one for one in self.reducing if k < self.num_layers and one.drops(k)]
        for one in dropped:
            if one.reads_attention(k):
                if not scores:
                    # No row carries visual tokens any more.
                    continue
                if scores_BN is None:
                    scores_BN = torch.stack([last.scores_BN for last in scores]).amax(0)
            kept_BN = one.keep(k, carried_BN, scores_BN)
            # The row's next token is read from its last one, whatever it is.
            kept_BN[torch.arange(self.layout.batch), self.layout.last_B] = True
            self.kept_BN = self.kept_BN & (kept_BN | ~carried_BN)
            carried_BN = carried_BN & self.kept_BN
        if not dropped:
            return None
        self._kept_after[k] = self.kept_BN
        gone_B = self._without_visual()
        self.plan.settle(gone_B, k)
        return gone_B

    def _reduce_again(self, k: int) -> None:
        """Let the tokens go that went after layer k when the prompts passed before."""
        if k in self.again.kept:
            before_BP = self.again.kept[k]
            kept_BN = self.kept_BN.clone()
            kept_BN[:, : before_BP.shape[1]] &= before_BP
            self.kept_BN = kept_BN
