"""A step of DyVTE's reference trainer, on a stock transformers model, to hold the teacher against.

The reference draws one exit layer for its batch, runs all tokens through all layers, and after that layer has
the batch twice, its second half with the visual keys masked: no compute is saved, and one layer is labelled.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from dyvte.backbones import describe


@torch.no_grad()
def reference_step(
    model: nn.Module, inputs: dict[str, Tensor], answer_mask: Tensor, layer: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Label, loss of the exit and loss of the full model, each (B,), at one exit layer 1..L for the batch.

    The rule is that of `dyvte.objectives.reference_label`, from the logits of one doubled forward.
    """
    visual = inputs["input_ids"] == model.config.image_token_id
    with _doubled_after(model, layer, visual):
        logits = model(**inputs, use_cache=False).logits
    rows = len(visual)
    full, left = (logits, logits) if len(logits) == rows else (logits[:rows], logits[rows:])
    before = torch.cat((answer_mask[:, 1:], torch.zeros_like(answer_mask[:, :1])), 1)
    label, losses = [], []
    for row in range(rows):
        wanted = inputs["input_ids"][row, answer_mask[row]]
        mine, theirs = left[row, before[row]].float(), full[row, before[row]].float()
        agree = (mine.argmax(-1) == theirs.argmax(-1)).float().mean()
        losses.append((cross_entropy(mine, wanted), cross_entropy(theirs, wanted)))
        label.append((agree > 0.99) & (losses[-1][0] < 1.03 * losses[-1][1]))
    exit_loss, full_loss = (torch.stack(column) for column in zip(*losses, strict=True))
    return torch.stack(label), exit_loss, full_loss


@contextmanager
def _doubled_after(model: nn.Module, layer: int, visual: Tensor) -> Iterator[None]:
    """From 0-based layer ``layer`` on the batch is there twice, the second time without visual keys."""
    backbone = describe(model)
    num_tokens = visual.shape[1]
    causal = torch.ones(num_tokens, num_tokens, dtype=torch.bool, device=visual.device).tril()
    own = torch.eye(num_tokens, dtype=torch.bool, device=visual.device)
    allowed = torch.cat((causal.expand(len(visual), -1, -1), (causal & ~visual[:, None]) | own))[:, None]
    mask = allowed
    if backbone.decoder.config._attn_implementation == "eager":
        dtype = next(model.parameters()).dtype
        mask = torch.zeros(allowed.shape, dtype=dtype, device=visual.device)
        mask = mask.masked_fill(~allowed, torch.finfo(dtype).min)

    def hook(first: bool) -> Callable[..., Any]:
        def double(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            hidden = torch.cat((args[0], args[0])) if first else args[0]
            return (hidden, *args[1:]), {**kwargs, "attention_mask": mask}

        return double

    handles = [
        module.register_forward_pre_hook(hook(index == 0), with_kwargs=True)
        for index, module in enumerate(backbone.layers[layer:])
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
