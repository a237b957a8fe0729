"""How question-only routers are trained: several at once, what is the same for all of them done once.

Shape letters: B samples, U distinct questions, F features, C routers, H hidden units, O outputs, M labels of
a sample (exits or schedules).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dyvte.errors import DataError

Objective = Callable[[Tensor, Tensor, Tensor], Tensor]
"""From outputs (C, U, O), the mean labels (U, M) of the samples that ask each question, and their share (U,)
of the batch, to the sum of all routers' losses. But for a constant it depends on a question's labels through
their mean alone."""


@dataclass(frozen=True, kw_only=True)
class RouterSettings:
    """How a question-only router is trained; ``min_parameters`` makes it no smaller than the gates.

    ``span`` 1: a distribution over 1..L, at the price ``lam``; it leaves once enough of it has passed.
    Larger: a chance to leave per layer, as gates have it, with their objective over many prices and their
    rule.
    """

    lam: float
    span: float = 1.0
    epochs: int = 20
    learning_rate: float = 3e-3
    batch_size: int = 64
    weight_decay: float = 0.01
    seed: int = 0
    min_parameters: int = 0
    loss: str = "risk"
    """What the gates learned from, see :func:`dyvte.objectives.answer_loss`."""
    memory_price: float = 0.0


class RouterNetwork(nn.Module):
    """MLP from question features to ``num_outputs`` numbers; ``mean_F`` and ``scale_F`` standardise them."""

    def __init__(self, mean_F: Tensor, scale_F: Tensor, hidden_size: int, num_outputs: int) -> None:
        super().__init__()
        self.register_buffer("mean_F", mean_F)
        self.register_buffer("scale_F", scale_F)
        self.layers = nn.Sequential(
            nn.Linear(len(mean_F), hidden_size), nn.GELU(), nn.Linear(hidden_size, num_outputs)
        )

    def forward(self, features_BF: Tensor) -> Tensor:
        """(B, O) outputs."""
        return self.layers((features_BF - self.mean_F) / self.scale_F)

    @property
    def num_parameters(self) -> int:
        """Of the network."""
        return sum(parameter.numel() for parameter in self.parameters())


def hidden_units(num_features: int, num_outputs: int, min_parameters: int) -> int:
    """A width, 32 or more, at which a `RouterNetwork` has at least that many parameters.

    Parameters
    ----------
    num_features, num_outputs : of the network.
    min_parameters : those of the gates that it is compared with.
    """
    return max(32, math.ceil(min_parameters / (num_features + 1 + num_outputs)))


def standardisation(features_BF: Tensor) -> tuple[Tensor, Tensor]:
    """(F,) mean and deviation of features; 1 for one that never varies."""
    scale_F = features_BF.std(0, correction=0)
    return features_BF.mean(0), torch.where(scale_F > 1e-6, scale_F, torch.ones_like(scale_F))


def router_steps(num_samples: int, settings: RouterSettings) -> int:
    """Optimiser steps of a training.

    Parameters
    ----------
    num_samples
        To train on.
    settings
        Of the training.
    """
    return settings.epochs * math.ceil(num_samples / settings.batch_size)


def fit_together(
    routers: Sequence[RouterNetwork],
    features_BF: Tensor,
    labels_BM: Tensor,
    settings_C: Sequence[RouterSettings],
    objective: Objective,
    advance: Callable[[int], object] | None = None,
) -> list[RouterNetwork]:
    """Train routers of one shape on the same batches, each as if alone.

    A router's parameters appear in its own term of the objective only, so the sum trains each by itself. What
    a router says of a question is the same for all samples that ask it, so that each batch holds every
    question once, with the mean of its samples' labels.

    Parameters
    ----------
    routers : as they start.
    features_BF : of the samples' questions.
    labels_BM : of the samples, made once.
    settings_C : of each router.
    objective : what is made small.
    advance : called with the number of steps done, for a progress bar.

    Returns
    -------
    list of RouterNetwork
        The same, trained and frozen.

    Raises
    ------
    DataError
        The settings do not go together.
    """
    if len({(s.seed, s.epochs, s.batch_size, s.min_parameters, s.loss) for s in settings_C}) != 1:
        raise DataError("routers trained together need the same seed, epochs, batch size, size and loss")
    first, network = settings_C[0], routers[0]
    distinct_QF, question_B = features_BF.unique(dim=0, return_inverse=True)
    normed_QF = (distinct_QF - network.mean_F) / network.scale_F
    optimizer = torch.optim.AdamW(
        [
            {"params": list(router.parameters()), "lr": s.learning_rate, "weight_decay": s.weight_decay}
            for router, s in zip(routers, settings_C, strict=True)
        ],
        fused=True,
    )
    steps = router_steps(len(features_BF), first)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, max(1, steps))
    for _ in range(first.epochs):
        for rows in torch.randperm(len(features_BF)).split(first.batch_size):
            asked_U, of_B = question_B[rows].unique(return_inverse=True)
            share_U = torch.bincount(of_B).float() / len(rows)
            means_UM = labels_BM.new_zeros(len(asked_U), labels_BM.shape[1])
            means_UM.index_add_(0, of_B, labels_BM[rows]).div_(len(rows) * share_U[:, None])
            loss = objective(_outputs_together(routers, normed_QF[asked_U]), means_UM, share_U)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            if advance is not None:
                advance(1)
    return [router.eval().requires_grad_(False) for router in routers]


def _outputs_together(routers: Sequence[RouterNetwork], normed_UF: Tensor) -> Tensor:
    """(C, U, O) outputs of all routers; each of their layers is one matrix product."""
    inner, outer = ([router.layers[i] for router in routers] for i in (0, 2))
    weight, bias = (torch.cat([getattr(layer, name) for layer in inner]) for name in ("weight", "bias"))
    hidden_CUH = F.gelu(F.linear(normed_UF, weight, bias)).unflatten(1, (len(routers), -1)).transpose(0, 1)
    weight_COH = torch.stack([layer.weight for layer in outer])
    bias_C1O = torch.stack([layer.bias for layer in outer])[:, None]
    return torch.baddbmm(bias_C1O, hidden_CUH, weight_COH.transpose(1, 2))
