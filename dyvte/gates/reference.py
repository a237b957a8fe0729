"""Gates as the DyVTE reference code stores them (arXiv 2411.19628)."""

from __future__ import annotations

import re
from collections.abc import Mapping

from torch import Tensor

from dyvte.errors import CheckpointError

_KEY = re.compile(r"(?:^|\.)visual_gates_router\.(\d+)\.(w[12])\.weight$")


def reference_tensors(state_dict: Mapping[str, Tensor]) -> tuple[dict[str, int], dict[str, Tensor]]:
    """Sizes and tensors of a stack of gates out of a checkpoint of the reference code.

    Parameters
    ----------
    state_dict
        Tensors by name; others than ``visual_gates_router.{i}.w{1,2}.weight`` are passed over.

    Returns
    -------
    sizes, tensors
        ``num_layers``, ``hidden_size`` and ``gate_hidden_size`` of the `GateConfig`; the tensors by their
        names in a `GateStack`.

    Raises
    ------
    CheckpointError
        If no such keys exist, or a layer is missing.
    """
    found: dict[tuple[int, str], Tensor] = {}
    for name, tensor in state_dict.items():
        if match := _KEY.search(name):
            found[int(match[1]), match[2]] = tensor
    if not found:
        raise CheckpointError(
            "no key like 'model.visual_gates_router.0.w1.weight' in this state dict: "
            "it holds no reference gates"
        )
    num_layers = max(i for i, _ in found) + 1
    missing = [f"{i}.{w}" for i in range(num_layers) for w in ("w1", "w2") if (i, w) not in found]
    if missing:
        raise CheckpointError(f"reference gates are incomplete: {missing[:8]} missing of {num_layers} layers")
    width, feature_size = found[0, "w1"].shape
    sizes = {"num_layers": num_layers, "hidden_size": feature_size // 2, "gate_hidden_size": width}
    return sizes, {f"gates.{i}.{w}.weight": t for (i, w), t in found.items()}
