"""The expected cost over all schedules and its gradient, by recursion over the layers.

`dyvte.gates.schedule_probabilities` gives the chance of every schedule, and the expectation is a sum over
them. The sum need not be written out: what a row is expected to cost from a layer on follows from what it is
expected to cost from the next one on, and the derivative by a logit is the chance of being asked there, times
the slope of the sigmoid, times what the decision changes. That is less arithmetic, and no graph is kept.

Shape letters: B rows, L decoder layers, K = L-1 gates that decide, G = F + 1 streams (frozen after each of F
layers, and the plain one), S prices.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from dyvte.gates import HeadLogits


def expected_cost(
    logits: HeadLogits,
    shift_S: Tensor,
    loss_BGL: Tensor,
    price_SGL: Tensor,
    weight_SB: Tensor,
    closed_L: Tensor | None = None,
) -> Tensor:
    """Sum over prices s and rows b of weight x E[loss + price], schedules drawn as the logits + shift_s say.

    Differentiable once, by the logits.

    Parameters
    ----------
    logits
        Of both heads; half precision is computed in float32.
    shift_S
        Added to every logit.
    loss_BGL
        Of each row at every schedule, exits 1..L, the plain stream last. Entries k <= f are not read.
    price_SGL
        Of every schedule, on top.
    weight_SB
        Of each row at each price.
    closed_L
        True for exits 1..L that nobody takes; None: all may be taken.

    Returns
    -------
    () tensor in the logits' dtype, at least float32
    """
    exit_BGL, freeze_BL = logits.exit_BGL, logits.freeze_BL
    if exit_BGL.dtype not in (torch.float32, torch.float64):
        exit_BGL, freeze_BL = exit_BGL.float(), freeze_BL.float()
    others = (one.to(exit_BGL) for one in (shift_S, loss_BGL, price_SGL, weight_SB))
    return _ExpectedCost.apply(exit_BGL, freeze_BL, logits.freeze_layers, *others, closed_L)


class _ExpectedCost(torch.autograd.Function):
    """The gradient is made with the value: both need the same chances, and training asks for both."""

    @staticmethod
    def forward(
        ctx: Any,
        exit_BGL: Tensor,
        freeze_BL: Tensor,
        freezes: tuple[int, ...],
        shift_S: Tensor,
        loss_BGL: Tensor,
        price_SGL: Tensor,
        weight_SB: Tensor,
        closed_L: Tensor | None,
    ) -> Tensor:
        # Layers first, and the plain stream apart: each step of a recursion works on one block of memory.
        frozen, plain = (
            _asked(exit_BGL[:, part], loss_BGL[:, part], price_SGL[:, part], shift_S)
            for part in (slice(0, -1), slice(-1, None))
        )
        for i, f in enumerate(freezes):  # nobody is asked before the stream begins
            frozen.leave[:f, :, i], frozen.stay[:f, :, i] = 0.0, 1.0
        if closed_L is not None:
            for part in (frozen, plain):
                part.leave[closed_L[:-1]], part.stay[closed_L[:-1]] = 0.0, 1.0
        freeze_FSB = freeze_BL.T[list(freezes), None] + shift_S[:, None]
        enter_FSB, update_FSB = freeze_FSB.sigmoid(), freeze_FSB.neg().sigmoid()

        # From the last layer down: what a row is expected to cost that is asked next after layer k + 1.
        after_LSFB = torch.empty_like(frozen.cost)
        after_LSFB[-1] = frozen.cost[-1]
        for k in reversed(range(len(frozen.leave))):
            torch.lerp(after_LSFB[k + 1], frozen.cost[k], frozen.leave[k], out=after_LSFB[k])
        # A stream's value stays what it is below its own first layer: the lowest one is that of entering.
        entered_FSB = after_LSFB[0].transpose(0, 1)
        here_SB, passed, ahead = plain.cost[-1, :, 0], [], []  # behind a freeze gate, and behind an exit gate
        for k in reversed(range(len(plain.leave) + 1)):
            ahead.append(here_SB)
            if k in freezes:
                i = freezes.index(k)
                here_SB = torch.lerp(here_SB, entered_FSB[i], enter_FSB[i])
            passed.append(here_SB)
            if k:
                here_SB = torch.lerp(here_SB, plain.cost[k - 1, :, 0], plain.leave[k - 1, :, 0])
        value = (weight_SB * here_SB).sum()
        if not any(ctx.needs_input_grad):
            return value

        # From the first layer up: the chance to be asked there, times the row's weight.
        exit_grad_LGB = exit_BGL.new_zeros(exit_BGL.shape[::-1])
        freeze_grad_BL = torch.zeros_like(freeze_BL)
        starts_SFB = torch.empty_like(after_LSFB[0])
        asked_SB = weight_SB
        for k in range(len(plain.leave) + 1):
            if k:
                leave_SB, stay_SB = plain.leave[k - 1, :, 0], plain.stay[k - 1, :, 0]
                gain_SB = plain.cost[k - 1, :, 0] - passed[-1 - k]
                exit_grad_LGB[k - 1, -1] = gain_SB.mul_(asked_SB).mul_(leave_SB).mul_(stay_SB).sum(0)
                asked_SB = asked_SB * stay_SB
            if k in freezes:
                i = freezes.index(k)
                enters_SB = asked_SB * enter_FSB[i]
                starts_SFB[:, i] = enters_SB
                gain_SB = entered_FSB[i] - ahead[-1 - k]
                freeze_grad_BL[:, k] = gain_SB.mul_(enters_SB).mul_(update_FSB[i]).sum(0)
                asked_SB = asked_SB * update_FSB[i]
        gain_KSFB = frozen.cost[:-1].sub_(after_LSFB[1:]).mul_(frozen.leave).mul_(frozen.stay)
        asked_KSFB = after_LSFB[:-1]  # not read any more
        for k in range(len(asked_KSFB)):
            if k:
                torch.mul(asked_KSFB[k - 1], frozen.stay[k - 1], out=asked_KSFB[k])
            else:
                asked_KSFB[k] = starts_SFB
        exit_grad_LGB[:-1, :-1] = gain_KSFB.mul_(asked_KSFB).sum(1)
        ctx.save_for_backward(exit_grad_LGB.permute(2, 1, 0), freeze_grad_BL)
        return value

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, given: Tensor) -> tuple[Tensor | None, ...]:
        exit_grad_BGL, freeze_grad_BL = ctx.saved_tensors
        return given * exit_grad_BGL, given * freeze_grad_BL, *([None] * 6)


class _Asked(NamedTuple):
    """Chances (K, S, G, B) to leave where asked, and to stay, and costs (L, S, G, B) of leaving there."""

    leave: Tensor
    stay: Tensor
    cost: Tensor


def _asked(exit_BGL: Tensor, loss_BGL: Tensor, price_SGL: Tensor, shift_S: Tensor) -> _Asked:
    exit_KSGB = exit_BGL.permute(2, 1, 0)[:-1, None].contiguous() + shift_S[:, None, None]
    cost_LSGB = loss_BGL.permute(2, 1, 0)[:, None].contiguous() + price_SGL.permute(2, 0, 1)[..., None]
    return _Asked(exit_KSGB.sigmoid(), exit_KSGB.neg_().sigmoid_(), cost_LSGB)
