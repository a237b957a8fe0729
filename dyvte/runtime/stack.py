"""A decoder stack inside a block: what all its layers, in every pass, have in common."""

from __future__ import annotations

from typing import Any

from dyvte.backbones import Backbone
from dyvte.decoder import layer_windows
from dyvte.decoder.attention import KeysAlone
from dyvte.runtime.positions import check_rearrange
from dyvte.runtime.visual_work import Weights


class Stack:
    """The decoder of a backbone and how the block's user wants it to run.

    Attributes
    ----------
    config
        The decoder's config; masks follow it.
    windows
        Each layer's reach.
    rotary
        Makes cos and sin of position ids; None where positions come otherwise.
    rearranges
        Are positions closed up behind an exit?
    weights
        Parts of weights that layers with less visual work need, cut once per block.
    keys_alone
        Makes the keys and values of frozen tokens.
    mixes_rows
        Kinds of layers that take products of several rows in one.

    Raises
    ------
    UnsupportedBackboneError
        If positions cannot be closed up.
    """

    def __init__(self, backbone: Backbone, positions: str) -> None:
        self.backbone = backbone
        self.config = backbone.decoder.config
        self.windows = layer_windows(self.config, backbone.num_layers)
        self.rotary = getattr(backbone.decoder, "rotary_emb", None)
        self.rearranges = positions == "rearrange"
        if self.rearranges:
            check_rearrange(backbone, self.windows)
        self.weights, self.keys_alone = Weights(), KeysAlone()
        self.mixes_rows: set[type] = set()

    def without_jumps(self, kwargs: dict[str, Any]) -> dict[str, Any]:
        """Layer arguments of a text stream such that no attention function takes it for packed sequences."""
        # Flash attention looks for jumps in a single row's ids, and waits for the device to do so.
        is_flash = str(self.config._attn_implementation).startswith("flash_attention")
        if is_flash and kwargs.get("position_embeddings") is not None:
            return {**kwargs, "position_ids": None}
        return kwargs
