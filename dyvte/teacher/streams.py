"""Every schedule in one forward: the full model and all that branches off it run side by side.

While :func:`all_exits` is active, each decoder layer is called on the visual tokens and the full model's
text, and again on the streams started so far, batched along the batch axis: text that reads visual tokens
frozen after f layers, and text whose visual tokens left after k. The model around the layers sees one batch
of the usual shape until the last layer, which hands on the states of all streams at the predicted positions:
the model's own norm and head turn them into logits.

In the last layer only the tokens that are read go on to attention and MLP; the others give keys and values.

Shape letters: B rows, N tokens, T suffix tokens, R predicted positions of all rows, D hidden, F features,
L layers, S schedules (the full model is the last).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from dyvte.backbones import Backbone
from dyvte.decoder import layer_windows, returns_early, wrap_layers
from dyvte.decoder.vision import each_image_once
from dyvte.errors import UnsupportedBackboneError
from dyvte.gates import DEFAULT_FEATURES, check_features, reads_visual
from dyvte.runtime.frozen import check_can_freeze
from dyvte.spans import Spans, text_between
from dyvte.teacher.calls import LayerCall
from dyvte.teacher.images import Images, WholeRows, find_images
from dyvte.teacher.memory import PassPlan, PassSizes, pass_sizes, plan_pass
from dyvte.teacher.schedules import Schedules
from dyvte.teacher.slots import StreamSlots
from dyvte.teacher.texts import TextStreams

# Rows are taken through a layer together while the shortest has at least this share of the longest's tokens.
_ALIKE = 0.75


class ExitStreams:
    """State of one pass; see :func:`all_exits`.

    Attributes
    ----------
    schedules:
        What the pass labels.
    slots, plan, num_images:
        Where suffix and predicted positions lie, how the pass is cut up, and how many visual streams it has;
        set when the first layer runs.
    images:
        The visual streams, while layers run.
    not_shared:
        Why rows that ask about the same image do not share its stream, naming the family; None otherwise.
    features_BF:
        One entry per layer that has run: what the gate after it reads.
    embeddings_BF, frozen_features:
        What a gate reads before the first layer, and in the frozen streams, by (f, l); where something is
        frozen.
    states_SRD:
        After the last layer: its states at all predicted positions, rows one after the other.
    """

    slots: StreamSlots
    plan: PassPlan
    images: Images
    num_images: int
    states_SRD: Tensor

    def __init__(
        self,
        backbone: Backbone,
        spans: Spans,
        predict_BN: Tensor,
        schedules: Schedules,
        features: Sequence[str],
        exits_per_chunk: int | None,
        memory_budget: int | None,
        share_images: bool,
    ) -> None:
        self.backbone, self.spans, self.predict_BN = backbone, spans, predict_BN
        self.schedules, self.features = schedules, check_features(features)
        self.features_BF: list[Tensor] = []
        self.embeddings_BF: Tensor | None = None
        self.frozen_features: dict[tuple[int, int], Tensor] = {}
        self.implementation = getattr(backbone.decoder.config, "_attn_implementation", None) or "eager"
        self.not_shared: str | None = None
        self._chunk, self._budget, self._shares = exits_per_chunk, memory_budget, share_images
        self._texts: list[TextStreams] = []
        self._replayed: Tensor | None = None
        self._beside_hidden: tuple[Any, ...] | None = None

    # --- what the wrapped layers call ---

    def run_layer(
        self, index: int, original: Callable[..., Any], hidden_BND: Tensor, kwargs: dict[str, Any]
    ) -> Any:
        """One decoder layer (0-based) on all streams started so far."""
        last = index == self.backbone.num_layers - 1
        if self._replayed is not None:
            return self._handed_on(self._replayed if last else hidden_BND)
        others = {name: value for name, value in kwargs.items() if name != "attention_mask"}
        call = LayerCall(
            self.backbone.layers[index], original, others, kwargs.get("attention_mask"), self.implementation
        )
        if index == 0:
            self._start(hidden_BND, call)
        self.images.enter(hidden_BND, self._texts)
        self._branch(index)
        cut = last and self._can_be_cut(call)
        handed, prefix = self.images.run(call, self._texts, cut=cut)
        self._run_frozen(call, prefix)
        for text in self._texts:
            known = self.images.of_rows(text, prefix, text.slots.prefix.index.shape[1])
            (text.run_left_last if cut else text.run_left)(call, known)
        self._keep_features(index + 1)
        if not last:
            return handed
        self._beside_hidden = handed[1:] if isinstance(handed, tuple) else None
        self.states_SRD = self._ordered([text.predicted(cut=cut) for text in self._texts])
        # What the layers held gives way to the logits.
        self._texts = []
        del self.images
        return self._handed_on(self._block(0))

    def block_starts(self) -> range:
        """Where the blocks of predicted positions start whose logits are computed together."""
        return range(0, self.states_SRD.shape[1], self.plan.positions_per_head)

    def as_block(self, start: int, logits: Tensor) -> tuple[slice, Tensor]:
        """Logits of one block as the model gives them, as (its positions, (S, some R, V))."""
        logits_SRV = logits[0].unflatten(0, (len(self.schedules.pairs), -1))
        return slice(start, start + logits_SRV.shape[1]), logits_SRV

    def further_logits(self, model: nn.Module, start: int) -> Tensor:
        """What the model gives for a block after the first, which the pass itself gave.

        Its states go through the model's own norm and head alone: a forward over one text token, whose layers
        hand on the states that were kept.
        """
        visual = self.backbone.visual_token_ids
        text_token = next(i for i in range(len(visual) + 1) if i not in visual)
        one = torch.ones(1, 1, dtype=torch.long, device=self.states_SRD.device)
        self._replayed = self._block(start)
        try:
            output = model(input_ids=text_token * one, attention_mask=one, use_cache=False, return_dict=True)
            return output.logits
        finally:
            self._replayed = None

    def _block(self, start: int) -> Tensor:
        """(1, S r, D): states at some positions, as one row of tokens."""
        return self.states_SRD[:, start : start + self.plan.positions_per_head].flatten(0, 1)[None]

    def _handed_on(self, hidden: Tensor) -> Any:
        return hidden if self._beside_hidden is None else (hidden, *self._beside_hidden)

    # --- the layers ---

    def _start(self, hidden_BND: Tensor, call: LayerCall) -> None:
        self.slots = StreamSlots.build(self.spans, self.predict_BN, call.mask)
        self.images = WholeRows(self.spans, self.slots, hidden_BND)
        if self._shares:
            self.images, self.not_shared = find_images(
                self.backbone, self.spans, self.slots, hidden_BND, call
            )
        self.num_images = self.images.num_images
        self.plan = plan_pass(
            self._sizes(hidden_BND),
            budget=self._budget,
            exits_per_call=self._chunk,
            may_cut_head=not is_sharded(self.backbone.model),
        )
        for rows_R in self._alike():
            slots = self.slots if rows_R is None else self.slots.rows(rows_R)
            per_call = self.plan.exits_per_call
            if rows_R is not None and self._chunk is None:
                per_call = per_call * self.slots.suffix.index.numel() // max(1, slots.suffix.index.numel())
            text = TextStreams(slots, rows_R, self.spans, self.features, per_call)
            text.full_RTD = slots.suffix.take(hidden_BND if rows_R is None else hidden_BND[rows_R])
            self._texts.append(text)
        if self.schedules.freezes:
            self.embeddings_BF = self._features()

    def _alike(self) -> list[Tensor | None]:
        """Rows that run together: all, or (where they share images, and come in all lengths) those of about
        the same length."""
        if isinstance(self.images, WholeRows):
            return [None]
        length_B = self.slots.suffix.valid.sum(1)
        order_B = length_B.argsort(descending=True, stable=True)
        groups: list[list[int]] = []
        longest = 0
        for row, length in zip(order_B.tolist(), length_B[order_B].tolist(), strict=True):
            if not groups or length < _ALIKE * longest:
                groups.append([])
                longest = length
            groups[-1].append(row)
        return [torch.tensor(sorted(group), device=length_B.device) for group in groups]

    def _branch(self, index: int) -> None:
        """Start the streams whose visual tokens leave, or freeze, before this layer."""
        for text in self._texts:
            if index in self.schedules.exits:
                text.leave()
            if index in self.schedules.freezes:
                text.freeze()
        if index in self.schedules.freezes:
            self.images.freeze()

    def _run_frozen(self, call: LayerCall, prefix: Any) -> None:
        for place, visual in enumerate(self.images.frozen.keys_values(call, prefix)):
            for text in self._texts:
                text.frozen[place] = text.read(
                    call,
                    text.frozen[place],
                    self.images.of_rows(text, prefix, text.slots.prefix.index.shape[1]),
                    self.images.of_rows(text, visual, text.slots.visual.index.shape[1]),
                )

    def _keep_features(self, layer: int) -> None:
        """What gates read after a layer, in the full stream and in the frozen ones."""
        self.features_BF.append(self._features())
        for place, f in enumerate(self.schedules.frozen_before(layer)):
            self.frozen_features[f, layer] = self._features(place)

    def _features(self, place: int | None = None) -> Tensor:
        """(B, F) of the full stream as it is now, or of a frozen one."""
        visual = None if place is None else self.images.frozen.states[place]
        looks = reads_visual(self.features)
        parts = [
            text.features(
                text.full_RTD if place is None else text.frozen[place],
                self.images.states_of(text, visual) if looks else None,
            )
            for text in self._texts
        ]
        if self._texts[0].rows_R is None:
            return parts[0]
        rows_B = torch.cat([text.rows_R for text in self._texts])
        return torch.cat(parts)[rows_B.argsort().to(parts[0].device)]

    def _ordered(self, parts: Sequence[Tensor]) -> Tensor:
        """(S, R, D) states of groups of rows, in the order of the batch's predicted positions."""
        if self._texts[0].rows_R is None:
            return parts[0]
        number_BA = torch.full_like(self.slots.predict.index, -1)
        valid_BA = self.slots.predict.valid
        number_BA[valid_BA] = torch.arange(int(valid_BA.sum()), device=valid_BA.device)
        rows_B = torch.cat([text.rows_R for text in self._texts])
        number_R = number_BA[rows_B][valid_BA[rows_B]]
        return torch.cat(list(parts), 1)[:, number_R.argsort().to(parts[0].device)]

    def _sizes(self, hidden_BND: Tensor) -> PassSizes:
        return pass_sizes(
            self.backbone.model.config,
            hidden_BND,
            self.slots,
            self.schedules,
            images=None if isinstance(self.images, WholeRows) else self.images.image.index.shape,
            features=len(self.features),
            eager=self.implementation == "eager",
        )

    def _can_be_cut(self, call: LayerCall) -> bool:
        """May the last layer stop after its keys and values? Not with masks or features that need all
        tokens."""
        return returns_early(call.layer) and not (
            "flash" in self.implementation or reads_visual(self.features)
        )


@contextmanager
def all_exits(
    backbone: Backbone,
    spans: Spans,
    predict_BN: Tensor,
    *,
    exits: Sequence[int] | None = None,
    freezes: Sequence[int] = (),
    features: Sequence[str] = DEFAULT_FEATURES,
    exits_per_chunk: int | None = None,
    memory_budget: int | None = None,
    share_images: bool = True,
) -> Iterator[ExitStreams]:
    """Make the model's next forward return logits of all schedules; nothing is left on the model afterwards.

    The forward must run without a cache over exactly the batch that ``spans`` describes. Its logits are those
    of the first block of positions (:meth:`ExitStreams.as_block`); :meth:`ExitStreams.further_logits` gives
    the others.

    Parameters
    ----------
    predict_BN:
        (B, N) bool: text positions whose next-token logits are wanted.
    exits:
        Exit layers, L always among them. None: all, 0..L.
    freezes:
        Freeze layers, each in 0..L-1; every exit behind each of them is a schedule of its own.
    features:
        What is kept of each layer's output for the gates; see :func:`dyvte.gates.prompt_features`.
    exits_per_chunk:
        Streams without visual tokens per layer call. None: as many as ``memory_budget`` allows.
    memory_budget:
        Bytes beside the weights, see :func:`~dyvte.teacher.memory.plan_pass`. None: no call is larger than
        the full model's own.
    share_images:
        Rows that hold the same image behind the same text share its visual stream.

    Raises
    ------
    ExitRuntimeError
        If the model is inside another block of dyvte.
    MemoryBudgetError
        If the batch does not fit the budget even with one exit at a time (raised by the forward).
    UnsupportedBackboneError
        If something is to be frozen in a family that cannot, by name.
    """
    if exits_per_chunk is not None and exits_per_chunk < 1:
        raise ValueError(f"exits_per_chunk must be at least 1, found {exits_per_chunk}")
    schedules = Schedules.of(exits, freezes, backbone.num_layers)
    streams = ExitStreams(
        backbone, spans, predict_BN, schedules, features, exits_per_chunk, memory_budget, share_images
    )
    layers = list(backbone.layers)[: backbone.num_layers]
    if schedules.freezes:
        check_can_freeze(backbone)
    if "flash" in streams.implementation:
        _check_flash(backbone, spans, reads=bool(schedules.freezes))
    give_back = wrap_layers(layers, streams.run_layer)
    try:
        with each_image_once(backbone) if share_images else nullcontext():
            yield streams
    finally:
        give_back()


def is_sharded(model: nn.Module) -> bool:
    """Are the weights gathered by all processes together (ZeRO-3)? Then all must run the same calls."""
    return any(hasattr(parameter, "ds_id") for parameter in model.parameters())


def _check_flash(backbone: Backbone, spans: Spans, *, reads: bool) -> None:
    """Flash attention counts a window in keys, and a stream has fewer of them than its positions span; and it
    takes the last keys for the queries' own."""
    num_tokens = spans.valid_BN.shape[1]
    windows = layer_windows(backbone.decoder.config, backbone.num_layers)
    short = [window.size for window in windows if window is not None and window.size < num_tokens]
    if short:
        raise UnsupportedBackboneError(
            f"flash attention cannot express a sliding window of {min(short)} over "
            f"{num_tokens} tokens that visual tokens have left: load the backbone with "
            "attn_implementation='sdpa' or 'eager'"
        )
    if reads and text_between(spans):
        raise UnsupportedBackboneError(
            f"flash attention cannot freeze visual tokens of {backbone.model.config.model_type} that stand "
            "behind text which is updated: load the backbone with attn_implementation='sdpa' or 'eager'"
        )
