"""Whom each row's last prompt token attends to in one layer, whatever attention function the model runs.

The layer runs as it is; then its attention module is asked once more, for the last token alone, with the
keys it has just made. One row of scores instead of all N: SDPA and FlashAttention stay on everywhere.

Shapes: R rows, T tokens of a stream, K keys, H heads, D hidden size.
"""

from __future__ import annotations

import inspect
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn

from dyvte.decoder import Picker, Window
from dyvte.decoder.attention import attention_of, use_attention
from dyvte.decoder.caches import Given, Tee
from dyvte.decoder.masks import cut_square
from dyvte.errors import UnsupportedBackboneError
from dyvte.runtime.streams import Stream


class LastRow:
    """Around one call of a decoder layer; afterwards `scores_RK` holds the answer.

    Parameters
    ----------
    layer
        The decoder layer.
    stream
        What the layer is called on.
    window
        The layer's reach.
    last_B
        (B,) int64 index of each prompt's last token in the batch.
    keys
        What the layer's tokens attend to; None: the stream itself. Where it is another, the layer must be
        given a 4D mask.

    Raises
    ------
    UnsupportedBackboneError
        If the layer's attention is not a module that can be asked for its weights.
    """

    def __init__(
        self,
        layer: nn.Module,
        stream: Stream,
        window: Window | None,
        last_B: Tensor,
        keys: Stream | None = None,
    ) -> None:
        self.attention = attention_of(layer)
        if self.attention is None:
            raise _refusal(layer, "it has no attention module `self_attn` with a config")
        self.layer, self.stream, self.window = layer, stream, window
        is_last_RT = (stream.order_RT == last_B[stream.rows_R][:, None]) & stream.real_RT
        self._last_R1 = is_last_RT.to(torch.uint8).argmax(1, keepdim=True)
        self.keys = stream if keys is None else keys
        self._handles: list[Any] = []
        self._scores_RK: Tensor | None = None

    def __enter__(self) -> LastRow:
        # Inside the layer's own call its weights are at hand, also where they are gathered or offloaded.
        self._handles = [
            self.attention.register_forward_pre_hook(self._note, with_kwargs=True),
            self.attention.register_forward_hook(self._answer, with_kwargs=True),
        ]
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Look no further."""
        for handle in self._handles:
            handle.remove()

    @property
    def scores_BN(self) -> Tensor:
        """The same at their places in the batch; -inf where nothing was attended to."""
        return self.keys.at_places(self.scores_RK, -torch.inf)

    @property
    def scores_RK(self) -> Tensor:
        """(R, K) float32 attention weights of each prompt's last token, mean over heads."""
        if self._scores_RK is None:
            raise _refusal(self.layer, "the layer never called its attention")
        return self._scores_RK

    def _note(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        names = list(inspect.signature(module.forward).parameters)
        kwargs = {**dict(zip(names, args, strict=False)), **kwargs}
        return (), {**kwargs, "past_key_values": Tee(kwargs.get("past_key_values"))}

    @torch.no_grad()
    def _answer(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        seen: Tee = kwargs["past_key_values"]
        if seen.keys is None:
            raise _refusal(self.layer, "its attention does not hand its keys to the cache")
        hidden_RTD = kwargs["hidden_states"]
        rows, tokens = hidden_RTD.shape[:2]
        last_R1 = self._last_R1
        pick = Picker(rows, tokens, torch.arange(rows), last_R1, hidden_RTD.device)
        given = {name: pick(value, remember=False) for name, value in kwargs.items()}
        given["attention_mask"] = self._mask(kwargs.get("attention_mask"), last_R1, hidden_RTD)
        given["past_key_values"] = Given(seen.keys, seen.values)
        weights = self._weights(module, given)
        if not isinstance(weights, Tensor) or weights.shape[-1] < self.keys.real_RT.shape[1]:
            raise _refusal(self.layer, "its attention does not return its weights")
        # Some functions put a sink behind the keys.
        self._scores_RK = weights[..., 0, : self.keys.real_RT.shape[1]].float().mean(1)

    @staticmethod
    def _weights(module: nn.Module, given: dict[str, Any]) -> Any:
        # Only the eager function returns weights; the module reads its choice from its config.
        undo = use_attention(module, "eager")
        try:
            output = module.forward(**given)
        finally:
            undo()
        return output[1] if isinstance(output, tuple) and len(output) > 1 else None

    def _mask(self, given: Any, last_R1: Tensor, hidden_RTD: Tensor) -> Tensor | None:
        """(R or 1, 1, 1, T) additive."""
        lowest = torch.finfo(hidden_RTD.dtype).min
        if isinstance(given, Tensor) and given.dim() == 4:
            row = cut_square(given, last_R1, None)
            if row.dtype != torch.bool:
                return row
            return torch.zeros_like(row, dtype=hidden_RTD.dtype).masked_fill(~row, lowest)
        # Behind the prompt's last token there may be guesses at its answer.
        seen_RT = self.stream.real_RT & (torch.arange(self.stream.real_RT.shape[1]) <= last_R1)
        if self.window is not None:
            # Compact streams are given a 4D mask where a window is short, so columns are positions here.
            first_R1 = seen_RT.to(torch.uint8).argmax(1, keepdim=True)
            columns_1T = torch.arange(seen_RT.shape[1])[None]
            query_R11 = (last_R1 - first_R1)[:, :, None]
            seen_RT = seen_RT & self.window.reaches(query_R11, (columns_1T - first_R1)[:, None])[:, 0]
        if seen_RT.all():
            return None
        hidden = ~seen_RT.to(hidden_RTD.device)[:, None, None]
        return torch.zeros_like(hidden, dtype=hidden_RTD.dtype).masked_fill(hidden, lowest)


def _refusal(layer: nn.Module, reason: str) -> UnsupportedBackboneError:
    return UnsupportedBackboneError(
        f"{type(layer).__name__} cannot tell what its last token attends to: {reason}. "
        "Reductions that rank tokens by attention (fastv) cannot serve this model"
    )
