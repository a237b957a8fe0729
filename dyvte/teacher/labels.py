"""Greedy labels: the full model's own answers, token by token as generated.

Shape letters: B rows, P prompt tokens, A answer tokens, N = P + A.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from dyvte.backbones import generate_greedily
from dyvte.backbones.greedy import in_answer


@torch.no_grad()
def greedy_answers(
    model: nn.Module, inputs: Mapping[str, Any], max_new_tokens: int
) -> tuple[dict[str, Any], Tensor]:
    """Let the full model answer, and append the tokens it chose to the inputs.

    The generated ids themselves are appended, never a re-tokenised text; what greedy means is said in
    :mod:`dyvte.backbones.greedy`.

    Parameters
    ----------
    model:
        The full model, in eval mode.
    inputs:
        Left-padded prompts, ``attention_mask`` included.
    max_new_tokens:
        An answer not closed by then is cut there (and is then the label as far as it goes).

    Returns
    -------
    inputs, answer_mask
        The inputs grown to (B, N), padded on the left (prompt) and right (answer); True on answer tokens,
        closing EOS included.
    """
    sequences_BN = generate_greedily(model, inputs, max_new_tokens)
    answer_BA = sequences_BN[:, inputs["input_ids"].shape[1] :]
    return append_answers(inputs, answer_BA, in_answer(answer_BA, model))


def append_answers(
    inputs: Mapping[str, Any], answer_BA: Tensor, mask_BA: Tensor
) -> tuple[dict[str, Any], Tensor]:
    """Left-padded prompts grown by answer tokens, padded on the right; and the (B, N) mask of the latter.

    Parameters
    ----------
    inputs
        Of the prompts.
    answer_BA
        (B, A) token ids.
    mask_BA
        (B, A) bool: real ones.
    """
    prompt_BP = inputs["input_ids"]
    grown = dict(inputs)
    for name, value in inputs.items():
        # Other per-token inputs mark token types; generated tokens are plain text, type 0.
        if isinstance(value, Tensor) and value.shape == prompt_BP.shape:
            grown[name] = torch.cat((value, torch.zeros_like(answer_BA, dtype=value.dtype)), 1)
    grown["input_ids"] = torch.cat((prompt_BP, answer_BA), 1)
    grown["attention_mask"] = torch.cat((inputs["attention_mask"], mask_BA.to(inputs["attention_mask"])), 1)
    answer_mask_BN = torch.cat((torch.zeros_like(prompt_BP, dtype=torch.bool), mask_BA), 1)
    return grown, answer_mask_BN
