"""Every exit in one forward: the full stream and all exit streams run side by side through the decoder.

While :func:`all_exits` is active, each decoder layer is called on the full batch, and again on the exit
streams started so far (stream k leaves its visual tokens behind after k layers), batched along the batch
axis. The model around the layers sees one batch of the usual shape until the last layer, which hands on the
states of all streams at the predicted positions: the model's own norm and head turn them into logits.

In the last layer only the tokens that are read go on to attention and MLP; the others give keys and values.

Shape letters: B rows, N tokens, T suffix tokens, R predicted positions of all rows, D hidden, F features,
L layers, K exits (the full model is the last).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from dyvte.backbones import Backbone
from dyvte.backbones.sizes import decoder_shape
from dyvte.decoder import Picker, Slots, layer_windows, wrap_layers
from dyvte.decoder.caches import Capture, Given, Prefixed, keys_and_values
from dyvte.decoder.masks import cut_mask
from dyvte.errors import UnsupportedBackboneError
from dyvte.gates import DEFAULT_FEATURES, check_features, prompt_features, reads_visual
from dyvte.spans import Spans
from dyvte.teacher.memory import PassPlan, PassSizes, plan_pass
from dyvte.teacher.slots import StreamSlots, repeat_streams


class ExitStreams:
    """State of one pass; see :func:`all_exits`.

    Attributes
    ----------
    exits:
        Exit layers of the pass, ascending; the last is L, the full model.
    slots, plan:
        Where suffix and predicted positions lie, and how the pass is cut up; set when the first layer runs.
    features_BF:
        One entry per layer that has run: what the gate after it reads.
    states_KRD:
        After the last layer: its states at all predicted positions, rows one after the other.
    """

    slots: StreamSlots
    plan: PassPlan
    states_KRD: Tensor

    def __init__(
        self,
        backbone: Backbone,
        spans: Spans,
        predict_BN: Tensor,
        exits: Sequence[int],
        features: Sequence[str],
        exits_per_chunk: int | None,
        memory_budget: int | None,
    ) -> None:
        self.backbone, self.spans, self.predict_BN = backbone, spans, predict_BN
        self.exits, self.features = tuple(exits), check_features(features)
        self.features_BF: list[Tensor] = []
        self.implementation = getattr(backbone.decoder.config, "_attn_implementation", None) or "eager"
        self._chunk, self._budget = exits_per_chunk, memory_budget
        self._streams: list[Tensor] = []
        self._masks: dict[int, tuple[Any, Any]] = {}
        self._replayed: Tensor | None = None
        self._beside_hidden: tuple[Any, ...] | None = None

    # --- what the wrapped layers call ---

    def run_layer(
        self, index: int, original: Callable[..., Any], hidden_BND: Tensor, kwargs: dict[str, Any]
    ) -> Any:
        """One decoder layer (0-based) on the full stream and on the exit streams started so far."""
        last = index == self.backbone.num_layers - 1
        if self._replayed is not None:
            return self._handed_on(self._replayed if last else hidden_BND)
        if index == 0:
            self._start(hidden_BND, kwargs)
        if index in self.exits:
            self._streams.append(self.slots.suffix.take(hidden_BND))
        if last and self._can_be_cut(self.backbone.layers[index]):
            full_BTD = self._run_last(original, hidden_BND, kwargs)
        else:
            full_BND = self._run_whole(original, hidden_BND, kwargs)
            if not last:
                return self._handed_on(full_BND)
            full_BTD = self.slots.suffix.take(full_BND)
            self._streams = [self.slots.predict_suffix.take(stream) for stream in self._streams]
        predict = self.slots.predict_suffix
        states = [states_BAD[predict.valid] for states_BAD in (*self._streams, predict.take(full_BTD))]
        self.states_KRD = torch.stack(states)
        self._streams, self._masks = [], {}
        return self._handed_on(self._block(0))

    def block_starts(self) -> range:
        """Where the blocks of predicted positions start whose logits are computed together."""
        return range(0, self.states_KRD.shape[1], self.plan.positions_per_head)

    def as_block(self, start: int, logits: Tensor) -> tuple[slice, Tensor]:
        """Logits of one block as the model gives them, as (its positions, (K, some R, V))."""
        logits_KRV = logits[0].unflatten(0, (len(self.exits), -1))
        return slice(start, start + logits_KRV.shape[1]), logits_KRV

    def further_logits(self, model: nn.Module, start: int) -> Tensor:
        """What the model gives for a block after the first, which the pass itself gave.

        Its states go through the model's own norm and head alone: a forward over one text token, whose layers
        hand on the states that were kept.
        """
        visual = self.backbone.visual_token_ids
        text_token = next(i for i in range(len(visual) + 1) if i not in visual)
        one = torch.ones(1, 1, dtype=torch.long, device=self.states_KRD.device)
        self._replayed = self._block(start)
        try:
            output = model(input_ids=text_token * one, attention_mask=one, use_cache=False, return_dict=True)
            return output.logits
        finally:
            self._replayed = None

    def _block(self, start: int) -> Tensor:
        """(1, K r, D): states at some positions, as one row of tokens."""
        return self.states_KRD[:, start : start + self.plan.positions_per_head].flatten(0, 1)[None]

    def _handed_on(self, hidden: Tensor) -> Any:
        return hidden if self._beside_hidden is None else (hidden, *self._beside_hidden)

    def _hidden(self, output: Any) -> Tensor:
        if isinstance(output, tuple):
            self._beside_hidden = output[1:]
            return output[0]
        return output

    # --- the layers ---

    def _start(self, hidden_BND: Tensor, kwargs: dict[str, Any]) -> None:
        self.slots = StreamSlots.build(self.spans, self.predict_BN, kwargs.get("attention_mask"))
        num_tokens = hidden_BND.shape[1]
        self._of_suffix = Picker.of(self.slots.suffix, num_tokens)
        self._of_predict = Picker.of(self.slots.predict, num_tokens)
        self.plan = plan_pass(
            self._sizes(hidden_BND),
            budget=self._budget,
            exits_per_call=self._chunk,
            may_cut_head=not is_sharded(self.backbone.model),
        )

    def _run_whole(self, original: Callable[..., Any], hidden_BND: Tensor, kwargs: dict[str, Any]) -> Tensor:
        """A layer on all tokens of all streams; (B, N, D) of the full stream."""
        rows = len(hidden_BND)
        recorder = Capture()
        full_BND = self._hidden(original(hidden_BND, **{**kwargs, "past_key_values": recorder}))
        keys, values = self._prefix_of(recorder.keys), self._prefix_of(recorder.values)
        own = self._of_suffix(_without_mask(kwargs))
        own["attention_mask"] = self._mask(kwargs.get("attention_mask"))
        for chunk, repeated in self._chunks(rows):
            arguments = {name: repeated(value) for name, value in own.items()}
            arguments["past_key_values"] = Prefixed(repeated(keys), repeated(values))
            output = self._hidden(original(torch.cat(self._streams[chunk]), **arguments))
            self._streams[chunk] = output.split(rows)
        self.features_BF.append(self._features(full_BND, None))
        return full_BND

    def _run_last(self, original: Callable[..., Any], hidden_BND: Tensor, kwargs: dict[str, Any]) -> Tensor:
        """The last layer on the tokens that are read; (B, T, D) of the full stream, and leaves streams at
        the predicted positions."""
        slots, rows, num_tokens = self.slots, *hidden_BND.shape[:2]
        mask = kwargs.get("attention_mask")
        order_BN = torch.arange(num_tokens, device=hidden_BND.device).expand(rows, -1)
        everything = Slots(order_BN, self.spans.valid_BN)
        keys, values = keys_and_values(original, hidden_BND, **kwargs)
        kwargs = _without_mask(kwargs)
        suffix = self._of_suffix(kwargs)
        read = {**suffix, "attention_mask": cut_mask(mask, slots.suffix, everything, self.implementation)}
        read["past_key_values"] = Given(keys, values)
        full_BTD = self._hidden(original(slots.suffix.take(hidden_BND), **read))
        self.features_BF.append(self._features(None, full_BTD))

        prefix_keys, prefix_values = self._prefix_of(keys), self._prefix_of(values)
        suffix["attention_mask"] = self._mask(mask)
        predicted = self._of_predict(kwargs)
        predicted["attention_mask"] = cut_mask(mask, slots.predict, slots.keys, self.implementation)
        for chunk, repeated in self._chunks(rows):
            part = self._streams[chunk]
            arguments = {name: repeated(value) for name, value in suffix.items()}
            keys, values = keys_and_values(original, torch.cat(part), **arguments)
            arguments = {name: repeated(value) for name, value in predicted.items()}
            arguments["past_key_values"] = Given(
                torch.cat((repeated(prefix_keys), keys), -2), torch.cat((repeated(prefix_values), values), -2)
            )
            queries = torch.cat([slots.predict_suffix.take(stream) for stream in part])
            self._streams[chunk] = self._hidden(original(queries, **arguments)).split(rows)
        return full_BTD

    def _can_be_cut(self, layer: nn.Module) -> bool:
        """May the last layer stop after its keys and values? Not under hooks that expect every submodule to
        return (offloading, gathering), nor with masks or features that need all tokens."""
        inner = [module for module in layer.modules() if module is not layer]
        hooked = any(module._forward_hooks or module._forward_pre_hooks for module in inner)
        offloaded = any(hasattr(module, "_hf_hook") for module in layer.modules())
        return not (hooked or offloaded or "flash" in self.implementation or reads_visual(self.features))

    def _chunks(self, rows: int) -> Iterator[tuple[slice, Callable[[Any], Any]]]:
        """Groups of streams that fit one layer call, and the function that repeats an argument for them."""
        size = self.plan.exits_per_call
        for start in range(0, len(self._streams), size):
            count = min(size, len(self._streams) - start)
            yield slice(start, start + count), lambda value, count=count: repeat_streams(value, count, rows)

    def _prefix_of(self, keys: Tensor) -> Tensor:
        return self.slots.prefix.take(keys.transpose(1, 2)).transpose(1, 2)

    def _mask(self, mask: Any) -> Any:
        # Layers share a few mask objects; the mask itself is kept so that its id stays its own.
        if id(mask) not in self._masks:
            made = cut_mask(mask, self.slots.suffix, self.slots.keys, self.implementation)
            self._masks[id(mask)] = (mask, made)
        return self._masks[id(mask)][1]

    def _features(self, full_BND: Tensor | None, full_BTD: Tensor | None) -> Tensor:
        """What the gate after this layer reads, from all tokens or from the suffix alone."""
        if full_BND is not None and reads_visual(self.features):
            return prompt_features(full_BND, self.spans.prompt_BN, self.spans.visual_BN, self.features)
        suffix = self.slots.suffix
        prompt_BT = suffix.take(self.spans.prompt_BN) & suffix.valid
        states_BTD = suffix.take(full_BND) if full_BND is not None else full_BTD
        return prompt_features(states_BTD, prompt_BT, names=self.features)

    def _sizes(self, hidden_BND: Tensor) -> PassSizes:
        rows, tokens, hidden = hidden_BND.shape
        try:
            shape = decoder_shape(self.backbone.model.config)
            query, key = shape.num_heads * shape.head_dim, shape.num_kv_heads * shape.head_dim
            heads, ffn, vocab = shape.num_heads, max(shape.ffn_sizes_L), shape.vocab_size
        except UnsupportedBackboneError:  # a config without these names: a usual shape
            query, key, heads, ffn, vocab = hidden, hidden, max(1, hidden // 64), 4 * hidden, 32 * hidden
        return PassSizes(
            rows=rows,
            tokens=tokens,
            prefix=self.slots.prefix.index.shape[1],
            suffix=self.slots.suffix.index.shape[1],
            predicted=int(self.slots.predict.valid.sum()),
            exits=len(self.exits),
            num_layers=self.backbone.num_layers,
            hidden=hidden,
            query_width=query,
            key_width=key,
            heads=heads,
            ffn=ffn,
            vocab=vocab,
            features=len(self.features) * hidden,
            element_size=hidden_BND.element_size(),
            eager=self.implementation == "eager",
        )


@contextmanager
def all_exits(
    backbone: Backbone,
    spans: Spans,
    predict_BN: Tensor,
    *,
    exits: Sequence[int] | None = None,
    features: Sequence[str] = DEFAULT_FEATURES,
    exits_per_chunk: int | None = None,
    memory_budget: int | None = None,
) -> Iterator[ExitStreams]:
    """Make the model's next forward return logits of all exits; nothing is left on the model afterwards.

    The forward must run without a cache over exactly the batch that ``spans`` describes. Its logits are those
    of the first block of positions (:meth:`ExitStreams.as_block`); :meth:`ExitStreams.further_logits` gives
    the others.

    Parameters
    ----------
    predict_BN:
        (B, N) bool: text positions whose next-token logits are wanted.
    exits:
        Exit layers, see :func:`check_exits`. None: all, 0..L.
    features:
        What is kept of each layer's output for the gates; see :func:`dyvte.gates.prompt_features`.
    exits_per_chunk:
        Exit streams per layer call. None: as many as ``memory_budget`` allows.
    memory_budget:
        Bytes beside the weights, see :func:`~dyvte.teacher.memory.plan_pass`. None: no call is larger than
        the full model's own.

    Raises
    ------
    ExitRuntimeError
        If the model is inside another block of dyvte.
    MemoryBudgetError
        If the batch does not fit the budget even with one exit at a time (raised by the forward).
    """
    if exits_per_chunk is not None and exits_per_chunk < 1:
        raise ValueError(f"exits_per_chunk must be at least 1, found {exits_per_chunk}")
    exits = check_exits(exits, backbone.num_layers)
    streams = ExitStreams(backbone, spans, predict_BN, exits, features, exits_per_chunk, memory_budget)
    layers = list(backbone.layers)[: backbone.num_layers]
    if "flash" in streams.implementation:
        _check_windows(backbone, predict_BN.shape[1])
    give_back = wrap_layers(layers, streams.run_layer)
    try:
        yield streams
    finally:
        give_back()


def check_exits(exits: Sequence[int] | None, num_layers: int) -> tuple[int, ...]:
    """Exit layers of a pass, ascending: those given and L, which is the full model; None: all, 0..L.

    Raises
    ------
    ValueError
        If one does not lie in 0..L.
    """
    if exits is None:
        return tuple(range(num_layers + 1))
    found = tuple(sorted({*map(int, exits), num_layers}))
    if not 0 <= found[0] <= found[-1] == num_layers:
        raise ValueError(f"exits {tuple(exits)}: expected exit layers in 0..{num_layers}")
    return found


def _without_mask(kwargs: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in kwargs.items() if name != "attention_mask"}


def is_sharded(model: nn.Module) -> bool:
    """Are the weights gathered by all processes together (ZeRO-3)? Then all must run the same calls."""
    return any(hasattr(parameter, "ds_id") for parameter in model.parameters())


def _check_windows(backbone: Backbone, num_tokens: int) -> None:
    """Flash attention counts a window in keys, and an exit stream has fewer of them than its positions
    span."""
    windows = layer_windows(backbone.decoder.config, backbone.num_layers)
    short = [window.size for window in windows if window is not None and window.size < num_tokens]
    if short:
        raise UnsupportedBackboneError(
            f"flash attention cannot express a sliding window of {min(short)} over "
            f"{num_tokens} tokens that visual tokens have left: load the backbone with "
            "attn_implementation='sdpa' or 'eager'"
        )
