"""Declares torchvision's operators before it is imported, where torch is built for the CPU.

The registry's torchvision is built for CUDA: beside a CPU torch its library does not load, and then its own
import fails ("operator torchvision::nms does not exist"). With the two operators declared, its Python part
loads, which is all that VLMEvalKit, vLLM and transformers' processors want of it. ``scripts/test_plugins.sh``
puts this file into their environments.
"""

from __future__ import annotations

import sys
from importlib.abc import MetaPathFinder
from typing import Any


class _BeforeTorchvision(MetaPathFinder):
    """Finds nothing; waits for torchvision."""

    def find_spec(self, name: str, path: Any, target: Any = None) -> None:
        if name != "torchvision":
            return
        sys.meta_path.remove(self)
        import torch

        if torch.version.cuda is None:
            self.library = torch.library.Library("torchvision", "DEF")
            for operator in ("nms", "qnms"):
                self.library.define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
            sys.modules[__name__].kept = self  # the declaration lives as long as its library


sys.meta_path.insert(0, _BeforeTorchvision())
