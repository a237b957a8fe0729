"""Greedy generation: the one decoding behind labels, evaluation, plug-ins, analysis and timings.

An answer is, token by token, the argmax over the vocabulary without the visual placeholders (an answer holds
no image), up to an end token. Of what a checkpoint keeps in its ``generation_config.json`` only the end and
padding tokens count: no repetition penalty, minimal length, n-gram ban, suppressed or forced token,
temperature, beam or cache of its own. So the same answer that calibration certifies is the one that
evaluation measures.

Shape letters: B rows, P prompt tokens, A new tokens.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn

from dyvte.backbones.describe import describe, unwrap

# Settings without which generate cannot do; all that are not named here or below are None.
_NEUTRAL = {"do_sample": False, "num_beams": 1, "num_return_sequences": 1, "min_length": 0, "use_cache": True}
# What the checkpoint may say: its special tokens, and who wrote the file.
_ITS_OWN = {"bos_token_id", "decoder_start_token_id", "transformers_version"}


@torch.no_grad()
def generate_greedily(
    model: nn.Module, inputs: Mapping[str, Any], max_new_tokens: int, **changes: Any
) -> Tensor:
    """Greedy answers to a batch of prompts.

    Parameters
    ----------
    model
        A transformers model, also inside wrappers; exits and adapters in force on it are.
    inputs
        Left-padded prompts as the processor made them, ``attention_mask`` included.
    max_new_tokens
        Answers that have not ended by then are cut.
    changes
        Other arguments of ``generate``: those of a measurement (``stopping_criteria``, ``min_new_tokens``),
        or a harness's own decoding (``do_sample``, ``temperature``, ...).

    Returns
    -------
    Tensor
        (B, P + A) prompts and answers; behind a row's end token there is padding.
    """
    return model.generate(**inputs, **greedy_arguments(model, max_new_tokens, **changes))


def greedy_arguments(model: nn.Module, max_new_tokens: int, **changes: Any) -> dict[str, Any]:
    """The arguments of ``generate`` that mean greedy for this model; ``changes`` take the place of some.

    Parameters
    ----------
    model
        Whose end and padding tokens count.
    max_new_tokens
        Tokens of an answer at most.
    **changes
        Arguments of ``generate``.
    """
    ends = end_tokens(model)
    arguments = {
        **dict.fromkeys(_setting_names()),
        **_NEUTRAL,
        "max_new_tokens": max_new_tokens,
        "eos_token_id": list(ends) or None,
        "pad_token_id": pad_token(model),
        "suppress_tokens": list(describe(model).visual_token_ids),
        **changes,
    }
    if arguments.get("min_new_tokens") is not None:  # counts before min_length; given both, generate warns
        del arguments["min_length"]
    return arguments


def end_tokens(model: nn.Module) -> tuple[int, ...]:
    """Ids of the tokens that end an answer, as the checkpoint says."""
    stored = unwrap(model).generation_config.eos_token_id
    return (stored,) if isinstance(stored, int) else tuple(stored or ())


def pad_token(model: nn.Module) -> int:
    """Id of what stands behind an answer that ended before others: the checkpoint's, or else an end token."""
    stored = unwrap(model).generation_config.pad_token_id
    return stored if isinstance(stored, int) else (end_tokens(model) or (0,))[0]


def decoding_identity(model: nn.Module) -> str:
    """What answers depend on beside weights and prompts; part of every run's and every trace's identity.

    Parameters
    ----------
    model
        Its config and generation config say which tokens end an answer and which pad it.
    """
    ends = ",".join(map(str, sorted(end_tokens(model)))) or "none"
    return f"greedy, ends {ends}, pad {pad_token(model)}"


def in_answer(new_BA: Tensor, model: nn.Module) -> Tensor:
    """(B, A) bool: which of the generated tokens are the answer: up to and with its first end token.

    Parameters
    ----------
    new_BA
        (B, A) generated token ids.
    model
        Whose end tokens count.
    """
    ends = torch.tensor(end_tokens(model), device=new_BA.device, dtype=new_BA.dtype)
    is_end_BA = torch.isin(new_BA, ends)
    return (is_end_BA.cumsum(1) - is_end_BA.long()) == 0


@lru_cache(maxsize=1)
def _setting_names() -> tuple[str, ...]:
    """Every setting of generation that this version of transformers knows."""
    from transformers import GenerationConfig

    return tuple(name for name in vars(GenerationConfig()) if name[0] != "_" and name not in _ITS_OWN)
