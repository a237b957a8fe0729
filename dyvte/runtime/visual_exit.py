"""`VisualExit`: which exits a model gets; calling it gives the block that visual tokens leave in."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

from torch import nn

from dyvte.errors import ConfigError
from dyvte.gates import GateStack, check_rule, load_checkpoint
from dyvte.policies import FixedPolicy, FreezePolicy, LearnedPolicy, Policy
from dyvte.reductions import Reduction, check_reductions
from dyvte.runtime.image_store import ImageStore
from dyvte.runtime.positions import check_choice
from dyvte.runtime.replay import Replay
from dyvte.runtime.session import ExitSession


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
    by_group
        Decide each row by the thresholds of its calibrated group, and not at all where it is like none of
        them. None: where the gates were calibrated by group and no threshold is given.
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
        by_group: bool | None = None,
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
            self.policy: Policy = FixedPolicy(self.fallback, stored)
        else:
            if by_group is None:
                stated = (threshold, freeze_threshold) != (None, None)
                by_group = stored is not None and stored.groups is not None and not stated
            self.policy = LearnedPolicy(
                gates, self.threshold, self.min_layer, self.fallback, freeze_threshold, by_group=by_group
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
        """Exits decided by any policy of `dyvte.policies`.

        Parameters
        ----------
        policy
            Learned ones bring their gates and thresholds.
        options
            As for the class.
        """
        if isinstance(policy, LearnedPolicy):
            return cls(
                policy.gates,
                threshold=policy.threshold,
                min_layer=policy.min_layer,
                fallback=policy.fallback,
                freeze_threshold=policy.freeze_threshold,
                by_group=policy.by_group,
                mode="gates",
                **options,
            )
        exits = cls(mode="fixed", **options)
        exits.policy = policy
        return exits

    @classmethod
    def from_pretrained(cls, folder: str | os.PathLike[str], **options: Any) -> VisualExit:
        """Exits of a checkpoint folder (or hub id); without `gates.safetensors` it means fixed(fallback).

        Parameters
        ----------
        folder
            Written by `dyvte train`, `dyvte calibrate` or ``save_pretrained``.
        options
            As for the class; they override what the folder says.

        Raises
        ------
        CheckpointError
            No checkpoint is there, or a damaged one.
        """
        config, gates = load_checkpoint(folder)
        if gates is not None:
            return cls(gates, **options)
        exits = cls(fallback=config.fallback, mode="fixed", **options)
        exits.config, exits.policy = config, FixedPolicy(exits.fallback, config)
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


def _first(*values: Any) -> Any:
    return next((v for v in values if v is not None), None)
