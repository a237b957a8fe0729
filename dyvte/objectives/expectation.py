"""The expected cost over all schedules and its gradient, by recursion over the layers.

`dyvte.gates.schedule_probabilities` gives the chance of every schedule, and the expectation is a sum over
them. The sum need not be written out: what a row is expected to cost from a layer on follows from what it is
expected to cost from the next one on, and the derivative by a logit is the chance of being asked there, times
the slope of the sigmoid, times what the decision changes. That is less arithmetic, and no graph is kept.

Shape letters: B rows, L decoder layers, K = L-1 gates that decide, G = F + 1 streams (frozen after each of F
layers, and the plain one), S prices.
"""

from __future__ import annotations

from typing import Any

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
        # Layers first, so that each step of the recursion works on whole blocks of memory.
        shape = (len(shift_S), 1, 1)
        exit_KSGB = exit_BGL.permute(2, 1, 0)[:-1, None] + shift_S.view(shape)
        leave_KSGB, stay_KSGB = exit_KSGB.sigmoid(), (-exit_KSGB).sigmoid()
        for i, f in enumerate(freezes):  # nobody is asked before the stream begins
            leave_KSGB[:f, :, i], stay_KSGB[:f, :, i] = 0.0, 1.0
        if closed_L is not None:
            leave_KSGB[closed_L[:-1]], stay_KSGB[closed_L[:-1]] = 0.0, 1.0
        freeze_SFB = freeze_BL[:, list(freezes)].T + shift_S.view(shape)
        enter_SFB, update_SFB = freeze_SFB.sigmoid(), (-freeze_SFB).sigmoid()
        cost_LSGB = loss_BGL.permute(2, 1, 0)[:, None] + price_SGL.permute(2, 0, 1)[..., None]

        # From the last layer down: what a row is expected to cost that is asked next after layer k.
        frozen_LSFB = torch.empty_like(cost_LSGB[:, :, :-1])
        plain_LSB, passed_KSB = torch.empty_like(cost_LSGB[:, :, -1]), torch.empty_like(cost_LSGB[:-1, :, -1])
        frozen_LSFB[-1], plain_LSB[-1] = cost_LSGB[-1, :, :-1], cost_LSGB[-1, :, -1]
        for k in range(len(leave_KSGB) - 1, -1, -1):
            torch.lerp(frozen_LSFB[k + 1], cost_LSGB[k, :, :-1], leave_KSGB[k, :, :-1], out=frozen_LSFB[k])
        # A stream's value stays what it is below its own first layer: the lowest one is that of entering.
        entered_SFB = frozen_LSFB[0]
        for k in range(len(leave_KSGB) - 1, -1, -1):
            passed_KSB[k] = plain_LSB[k + 1]
            if k + 1 in freezes:
                i = freezes.index(k + 1)
                torch.lerp(plain_LSB[k + 1], entered_SFB[:, i], enter_SFB[:, i], out=passed_KSB[k])
            torch.lerp(passed_KSB[k], cost_LSGB[k, :, -1], leave_KSGB[k, :, -1], out=plain_LSB[k])
        value_SB = plain_LSB[0]
        if 0 in freezes:
            i = freezes.index(0)
            value_SB = torch.lerp(value_SB, entered_SFB[:, i], enter_SFB[:, i])
        value = (weight_SB * value_SB).sum()
        if not any(ctx.needs_input_grad):
            return value

        # From the first layer up: the chance to be asked there, times the row's weight.
        asked_KSGB = torch.empty_like(leave_KSGB)
        reach_SFB = torch.empty_like(enter_SFB)  # of the freeze gates
        here_SB = weight_SB
        for k in range(len(asked_KSGB) + 1):
            if k:
                asked_KSGB[k - 1, :, -1] = here_SB
                here_SB = here_SB * stay_KSGB[k - 1, :, -1]
            if k in freezes:
                i = freezes.index(k)
                reach_SFB[:, i] = here_SB
                here_SB = here_SB * update_SFB[:, i]
        if len(asked_KSGB):
            torch.mul(reach_SFB, enter_SFB, out=asked_KSGB[0, :, :-1])
        for k in range(1, len(asked_KSGB)):
            torch.mul(asked_KSGB[k - 1, :, :-1], stay_KSGB[k - 1, :, :-1], out=asked_KSGB[k, :, :-1])
        after_KSGB = torch.cat((frozen_LSFB[1:], passed_KSB[:, :, None]), 2)
        asked_KSGB.mul_(leave_KSGB).mul_(stay_KSGB).mul_(cost_LSGB[:-1] - after_KSGB)
        exit_grad_LGB = exit_BGL.new_zeros(exit_BGL.shape[::-1])
        torch.sum(asked_KSGB, 1, out=exit_grad_LGB[:-1])
        updated_SFB = plain_LSB[list(freezes)].transpose(0, 1)
        reach_SFB.mul_(enter_SFB).mul_(update_SFB).mul_(entered_SFB - updated_SFB)
        freeze_grad_BL = torch.zeros_like(freeze_BL)
        freeze_grad_BL[:, list(freezes)] = reach_SFB.sum(0).T
        ctx.save_for_backward(exit_grad_LGB.permute(2, 1, 0), freeze_grad_BL)
        return value

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, given: Tensor) -> tuple[Tensor | None, ...]:
        exit_grad_BGL, freeze_grad_BL = ctx.saved_tensors
        return given * exit_grad_BGL, given * freeze_grad_BL, *([None] * 6)
