"""YOPO's inactive visual heads (arXiv 2410.06169): who does not look at the image is not computed for it.

Shapes: S samples, L decoder layers, H query heads.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from dyvte.backbones import Backbone
from dyvte.errors import ConfigError, GateMismatchError
from dyvte.reductions.base import REDUCTIONS, Reduction, ReductionPlan, TokenRows, VisualWork, digest
from dyvte.reductions.profile import VisualProfile


class HeadsPlan(ReductionPlan):
    """Each layer its own heads."""

    def __init__(self, active_LH: Tensor) -> None:
        self.active_LH = active_LH

    def visual_work(self, k: int) -> VisualWork:
        """What the k-th layer does for visual tokens."""
        heads_H = self.active_LH[k - 1]
        return VisualWork(heads=None if heads_H.all() else heads_H)


@REDUCTIONS.register
class InactiveHeads(Reduction):
    """Visual queries are computed in active heads only; the others contribute nothing for visual tokens.

    Parameters
    ----------
    active_LH
        (L, H) bool. A layer without an active head leaves its visual tokens to the FFN alone.

    Raises
    ------
    ConfigError
        ``active_LH`` is no (layers, heads) bool tensor.
    """

    name = "heads"
    usage = "heads:FOLDER:N"

    def __init__(self, active_LH: Tensor) -> None:
        if active_LH.dim() != 2 or active_LH.dtype != torch.bool:
            raise ConfigError(
                "active heads must be a (layers, heads) bool tensor, got "
                f"{tuple(active_LH.shape)} {active_LH.dtype}"
            )
        self.active_LH = active_LH.cpu()

    def __repr__(self) -> str:
        num_active = self.active_LH.double().sum(1).mean()
        return f"heads:{num_active:g}@{digest(self.active_LH)}"

    @classmethod
    def parse(cls, argument: str) -> InactiveHeads:
        """``FOLDER:N`` keeps N heads per layer on average; ``FOLDER:rho=T`` those above the threshold T."""
        folder, _, rule = argument.rpartition(":")
        key, _, value = rule.rpartition("=")
        try:
            number = float(value)
        except ValueError:
            number = -1.0
        if not folder or key not in ("", "rho") or number < 0:
            raise ConfigError(
                f"reduction heads:{argument}: expected heads:FOLDER:N (heads kept per layer on average) or "
                "heads:FOLDER:rho=THRESHOLD, with a folder written by `dyvte profile`"
            )
        profile = VisualProfile.from_pretrained(Path(folder))
        active = active_heads if key else active_heads_for_mean
        return _Profiled(active(profile.rho_SLH, number), profile)

    def check_backbone(self, backbone: Backbone) -> None:
        """Raise where the heads are not those of this backbone."""
        text = backbone.decoder.config
        have = (backbone.num_layers, text.num_attention_heads)
        if tuple(self.active_LH.shape) != have:
            raise GateMismatchError(
                f"active heads are given for {tuple(self.active_LH.shape)} layers and heads, "
                f"the backbone has {have}"
            )

    def start(self, rows: TokenRows) -> HeadsPlan:
        """The plan for one prefill."""
        return HeadsPlan(self.active_LH)


class _Profiled(InactiveHeads):
    """Active heads that were measured on a backbone."""

    def __init__(self, active_LH: Tensor, profile: VisualProfile) -> None:
        super().__init__(active_LH)
        self.profile = profile

    def check_backbone(self, backbone: Backbone) -> None:
        """Raise where the profile is another backbone's."""
        self.profile.check(backbone)
        super().check_backbone(backbone)


def active_heads(rho_SLH: Tensor, threshold: float, *, share: float = 0.4, spared: int = 2) -> Tensor:
    """(L, H) bool: rho above the threshold in more than `share` of the samples; the first layers keep all.

    The published code's rule: rho is a head's attention to visual tokens over that to text, summed over
    queries; more than 40 of 100 samples; layers 1 and 2 are never pruned.

    Parameters
    ----------
    rho_SLH
        (S, L, H) of each sample, layer and head.
    threshold
        Of rho.
    share
        Of the samples.
    spared
        First layers that keep all.
    """
    active_LH = (rho_SLH > threshold).double().mean(0) > share
    active_LH[:spared] = True
    return active_LH


def active_heads_for_mean(
    rho_SLH: Tensor, mean_kept: float, *, share: float = 0.4, spared: int = 2
) -> Tensor:
    """(L, H) bool: `active_heads` at the threshold that keeps at most `mean_kept` heads per layer on average.

    Parameters
    ----------
    rho_SLH
        (S, L, H) of each sample, layer and head.
    mean_kept
        Heads per layer.
    share
        Of the samples.
    spared
        First layers that keep all.

    Raises
    ------
    ConfigError
        If the spared layers alone keep more.
    """
    num_layers, num_heads = rho_SLH.shape[1:]
    # A head is active below its critical threshold: the value that more than `share` of its samples exceed.
    above = int(share * len(rho_SLH)) + 1
    critical_LH = rho_SLH.sort(0, descending=True).values[above - 1]
    wanted = int(mean_kept * num_layers + 1e-9) - min(spared, num_layers) * num_heads
    if wanted < 0:
        raise ConfigError(
            f"{mean_kept} heads per layer on average: the first {spared} layers keep all {num_heads} of "
            f"theirs, so at least {min(spared, num_layers) * num_heads / num_layers:g} are needed"
        )
    active_LH = torch.zeros(num_layers, num_heads, dtype=torch.bool)
    active_LH[:spared] = True
    best = critical_LH[spared:].flatten().argsort(descending=True, stable=True)[:wanted]
    active_LH[spared:].view(-1)[best] = True
    return active_LH
