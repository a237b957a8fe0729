"""One plain forward and what it predicts: for references, for greedy checks, and for training through exits.

Shape letters: B rows, N tokens, A predicted positions of a row, V vocabulary.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from dyvte.backbones import Backbone, describe
from dyvte.decoder import Slots


def predicted_logits(
    model: nn.Module, inputs: Mapping[str, Any], predict_BN: Tensor
) -> tuple[Tensor, Tensor]:
    """Next-token logits of one plain forward at ``predict_BN``: (B, A, V), packed to the left, and which of
    them are real, (B, A).

    Gradients flow, and exits that are installed on the model apply. Slots agree with those of
    :func:`dyvte.teacher.exit_logits`.

    Parameters
    ----------
    model
        In any wrapper.
    inputs
        Of prompts and answers.
    predict_BN
        (B, N) bool.
    """
    backbone = describe(model)
    mask_BN = inputs.get("attention_mask")
    valid_BN = torch.ones_like(predict_BN) if mask_BN is None else mask_BN.bool()
    given = forward_inputs(backbone, inputs, valid_BN)
    if "logits_to_keep" in inspect.signature(backbone.model.forward).parameters:
        first = int(predict_BN.any(0).to(torch.uint8).argmax())
        given["logits_to_keep"] = predict_BN.shape[1] - first
    logits_BNV = model(**given, use_cache=False, return_dict=True).logits
    slots = Slots.of(predict_BN[:, -logits_BNV.shape[1] :])
    return slots.take(logits_BNV), slots.valid


def forward_inputs(backbone: Backbone, inputs: Mapping[str, Any], valid_BN: Tensor) -> dict[str, Any]:
    """The inputs with positions that count real tokens only, as ``generate`` counts them.

    Parameters
    ----------
    backbone
        Of the model.
    inputs
        Of prompts and answers.
    valid_BN
        (B, N) bool: no padding.
    """
    given = {name: value for name, value in inputs.items() if value is not None and name != "labels"}
    # Multi-axis families work out their own positions from the image grid.
    own_positions = any(hasattr(module, "get_rope_index") for module in backbone.path)
    if "position_ids" not in given and "attention_mask" in given and not own_positions:
        given["position_ids"] = (valid_BN.long().cumsum(1) - 1).clamp(min=0)
    return given
