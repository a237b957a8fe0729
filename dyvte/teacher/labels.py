"""Greedy labels: the full model's own answers, token by token as generated.

Shape letters: B rows, P prompt tokens, A answer tokens, N = P + A.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from dyvte.backbones import describe

# Plain argmax decoding, whatever the checkpoint's own generation defaults are.
_GREEDY = {
    "do_sample": False,
    "num_beams": 1,
    "repetition_penalty": 1.0,
    "no_repeat_ngram_size": 0,
    "min_length": 0,
    "use_cache": True,
    "return_dict_in_generate": False,
    # Neutral values keep transformers from warning about sampling settings of the checkpoint.
    "temperature": 1.0,
    "top_k": 50,
    "top_p": 1.0,
}


@torch.no_grad()
def greedy_answers(
    model: nn.Module, inputs: Mapping[str, Any], max_new_tokens: int
) -> tuple[dict[str, Any], Tensor]:
    """Let the full model answer, and append the tokens it chose to the inputs.

    The generated ids themselves are appended, never a re-tokenised text. Visual placeholders are never
    generated.

    Parameters
    ----------
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
    from transformers import GenerationConfig

    backbone = describe(model)
    stored = backbone.model.generation_config
    eos_ids = stored.eos_token_id
    eos_ids = [eos_ids] if isinstance(eos_ids, int) else list(eos_ids or [])
    pad_id = stored.pad_token_id if stored.pad_token_id is not None else (eos_ids or [0])[0]
    config = GenerationConfig(
        **_GREEDY,
        max_new_tokens=max_new_tokens,
        eos_token_id=eos_ids or None,
        pad_token_id=pad_id,
        suppress_tokens=list(backbone.visual_token_ids),
    )
    sequences_BN = model.generate(**inputs, generation_config=config)
    width = inputs["input_ids"].shape[1]
    answer_BA = sequences_BN[:, width:]
    is_eos_BA = torch.isin(answer_BA, torch.tensor(eos_ids, device=answer_BA.device, dtype=answer_BA.dtype))
    # An answer lasts up to and including its first EOS; the pad token may be the EOS token itself.
    mask_BA = (is_eos_BA.cumsum(1) - is_eos_BA.long()) == 0
    return append_answers(inputs, answer_BA, mask_BA)


def append_answers(
    inputs: Mapping[str, Any], answer_BA: Tensor, mask_BA: Tensor
) -> tuple[dict[str, Any], Tensor]:
    """Left-padded prompts grown by answer tokens, padded on the right; and the (B, N) mask of the latter."""
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
