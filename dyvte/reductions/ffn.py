"""YOPO's sparse FFN (arXiv 2410.06169): visual tokens go through a share of each layer's neurons.

Shapes: L decoder layers, M neurons.
"""

from __future__ import annotations

from pathlib import Path

from torch import nn

from dyvte.backbones import Backbone
from dyvte.errors import ConfigError, GateMismatchError, UnsupportedBackboneError
from dyvte.reductions.base import (
    REDUCTIONS,
    Neurons,
    Reduction,
    ReductionPlan,
    TokenRows,
    VisualWork,
    digest,
)
from dyvte.reductions.profile import VisualProfile

PROJECTIONS = ("gate_proj", "up_proj", "down_proj")
# A gated FFN that holds nothing else: its parts can be computed neuron by neuron.
GATED_PARTS = {*PROJECTIONS, "act_fn"}


class SparseFFNPlan(ReductionPlan):
    """Each layer its own neurons."""

    def __init__(self, neurons: list[Neurons | None]) -> None:
        self._neurons = neurons

    def visual_work(self, k: int) -> VisualWork:
        """What the k-th layer does for visual tokens."""
        return VisualWork(neurons=self._neurons[k - 1])


@REDUCTIONS.register
class SparseFFN(Reduction):
    """Visual tokens go through floor(share * M) of a layer's M neurons.

    Parameters
    ----------
    share
        0..1; 1 is the stock FFN, 0 leaves visual tokens to attention alone.
    profile
        Measured importance: the most important neurons are taken. None: the first ones, as the published code
        does (its ratio 2 is share 0.5).

    Raises
    ------
    ConfigError
        The share does not lie in 0..1.
    """

    name = "ffn"
    usage = "ffn:SHARE[:FOLDER]"

    def __init__(self, share: float, profile: VisualProfile | None = None) -> None:
        if not 0 <= share <= 1:
            raise ConfigError(f"ffn computes a share of the neurons: expected 0..1, got {share}")
        self.share, self.profile = share, profile
        if profile is not None:
            self._order_LM = profile.importance_LM.argsort(dim=1, descending=True, stable=True)

    def __repr__(self) -> str:
        ranked = "" if self.profile is None else f":ranked@{digest(self.profile.importance_LM)}"
        return f"ffn:{self.share:g}{ranked}"

    @classmethod
    def parse(cls, argument: str) -> SparseFFN:
        """``SHARE`` takes the first neurons, ``SHARE:FOLDER`` the most important ones."""
        text, _, folder = argument.partition(":")
        try:
            share = float(text)
        except ValueError as error:
            raise ConfigError(f"reduction ffn:{argument}: expected ffn:SHARE or ffn:SHARE:FOLDER") from error
        return cls(share, VisualProfile.from_pretrained(Path(folder)) if folder else None)

    def check_backbone(self, backbone: Backbone) -> None:
        """Raise where the FFN is not a plain gated one, or the profile another backbone's."""
        if self.profile is not None:
            self.profile.check(backbone)
        sizes = []
        for index, layer in enumerate(backbone.layers[: backbone.num_layers]):
            ffn = getattr(layer, "mlp", None)
            parts = set(getattr(ffn, "_modules", {}))
            if parts | {"act_fn"} != GATED_PARTS:
                raise UnsupportedBackboneError(
                    f"reduction ffn cannot serve {backbone.model.config.model_type}: layer {index + 1} has "
                    "no plain gated FFN `mlp` of gate_proj, up_proj and down_proj "
                    f"(found {sorted(parts) or 'none'}; experts cannot be cut this way)"
                )
            if not all(type(getattr(ffn, name)) is nn.Linear for name in PROJECTIONS):
                raise UnsupportedBackboneError(
                    f"reduction ffn cannot serve this {backbone.model.config.model_type}: the FFN of layer "
                    f"{index + 1} is adapted or quantised (down_proj is a {type(ffn.down_proj).__name__}): "
                    "merge the adapter, or load the model unquantised"
                )
            sizes.append(ffn.down_proj.in_features)
        if self.profile is not None and any(size > self.profile.importance_LM.shape[-1] for size in sizes):
            raise GateMismatchError(
                "this visual profile ranks no neurons: it was measured where the FFN was no plain gated one; "
                "measure it anew with `dyvte profile`"
            )

    def start(self, rows: TokenRows) -> SparseFFNPlan:
        """The plan for one prefill."""
        if self.share == 1:
            return SparseFFNPlan([None] * rows.num_layers)
        if self.profile is None:
            return SparseFFNPlan([Neurons(self.share)] * rows.num_layers)
        return SparseFFNPlan([Neurons(self.share, order_M) for order_M in self._order_LM])
