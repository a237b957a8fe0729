"""The chance of every schedule, from the heads' logits: what training needs of the decision rule.

Shapes: B rows, L decoder layers, G = F + 1 streams (frozen after each of F layers, and the plain one). All in
log space: the product of 31 survivals underflows long before its gradient does.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from dyvte.gates.logits import HeadLogits


def exit_probabilities(logits_BL: Tensor) -> Tensor:
    """(B, L) log P_k of leaving at k: h_k times the chance not to have left before; column L-1 is the rest.

    h_k = sigmoid(logit_k). The logit of gate L is not read.

    Parameters
    ----------
    logits_BL
        (B, L) exit minus stay, offsets included; half precision is computed in float32.
    """
    logits_BK = logits_BL[:, :-1]
    if logits_BL.dtype not in (torch.float32, torch.float64):
        logits_BK = logits_BK.float()
    log_stay_BK = F.logsigmoid(-logits_BK).cumsum(1)
    before_BL = F.pad(log_stay_BK, (1, 0))
    return before_BL + F.pad(F.logsigmoid(logits_BK), (0, 1))


def schedule_probabilities(logits: HeadLogits) -> Tensor:
    """(B, G, L) log P of every schedule; -inf where a stream offers none.

    Entry [i, k-1] with i < F is frozen after ``freeze_layers[i]`` layers and leaving after k, which is later;
    entry [F, k-1] is leaving after k while still updated. As `ScheduleRule` decides: a row that is still
    updated is asked at each layer whether it leaves, then, if it does not, whether it freezes; a frozen row
    whether it leaves. With a_j = sigmoid(freeze_j), e_k = sigmoid(exit_k) on the plain stream, and d_k the
    same on the stream frozen at f::

        P(k, k) = e_k     prod_{j < k} (1 - e_j) (1 - a_j)
        P(f, k) = (1 - e_f) a_f prod_{j < f} (1 - e_j) (1 - a_j)  x  d_k prod_{f < j < k} (1 - d_j)

    where nothing leaves before the first layer (e_0 = 0) and L takes the rest (e_L = d_L = 1).

    Parameters
    ----------
    logits
        Of both heads on G = F + 1 streams: F that are frozen, and the plain one last.
    """
    exit_BGK = logits.exit_BGL[..., :-1]  # gates 1..L-1
    stay_BGK, leave_BGK = F.logsigmoid(-exit_BGK), F.logsigmoid(exit_BGK)
    update_BL, freeze_BL = F.logsigmoid(-logits.freeze_BL), F.logsigmoid(logits.freeze_BL)
    first_G1 = torch.tensor((*logits.freeze_layers, 0), device=exit_BGK.device)[:, None]
    asked_GK = torch.arange(1, logits.num_layers, device=exit_BGK.device) > first_G1

    plain_stay_BL = F.pad(stay_BGK[:, -1], (1, 0))  # layer 0..L-1
    passed_BGK = torch.cat((stay_BGK[:, :-1], (stay_BGK[:, -1] + update_BL[:, 1:])[:, None]), 1)
    passed_BGK = torch.where(asked_GK, passed_BGK, 0.0)
    before_BL = F.pad(update_BL[:, :1] + F.pad(passed_BGK[:, -1, :-1].cumsum(1), (1, 0)), (1, 0))
    enter_BF = (before_BL + plain_stay_BL + freeze_BL)[:, list(logits.freeze_layers)]
    enter_BG = torch.cat((enter_BF, update_BL[:, :1]), 1)

    leave_BGK = torch.where(asked_GK, leave_BGK, -torch.inf)
    return enter_BG[..., None] + F.pad(passed_BGK.cumsum(2), (1, 0)) + F.pad(leave_BGK, (0, 1))
