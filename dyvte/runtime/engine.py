"""What runs in place of each decoder layer's forward while a block is active.

Shapes: B rows, N tokens of this forward pass, D hidden size, L decoder layers.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from dyvte.backbones import Backbone
from dyvte.decoder import Layout, Window
from dyvte.errors import ExitRuntimeError
from dyvte.policies import Plan, Policy, Rows
from dyvte.reductions import Reduction, ReductionPlan, TokenRows
from dyvte.runtime.cache import ExitLayer
from dyvte.runtime.image_store import ImageStore
from dyvte.runtime.later_turn import LaterTurn
from dyvte.runtime.masks import decode_mask
from dyvte.runtime.positions import close_up
from dyvte.runtime.prefill import FindShared, Prefill
from dyvte.runtime.prompt_memory import Decided
from dyvte.runtime.records import Run
from dyvte.runtime.replay import Replay
from dyvte.runtime.shared_rows import SharedRows
from dyvte.runtime.sharing import find_shared, reason_of_model
from dyvte.runtime.stack import Stack


class Engine:
    """Decides, for every forward pass of a model inside a block, what its layers do."""

    def __init__(
        self,
        backbone: Backbone,
        policy: Policy,
        run: Run,
        positions: str = "keep",
        reductions: Sequence[Reduction] = (),
        replay: Replay | None = None,
        store: ImageStore | None = None,
    ) -> None:
        self.policy, self.run, self.reductions = policy, run, reductions
        self.replay, self.store = replay, store
        self.stack = Stack(backbone, positions)
        self._not_shared = None if store is None else reason_of_model(self.stack, reductions)
        self.prefill: Prefill | None = None
        self._closed_up: dict[int, tuple[Any, dict[str, Any]]] = {}
        self._masks: dict[tuple[int, Window | None], tuple[Any, Tensor | None]] = {}
        self._new_valid_BQ: Tensor | None = None

    def run_layer(
        self, index: int, forward: Callable[..., Any], hidden_BND: Tensor, kwargs: dict[str, Any]
    ) -> Any:
        """What runs in place of a layer's forward."""
        if self.prefill is not None:
            return self.prefill.run_layer(index, forward, hidden_BND, kwargs)
        if _is_exit_layer(kwargs.get("past_key_values"), index):
            self._expect(kwargs["past_key_values"].layers[index], hidden_BND, kwargs)
        return forward(hidden_BND, **kwargs)

    def start_prefill(
        self,
        layout: Layout,
        sample_ids: list[str],
        plain: bool,
        places_BN3: Tensor | None = None,
        decided: Decided | None = None,
        *,
        is_part: bool = False,
        not_shared: str | None = None,
        turn: LaterTurn | None = None,
        behind_exits: bool = False,
    ) -> bool:
        """Take up a prefill with visual tokens; False where it will be the stock model's.

        ``decided`` is what was decided when the same prompts passed before; ``is_part``: the prompts go on in
        a later pass; ``not_shared``: why this pass may not read stored images; ``turn``: what runs the layers
        of tokens that have a past, ``behind_exits`` if tokens have left that.
        """
        num_layers = self.stack.backbone.num_layers
        rows = Rows(num_layers, layout.num_visual_B, layout.num_prompt_B, sample_ids)
        if decided is None:
            plan = self.policy.start(rows)
        else:
            plan = Plan(decided.exit_layers_B.clone(), decided.freeze_layers_B.clone())
        tokens = TokenRows(num_layers, layout.spans, sample_ids)
        reducing = [reduction.start(tokens) for reduction in self.reductions]
        if is_part:
            _check_part(layout, plan, reducing, num_layers)
        stuck_B = layout.has_image_B & (layout.num_prompt_B == 0)
        if stuck_B.any() and decided is None:
            # Its next token is read from a visual token, which therefore must stay.
            warnings.warn(
                f"{int(stuck_B.sum())} rows have no text after the image: their visual tokens never leave",
                stacklevel=2,
            )
            plan.exit_layers_B[stuck_B] = num_layers
            plan.freeze_layers_B[stuck_B] = num_layers
        find = self._finder(layout, plain, not_shared)
        self.prefill = Prefill(
            self.stack, layout, plan, reducing, places_BN3, plain, self.replay, decided, find, turn
        )
        self.prefill.active |= behind_exits
        if turn is not None and self.prefill.active:
            self._check_turn(plan, plain)
        return self.prefill.active

    def _check_turn(self, plan: Plan, plain: bool) -> None:
        """Raise ExitRuntimeError where a new image in a later turn cannot be served."""
        reason = None
        if self.reductions:
            reason = "with reductions"
        elif self.stack.rearranges:
            reason = "with positions='rearrange'"
        elif any(self.stack.windows):
            reason = "in a model with sliding windows"
        elif not plain:
            reason = "in a model whose images attend by a rule of their own"
        if reason is not None:
            raise ExitRuntimeError(
                f"a new image in a later turn on the same cache is not supported {reason}: "
                "start a new cache with the whole conversation"
            )

    def _finder(self, layout: Layout, plain: bool, not_shared: str | None) -> FindShared | None:
        """What looks for stored images once the first layer is given the pass's states."""
        store, reason = self.store, self._not_shared or not_shared
        if store is None:
            return None

        def find(
            plan: Plan, hidden_BND: Tensor, kwargs: dict[str, Any]
        ) -> tuple[SharedRows | None, str | None]:
            if reason is not None:
                return None, reason
            how = {"plain": plain, "may_freeze": self.policy.may_freeze}
            return find_shared(self.stack, layout, plan, store, hidden_BND, kwargs, **how)

        return find

    def start_decode(self, new_valid_BQ: Tensor | None) -> None:
        """Take up a pass that continues a cache."""
        self._masks.clear()
        self._closed_up.clear()
        self._new_valid_BQ = new_valid_BQ

    def finish(self, *, failed: bool) -> Prefill | None:
        """The decoder has returned or raised: drop the state of the pass, return a prefill that went well."""
        prefill, self.prefill = self.prefill, None
        self._masks.clear()
        self._closed_up.clear()
        self._new_valid_BQ = None
        if prefill is not None and self.store is not None:
            self.store.trim()
        if prefill is None or failed:
            return None
        if prefill.again is not None:
            return prefill  # its prompts have their record
        record = prefill.record()
        if record.gate_fallbacks:
            warnings.warn(
                f"{record.gate_fallbacks} rows had a gate output that is not finite: they take the fallback",
                stacklevel=2,
            )
        self.run.records.append(record)
        if self.store is not None:
            num_images = int(prefill.layout.has_image_B.sum())
            num_shared = int(record.shared_B.sum())
            self.store.count(num_shared, num_images - num_shared, record.not_shared)
        return prefill

    def _expect(self, layer: ExitLayer, hidden_BND: Tensor, kwargs: dict[str, Any]) -> None:
        new_tokens = hidden_BND.shape[1]
        layer.expect(new_tokens, self._new_valid_BQ)
        # Layers of equal content share their columns, hence their mask.
        key = (id(layer.columns), layer.window)
        if key not in self._masks:
            self._masks[key] = (layer.columns, decode_mask(self.stack.config, hidden_BND, layer, new_tokens))
        kwargs["attention_mask"] = self._masks[key][1]
        if layer.columns.shift_B is not None:
            kwargs.update(self._closed(layer, hidden_BND, kwargs))

    def _closed(self, layer: ExitLayer, hidden_BND: Tensor, kwargs: dict[str, Any]) -> dict[str, Any]:
        key = id(layer.columns)
        if key not in self._closed_up:
            shift_B1 = layer.columns.shift_B[:, None]
            self._closed_up[key] = (layer.columns, close_up(self.stack.rotary, hidden_BND, kwargs, shift_B1))
        return self._closed_up[key][1]


def _check_part(layout: Layout, plan: Plan, reducing: Sequence[ReductionPlan], num_layers: int) -> None:
    """Raise ExitRuntimeError where what leaves cannot be decided on a part of the prompts: gates or
    reductions read them, or a row's part ends with its image."""
    reads = any(one.enters for one in reducing) or any(
        plan.asks(k) or any(one.drops(k) for one in reducing) for k in range(num_layers)
    )
    first_B = torch.minimum(plan.exit_layers_B, plan.freeze_layers_B)
    ends_B = layout.has_image_B & (layout.num_prompt_B == 0) & (first_B < num_layers)
    if reads or ends_B.any():
        raise ExitRuntimeError(
            f"a first pass of {layout.tokens} tokens holds a part of the prompt only, but what leaves is "
            "decided once, on the whole of it: leave prefill_chunk_size away"
        )


def _is_exit_layer(cache: Any, index: int) -> bool:
    layers = getattr(cache, "layers", ())
    return index < len(layers) and isinstance(layers[index], ExitLayer)
