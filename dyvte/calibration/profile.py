"""Measure what heads and neurons do with visual tokens: the calibration of YOPO's reductions.

Shapes: B rows, N tokens, S samples, L decoder layers, H query heads, M neurons.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from dyvte import __version__
from dyvte.backbones import describe, fingerprint, watched_attention, weights_digest
from dyvte.errors import CalibrationError
from dyvte.reductions import VisualProfile
from dyvte.spans import Spans, find_spans


@torch.no_grad()
def measure_profile(model: nn.Module, batches: Iterable[Mapping[str, Any]]) -> VisualProfile:
    """One stock forward pass per batch.

    rho of a head is the attention that a sample's tokens pay to visual tokens over what they pay to text
    (YOPO, arXiv 2410.06169, as its code does it). A neuron's importance is the mean size, over visual tokens,
    of what it adds to the residual stream: its activation times the norm of its output weights. Where layers
    have no plain FFN `mlp.down_proj`, importance is (0, 0).

    Parameters
    ----------
    model
        A supported backbone in eval mode; it is left as it was.
    batches
        Model inputs of prompts; rows without an image are excluded.

    Raises
    ------
    CalibrationError
        If no row has an image.
    """
    backbone = describe(model)
    rho_SLH, sums_LM, num_visual = [], _Importance(backbone), 0
    for inputs in batches:
        spans = find_spans(inputs["input_ids"], backbone.visual_token_ids, inputs.get("attention_mask"))
        has_image_B = spans.visual_BN.any(1)
        if not has_image_B.any():
            continue
        rho_LBH: list[Tensor] = []
        with ExitStack() as around:
            around.enter_context(
                watched_attention(
                    backbone,
                    lambda index, weights, spans=spans, rho=rho_LBH: rho.append(_rho(weights, spans)),
                )
            )
            around.enter_context(sums_LM.watching(spans.visual_BN))
            model(**inputs, use_cache=False, logits_to_keep=1)
        rho_SLH += torch.stack(rho_LBH, 1)[has_image_B.cpu()]
        num_visual += int(spans.visual_BN.sum())
    if not rho_SLH:
        raise CalibrationError("no sample with an image was given: there is nothing to measure")
    about = {
        "backbone": {"fingerprint": fingerprint(model), "weights": weights_digest(model)},
        "num_samples": len(rho_SLH),
        "num_visual_tokens": num_visual,
        "rho": "attention to visual tokens over attention to text, summed over a sample's queries",
        "importance": "mean |activation| times norm of the neuron's output weights, over visual tokens",
        "dyvte_version": __version__,
    }
    return VisualProfile(
        rho_SLH=torch.stack(rho_SLH), importance_LM=sums_LM.total() / num_visual, about=about
    )


def _rho(weights_BHNN: Tensor, spans: Spans) -> Tensor:
    """(B, H) float32 on the CPU."""
    valid_BN = spans.valid_BN.to(weights_BHNN.device)
    visual_BN = spans.visual_BN.to(weights_BHNN.device)
    # Rows of padding are no queries; their weights may be anything.
    by_key_BHN = (weights_BHNN.float() * valid_BN[:, None, :, None]).sum(2)
    to_visual_BH = (by_key_BHN * visual_BN[:, None]).sum(2)
    to_text_BH = (by_key_BHN * (valid_BN & ~visual_BN)[:, None]).sum(2)
    return (to_visual_BH / to_text_BH.clamp(min=torch.finfo(torch.float32).tiny)).cpu()


class _Importance:
    """Running sums of |activation| of visual tokens, per layer and neuron."""

    def __init__(self, backbone: Any) -> None:
        self.outputs = [
            getattr(getattr(layer, "mlp", None), "down_proj", None)
            for layer in backbone.layers[: backbone.num_layers]
        ]
        if not all(isinstance(one, nn.Linear) for one in self.outputs):
            self.outputs = []
        self.sums: list[Tensor | None] = [None] * len(self.outputs)

    def watching(self, visual_BN: Tensor) -> ExitStack:
        """Inside, forward passes over these tokens are counted."""
        stack = ExitStack()
        for index, module in enumerate(self.outputs):
            stack.callback(module.register_forward_pre_hook(self._count(index, visual_BN)).remove)
        return stack

    def _count(self, index: int, visual_BN: Tensor) -> Any:
        def count(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            of_visual = args[0][visual_BN.to(args[0].device)].float().abs().sum(0)
            size = of_visual * module.weight.float().norm(dim=0)
            self.sums[index] = size if self.sums[index] is None else self.sums[index] + size

        return count

    def total(self) -> Tensor:
        """(L, M) float32 on the CPU; (0, 0) where the FFN has no neurons to rank."""
        if not self.sums:
            return torch.zeros(0, 0)
        return torch.stack([one.cpu() for one in self.sums])
