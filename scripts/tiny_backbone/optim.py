"""One optimiser recipe for both stages: Muon for the matrices, AdamW for the rest, fp32 master weights.

The model computes in bf16; the optimisers see fp32 copies. torch's own `Muon` and `AdamW` do the steps.
"""

from __future__ import annotations

import torch
from torch import nn


class MasterOptimizer:
    """Muon + AdamW on fp32 masters of a bf16 model's parameters."""

    def __init__(
        self, matrices: list[nn.Parameter], others: list[nn.Parameter], muon_lr: float, adam_lr: float
    ):
        self.live = [*matrices, *others]
        self.masters = [p.detach().float().clone().requires_grad_() for p in self.live]
        split = len(matrices)
        self.optimizers = [
            torch.optim.Muon(self.masters[:split], lr=muon_lr, weight_decay=0.01, ns_steps=5),
            torch.optim.AdamW(self.masters[split:], lr=adam_lr, betas=(0.9, 0.98), weight_decay=0.0),
        ]
        self.base = [muon_lr, adam_lr]

    def step(self, scale: float, clip: float = 1.0) -> None:
        """One update at `scale` times the base learning rates; clears the gradients."""
        for master, param in zip(self.masters, self.live, strict=True):
            master.grad = None if param.grad is None else param.grad.float()
            param.grad = None
        torch.nn.utils.clip_grad_norm_(self.masters, clip)
        for optimizer, lr in zip(self.optimizers, self.base, strict=True):
            optimizer.param_groups[0]["lr"] = lr * scale
            optimizer.step()
        self.write_back()

    @torch.no_grad()
    def write_back(self) -> None:
        """Copy the masters into the live bf16 parameters."""
        torch._foreach_copy_(self.live, self.masters)

    def state_dict(self) -> dict:
        """Masters and both optimisers' states."""
        return {"masters": self.masters, "optimizers": [o.state_dict() for o in self.optimizers]}

    def load_state_dict(self, state: dict) -> None:
        """Restore what `state_dict` gave, bit for bit."""
        with torch.no_grad():
            for mine, theirs in zip(self.masters, state["masters"], strict=True):
                mine.copy_(theirs)
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        self.write_back()


def schedule(step: int, total: int, warmup: int = 100, decay_share: float = 0.6) -> float:
    """Linear warm-up, a plateau, and a linear decay to zero over the last `decay_share` of the steps."""
    start = int(total * (1 - decay_share))
    if step < warmup:
        return (step + 1) / warmup
    if step < start:
        return 1.0
    return max(0.0, (total - step) / max(1, total - start))


def split_parameters(module: nn.Module, keep_adam: tuple[str, ...]) -> tuple[list, list]:
    """(2-D weights for Muon, everything else); names containing a `keep_adam` piece go to AdamW."""
    matrices, others = [], []
    for name, param in module.named_parameters():
        is_matrix = param.ndim == 2 and not any(piece in name for piece in keep_adam)
        (matrices if is_matrix else others).append(param)
    return matrices, others
