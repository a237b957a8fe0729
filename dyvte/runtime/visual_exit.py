"""`VisualExit`: the context manager that lets visual tokens freeze in a model, and leave it, part-way."""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable, Sequence
from functools import partial
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn

from dyvte.backbones import describe, visual_places
from dyvte.decoder import Layout, wrap_layers
from dyvte.decoder.vision import each_image_once
from dyvte.errors import ConfigError, ExitRuntimeError, NoVisualTokensError
from dyvte.gates import GateStack, check_rule, load_checkpoint
from dyvte.policies import FixedPolicy, FreezePolicy, LearnedPolicy, Policy
from dyvte.reductions import Reduction, check_reductions, warn_of_others
from dyvte.runtime.cache import check_cache, holds_exits
from dyvte.runtime.checks import check_backbone, check_decode_mask, holds_images, warn_short_prompts
from dyvte.runtime.engine import Engine
from dyvte.runtime.frozen import check_can_freeze
from dyvte.runtime.image_store import ImageStore
from dyvte.runtime.later_turn import LaterTurn
from dyvte.runtime.positions import check_choice
from dyvte.runtime.prompt_memory import Decided, PromptMemory, Prompts, tensors_in
from dyvte.runtime.records import Run
from dyvte.runtime.replay import Replay
from dyvte.runtime.sharing import reason_of_pass
from dyvte.runtime.vision_calls import VisionCalls
from dyvte.spans import find_spans, visual_mask

_IMAGE_ARGUMENTS = (
    "pixel_values",
    "pixel_values_videos",
    "pixel_values_images",
    "image_patches",
    "image_embeds",
    "mm_encoder_outputs",  # encoded beforehand: `generate` does so
)

# What a pass may be asked for that needs the states of whole rows.
_WHOLE_ROWS = ("labels", "output_hidden_states", "output_attentions")


class VisualExit:
    """Exits for a model: ``with exits(model) as run: model.generate(...)``.

    Parameters
    ----------
    gates
        Trained gates; None for a fixed exit.
    threshold, min_layer, fallback, mode
        The decision rule of `dyvte.gates.ScheduleRule`; None takes the value stored with the gates
        (threshold 0.5, min_layer 1, no fallback, mode "gates" where nothing is stored). Without gates, or
        with ``mode="fixed"``, every row leaves after layer `fallback` (None: never).
    freeze_threshold
        Of gates with a freeze head: its own threshold; None: as far from `threshold` as the stored two are
        from one another.
    allow_transfer
        Accept gates trained for another backbone of the same shape; recorded in `Run.transferred`.
    visual_token_ids
        Placeholder ids, for a family whose config does not name them.
    positions
        "keep": text keeps its position ids behind an exit. "rearrange" (VTW, Table 6): in the layers behind
        a row's exit its text counts on without a gap from its first text token, in decoding as well; refused
        on entering for M-RoPE, deepstack and sliding windows.
    reductions
        What is spent on visual tokens before they leave (`dyvte.reductions`), such as ``[FastV(2, 0.5)]``.

    Raises
    ------
    ConfigError
        If the rule's settings make no sense.
    """

    def __init__(
        self,
        gates: GateStack | None = None,
        *,
        threshold: float | None = None,
        min_layer: int | None = None,
        fallback: int | None = None,
        mode: str | None = None,
        freeze_threshold: float | None = None,
        allow_transfer: bool = False,
        visual_token_ids: tuple[int, ...] | None = None,
        positions: str = "keep",
        reductions: Sequence[Reduction] = (),
    ) -> None:
        check_choice(positions)
        self.positions, self.reductions = positions, check_reductions(reductions)
        if self.reductions and positions != "keep":
            raise ConfigError("positions='rearrange' is defined for exits alone: omit the reductions")
        if gates is not None and not isinstance(gates, GateStack):
            raise ConfigError(
                f"gates must be a GateStack, got {type(gates).__name__}; see VisualExit.from_pretrained"
            )
        stored = gates.config if gates is not None else None
        self.threshold = _first(threshold, stored and stored.threshold, 0.5)
        self.min_layer = _first(min_layer, stored and stored.min_layer, 1)
        self.fallback = _first(fallback, stored.fallback if stored else None, None)
        self.mode = _first(mode, stored and stored.mode, "gates")
        check_rule(
            stored.num_layers if stored else None, self.threshold, self.min_layer, self.fallback, self.mode
        )
        self.gates, self.config = gates, stored
        self.allow_transfer, self.visual_token_ids = allow_transfer, visual_token_ids
        # Set where many exits of the same inputs are asked for, one after the other.
        self.replay: Replay | None = None
        if gates is None or self.mode == "fixed":
            self.policy: Policy = FixedPolicy(self.fallback)
        else:
            self.policy = LearnedPolicy(
                gates, self.threshold, self.min_layer, self.fallback, freeze_threshold
            )

    @classmethod
    def fixed(cls, exit_layer: int, *, freeze_layer: int | None = None, **options: Any) -> VisualExit:
        """Every row leaves after the same layer.

        Parameters
        ----------
        exit_layer
            Layers in which text can read the visual tokens (VTW's K); 0: no layer sees the image, L: they
            never leave.
        freeze_layer
            Layers that update them, 0..exit_layer; in the layers between they are read as they were then.
            None: updated as long as they are read.
        options
            As for the class.

        Raises
        ------
        ConfigError
            If the freeze layer does not lie in 0..exit_layer.
        """
        exits = cls(fallback=exit_layer, mode="fixed", **options)
        if freeze_layer is not None:
            exits.policy = FreezePolicy(freeze_layer, exit_layer)
        return exits

    @classmethod
    def from_policy(cls, policy: Policy, **options: Any) -> VisualExit:
        """Exits decided by any policy of `dyvte.policies`."""
        if isinstance(policy, LearnedPolicy):
            return cls(
                policy.gates,
                threshold=policy.threshold,
                min_layer=policy.min_layer,
                fallback=policy.fallback,
                freeze_threshold=policy.freeze_threshold,
                mode="gates",
                **options,
            )
        exits = cls(mode="fixed", **options)
        exits.policy = policy
        return exits

    @classmethod
    def from_pretrained(cls, folder: str | os.PathLike[str], **options: Any) -> VisualExit:
        """Exits of a checkpoint folder (or hub id); without `gates.safetensors` it means fixed(fallback)."""
        config, gates = load_checkpoint(folder)
        if gates is not None:
            return cls(gates, **options)
        exits = cls(fallback=config.fallback, mode="fixed", **options)
        exits.config = config
        return exits

    def __call__(self, model: nn.Module, *, images: ImageStore | None = None) -> ExitSession:
        """A context manager for one model.

        Parameters
        ----------
        model
            The transformers model, also inside wrappers.
        images
            Images that the model has seen: prompts that show one of them read it from there. The same store
            may go from block to block, whatever their exits.
        """
        return ExitSession(self, model, images)


class ExitSession:
    """Installs the exits on entering and takes every trace of them away on leaving."""

    def __init__(self, exits: VisualExit, model: nn.Module, images: ImageStore | None = None) -> None:
        if images is not None and not isinstance(images, ImageStore):
            raise ConfigError(f"images must be a dyvte.ImageStore, got {type(images).__name__}")
        self.exits, self.model, self.images = exits, model, images
        self._undo: list[Any] = []
        self._seen: dict[int, dict[str, Any]] = {}
        self._prefills = 0
        self._prompts = PromptMemory()
        # Remembers what the pass in progress decides; None where its prompts will not come again.
        self._keep: Callable[[Decided], None] | None = None

    def __enter__(self) -> Run:
        if self._undo:
            raise ExitRuntimeError("this block is already active: call exits(model) again for a new one")
        backbone = describe(self.model, self.exits.visual_token_ids)
        self.exits.policy.check(backbone.num_layers, backbone.hidden_size)
        for reduction in self.exits.reductions:
            reduction.check(backbone.num_layers)
            reduction.check_backbone(backbone)
        if self.exits.policy.may_freeze or any(one.may_freeze for one in self.exits.reductions):
            check_can_freeze(backbone)
        transferred = check_backbone(self.exits.config, backbone, self.exits.allow_transfer)
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
        for depth, module in enumerate(self.backbone.path):
            signature = inspect.signature(module.forward)
            handle = module.register_forward_pre_hook(self._noting(depth, signature), with_kwargs=True)
            self._undo.append(handle.remove)
            handle = module.register_forward_hook(self._forget, always_call=True)
            self._undo.append(handle.remove)
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
        self._seen.clear()
        self._prompts.forget()

    def _noting(self, depth: int, signature: inspect.Signature) -> Any:
        var_keywords = [n for n, p in signature.parameters.items() if p.kind is p.VAR_KEYWORD]

        def note(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            # An outer module starts a new pass: what deeper ones were given before is over.
            for deeper in [d for d in self._seen if d >= depth]:
                del self._seen[deeper]
            try:
                self._seen[depth] = signature.bind_partial(*args, **kwargs).arguments
            except TypeError:
                self._seen[depth] = dict(kwargs)
            for name in var_keywords:
                self._seen[depth].update(self._seen[depth].pop(name, None) or {})

        return note

    def _forget(self, *_: Any) -> None:
        self._seen.clear()

    def _argument(self, name: str) -> Any:
        """The innermost value given under this name on the way down to the decoder."""
        for depth in sorted(self._seen, reverse=True):
            if (value := self._seen[depth].get(name)) is not None:
                return value
        return None

    def _before_decoder(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.engine.finish(failed=True)
        self._keep = None
        ids_BN, cache = self._argument("input_ids"), self._argument("past_key_values")
        embeds_BND = self._argument("inputs_embeds")
        images = any(holds_images(self._argument(name)) for name in _IMAGE_ARGUMENTS)
        past = int(cache.get_seq_length()) if cache is not None else 0
        new_tokens = (ids_BN if ids_BN is not None else embeds_BND).shape[1]
        mask_BN = self._two_dimensional_mask()
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
            self._seen.clear()

    def _after_decoder(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        prefill = self.engine.finish(failed=output is None)
        if prefill is not None and self._keep is not None:
            self._keep(prefill.decided())
        self._keep = None
        self._seen.clear()

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
        shown = tensors_in([self._argument(name) for name in _IMAGE_ARGUMENTS])
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
        decoder_mask = self._seen.get(len(self.backbone.path) - 1, {}).get("attention_mask")
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
        if self._argument("output_attentions"):
            raise ExitRuntimeError("output_attentions has no meaning once tokens have left: switch it off")
        check_cache(self._argument("past_key_values"))
        if mask_BN is None and self._seen.get(0, {}).get("attention_mask") is not None:
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
            check_cache(self._argument("past_key_values"))
        except ExitRuntimeError:
            return "a cache whose layers cannot differ in content"
        config = self.backbone.model.config
        given = {name: _first(self._argument(name), getattr(config, name, None)) for name in _WHOLE_ROWS}
        asked_for = [name for name, value in given.items() if value is not None and value is not False]
        return reason_of_pass(self.backbone.model, asked_for)

    def _two_dimensional_mask(self) -> Tensor | None:
        # gemma3 and paligemma hand a 4D or dict mask to their text model; the 2D one is higher up.
        for depth in sorted(self._seen, reverse=True):
            mask = self._seen[depth].get("attention_mask")
            if isinstance(mask, Tensor) and mask.dim() == 2:
                return mask
        return None

    def _sample_ids(self, rows: int, *, again: bool) -> list[str]:
        self._prefills += not again
        given = self.run.sample_ids
        if given is None:
            return [f"{self._prefills}:{self._prompts.prompt_of_row(row)}" for row in range(rows)]
        if len(given) == 0 or rows % len(given):
            raise ConfigError(f"run.sample_ids holds {len(given)} ids, the batch has {rows} rows")
        return [str(given[row // (rows // len(given))]) for row in range(rows)]


def _first(*values: Any) -> Any:
    return next((v for v in values if v is not None), None)
