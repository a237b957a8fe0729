"""The block that visual tokens freeze and leave in: what is hooked into a model, and what each pass becomes.

Shapes: B rows, N tokens of the padded batch, P tokens of earlier turns, D hidden size.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from types import TracebackType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from dyvte.backbones import describe, visual_places
from dyvte.decoder import Layout, wrap_layers
from dyvte.decoder.vision import each_image_once
from dyvte.errors import ConfigError, ExitRuntimeError, NoVisualTokensError
from dyvte.reductions import warn_of_others
from dyvte.runtime.arguments import PassArguments
from dyvte.runtime.cache import check_cache, holds_exits
from dyvte.runtime.checks import (
    check_decode_mask,
    check_policy,
    check_reductions_of,
    warn_short_prompts,
)
from dyvte.runtime.engine import Engine
from dyvte.runtime.image_store import ImageStore
from dyvte.runtime.later_turn import LaterTurn
from dyvte.runtime.prompt_memory import Decided, PromptMemory, Prompts, tensors_in
from dyvte.runtime.records import Run
from dyvte.runtime.sharing import reason_of_pass
from dyvte.runtime.vision_calls import VisionCalls
from dyvte.spans import find_spans, visual_mask

if TYPE_CHECKING:
    from dyvte.runtime.visual_exit import VisualExit

# What a pass may be asked for that needs the states of whole rows.
_WHOLE_ROWS = ("labels", "output_hidden_states", "output_attentions")


class ExitSession:
    """Installs the exits on entering and takes every trace of them away on leaving."""

    def __init__(self, exits: VisualExit, model: nn.Module, images: ImageStore | None = None) -> None:
        if images is not None and not isinstance(images, ImageStore):
            raise ConfigError(f"images must be a dyvte.ImageStore, got {type(images).__name__}")
        self.exits, self.model, self.images = exits, model, images
        self._undo: list[Any] = []
        self._given = PassArguments()
        self._prefills = 0
        self._prompts = PromptMemory()
        # Remembers what the pass in progress decides; None where its prompts will not come again.
        self._keep: Callable[[Decided], None] | None = None

    def __enter__(self) -> Run:
        if self._undo:
            raise ExitRuntimeError("this block is already active: call exits(model) again for a new one")
        backbone = describe(self.model, self.exits.visual_token_ids)
        check_reductions_of(self.exits.reductions, backbone)
        transferred = check_policy(
            self.exits.policy,
            backbone,
            allow_transfer=self.exits.allow_transfer,
            advice=", or pass allow_transfer=True",
        )
        if self.exits.gates is not None and self.exits.mode == "gates":
            stored = self.exits.gates.config
            as_calibrated = self.exits.threshold == stored.threshold
            if stored.freeze_head:
                as_calibrated &= self.exits.policy.freeze_threshold == stored.freeze_threshold
            warn_of_others(stored, self.exits.reductions, as_calibrated=as_calibrated)
        self.exits.policy.to(next(backbone.decoder.parameters()).device)
        self.run = Run(transferred)
        self.backbone = backbone
        exits = self.exits
        # Replayed passes have their images from the record.
        store = None if exits.replay is not None else self.images
        if store is not None:
            store.bind(backbone)
        self.engine = Engine(
            backbone, exits.policy, self.run, exits.positions, exits.reductions, exits.replay, store
        )
        if exits.replay is not None:
            exits.replay.start()
        try:
            self._install()
        except BaseException:
            self._remove()
            raise
        return self.run

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._remove()

    # -- hooks -----------------------------------------------------------------------------------------
    def _install(self) -> None:
        layers = self.backbone.layers[: self.backbone.num_layers]
        self._undo.append(self._prompts.watch(self.backbone.model))
        self._undo.append(wrap_layers(layers, self.engine.run_layer))
        self._undo.append(self._given.watch(self.backbone.path))
        replay = self.exits.replay
        if replay is not None or any(reduction.needs_grid for reduction in self.exits.reductions):
            self._vision = VisionCalls(self.backbone.path, replay)
            self._undo += self._vision.undo
        elif self.images is not None:
            images = each_image_once(self.backbone, self.images)
            images.__enter__()
            self._undo.append(lambda: images.__exit__(None, None, None))
        decoder = self.backbone.decoder
        for handle in (
            decoder.register_forward_pre_hook(self._before_decoder, with_kwargs=True),
            decoder.register_forward_hook(self._after_decoder, always_call=True),
        ):
            self._undo.append(handle.remove)

    def _remove(self) -> None:
        while self._undo:
            self._undo.pop()()
        self._given.forget()
        self._prompts.forget()

    def _before_decoder(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.engine.finish(failed=True)
        self._keep = None
        ids_BN, cache = self._given.find("input_ids"), self._given.find("past_key_values")
        embeds_BND = self._given.find("inputs_embeds")
        images = self._given.has_images()
        past = int(cache.get_seq_length()) if cache is not None else 0
        new_tokens = (ids_BN if ids_BN is not None else embeds_BND).shape[1]
        mask_BN = self._given.mask_BN()
        try:
            if past == 0:
                self._start_prompts(ids_BN, embeds_BND, mask_BN, images, cache)
            elif images:
                self._start_later_image(ids_BN, embeds_BND, mask_BN, cache)
            else:
                check_decode_mask(mask_BN, cache, past + new_tokens)
                new_valid = None
                if new_tokens > 1 and mask_BN is not None and not mask_BN[:, -new_tokens:].all():
                    new_valid = mask_BN[:, -new_tokens:].bool()
                self.engine.start_decode(new_valid)
        finally:
            self._given.forget()

    def _after_decoder(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        prefill = self.engine.finish(failed=output is None)
        if prefill is not None and self._keep is not None:
            self._keep(prefill.decided())
        self._keep = None
        self._given.forget()

    def _start_prompts(
        self,
        ids_BN: Tensor | None,
        embeds_BND: Tensor | None,
        mask_BN: Tensor | None,
        images: bool,
        cache: Any,
    ) -> None:
        """A pass without a past: prompts that come for the first time, or again without a cache."""
        if ids_BN is None:
            self._start_prefill(ids_BN, embeds_BND, mask_BN, images)
            return
        shown = tensors_in(self._given.images())
        prompts = self._prompts.look(ids_BN, shown, cached=cache is not None)
        self._start_prefill(ids_BN, embeds_BND, mask_BN, images, prompts)
        if cache is None and prompts.decided is None and self.engine.prefill is not None:
            self._keep = partial(self._prompts.keep, ids_BN, prompts, shown)

    def _start_later_image(
        self, ids_BN: Tensor | None, embeds_BND: Tensor | None, mask_BN: Tensor | None, cache: Any
    ) -> None:
        # Earlier turns stay as they were computed; the new image has its own exits.
        valid_BP = None
        if mask_BN is not None and ids_BN is not None:
            check_decode_mask(mask_BN, cache, int(cache.get_seq_length()) + ids_BN.shape[1])
            valid_BP = mask_BN[:, : -ids_BN.shape[1]].bool().cpu()
            mask_BN = mask_BN[:, -ids_BN.shape[1] :]
        try:
            self._start_prefill(ids_BN, embeds_BND, mask_BN, images=True, past=(valid_BP, holds_exits(cache)))
        except BaseException:
            self.engine.finish(failed=True)
            raise

    def _start_prefill(
        self,
        ids_BN: Tensor | None,
        embeds_BND: Tensor | None,
        mask_BN: Tensor | None,
        images: bool,
        prompts: Prompts | None = None,
        past: tuple[Tensor | None, bool] | None = None,
    ) -> bool:
        """Find the visual tokens and take up the prefill; True where some may leave.

        ``prompts`` says which columns are prompts and what was decided for them; None: all of them, nothing.
        ``past``: which tokens of earlier turns are no padding, and whether any have left.
        """
        if ids_BN is None:
            raise ExitRuntimeError(
                "the visual tokens are found in input_ids, but only inputs_embeds were given: pass input_ids"
            )
        if embeds_BND is not None and embeds_BND.shape[:2] != ids_BN.shape:
            raise ExitRuntimeError(
                f"input_ids have shape {tuple(ids_BN.shape)}, the decoder got {tuple(embeds_BND.shape[:2])} "
                "tokens: this family does not expand its placeholders in input_ids"
            )
        if mask_BN is not None and mask_BN.shape != ids_BN.shape:
            raise ExitRuntimeError(
                f"attention_mask has shape {tuple(mask_BN.shape)}, "
                f"expected that of input_ids, {tuple(ids_BN.shape)}"
            )
        visual_BN = visual_mask(ids_BN, self.backbone.visual_token_ids)
        valid_BN = torch.ones_like(visual_BN) if mask_BN is None else mask_BN.bool()
        # The one copy to the host that every index of this prefill is worked out from.
        visual_BN, valid_BN = torch.stack([visual_BN, valid_BN]).cpu()
        answer_BN = None
        if prompts is not None and prompts.columns < ids_BN.shape[1]:
            answer_BN = torch.arange(ids_BN.shape[1]).expand(visual_BN.shape) >= prompts.columns
        layout = Layout(find_spans(visual_BN.long(), (1,), valid_BN, answer_BN))
        if not layout.has_image_B.any():
            if images:
                raise NoVisualTokensError(
                    "an image was given, but the prompt has no visual token "
                    f"(ids {self.backbone.visual_token_ids}): let the processor expand the prompt, or pass "
                    "visual_token_ids"
                )
            return False
        decided = None if prompts is None else prompts.decided
        if decided is None:
            warn_short_prompts(layout)
        decoder_mask = self._given.at(len(self.backbone.path) - 1, "attention_mask")
        plain = decoder_mask is None or (isinstance(decoder_mask, Tensor) and decoder_mask.dim() == 2)
        places_BN3 = None
        if any(reduction.needs_grid for reduction in self.exits.reductions):
            places_BN3 = visual_places(self.backbone, visual_BN, self._vision)
        sample_ids = self._sample_ids(layout.batch, again=decided is not None)
        is_part = prompts is not None and prompts.is_part
        not_shared = self._not_shared(is_part)
        how: dict[str, Any] = {"is_part": is_part, "not_shared": not_shared}
        if past is not None:
            how["turn"] = LaterTurn(self.engine.stack, layout, past[0])
            how["behind_exits"] = past[1]
            how["not_shared"] = "a later turn on a cache"
        if not self.engine.start_prefill(layout, sample_ids, plain, places_BN3, decided, **how):
            return False
        if self._given.find("output_attentions"):
            raise ExitRuntimeError("output_attentions has no meaning once tokens have left: switch it off")
        check_cache(self._given.find("past_key_values"))
        if mask_BN is None and self._given.at(0, "attention_mask") is not None:
            raise ExitRuntimeError(
                "attention_mask must be two-dimensional, (rows, tokens), where visual tokens leave: "
                "which tokens are padding cannot be told from another"
            )
        return True

    def _not_shared(self, is_part: bool) -> str | None:
        """Why the pass that begins may not read stored images."""
        if self.images is None:
            return None
        # Weights or adapters may have changed since the block was entered, or another model come by.
        self.images.bind(self.backbone)
        if is_part:
            return "a prefill in chunks"
        try:
            check_cache(self._given.find("past_key_values"))
        except ExitRuntimeError:
            return "a cache whose layers cannot differ in content"
        config = self.backbone.model.config
        asked_for = [
            name for name in _WHOLE_ROWS if _is_set(self._given.find(name), getattr(config, name, None))
        ]
        return reason_of_pass(self.backbone.model, asked_for)

    def _sample_ids(self, rows: int, *, again: bool) -> list[str]:
        self._prefills += not again
        given = self.run.sample_ids
        if given is None:
            return [f"{self._prefills}:{self._prompts.prompt_of_row(row)}" for row in range(rows)]
        if len(given) == 0 or rows % len(given):
            raise ConfigError(f"run.sample_ids holds {len(given)} ids, the batch has {rows} rows")
        return [str(given[row // (rows // len(given))]) for row in range(rows)]


def _is_set(given: Any, default: Any) -> bool:
    """Whether an option of a pass is on, by what was given or else by what the model's config says."""
    value = default if given is None else given
    return value is not None and value is not False
