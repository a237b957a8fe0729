"""Brute force: the whole padded sequence at every step, no cache, visual keys hidden layer by layer.

Shares no code with the runtime. Shapes: B rows, N tokens so far, L layers, P prompts (rows before beams).
"""

from __future__ import annotations

import inspect
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor


@contextmanager
def exit_by_masks(model, exits_P, visual_ids, layers=None, attention=None):
    """Inside, decoder layer i gets a causal 4D mask without the visual keys of rows whose exit is <= i.

    Only forward calls without a cache are covered. `exits_P` has one entry per prompt; beams repeat it.
    `attention` is a family's own rule where it is not causal; see `families.ATTENTION`.
    """
    layers = model.get_decoder().layers if layers is None else layers
    exits_P = torch.as_tensor(exits_P)
    now: dict[str, Any] = {}

    def look(module, args, kwargs):
        ids_BN = kwargs["input_ids"]
        valid_BN = kwargs.get("attention_mask")
        valid_BN = torch.ones_like(ids_BN) if valid_BN is None else valid_BN
        now.update(visual=torch.isin(ids_BN, torch.tensor(list(visual_ids))), valid=valid_BN.bool())
        now.setdefault("prompt", ids_BN.shape[1])
        now["ids"] = ids_BN
        now["exits"] = exits_P.repeat_interleave(len(ids_BN) // len(exits_P))

    def swap(index):
        def hook(module, args, kwargs):
            seen_BN = now["valid"] & ~(now["visual"] & (now["exits"] <= index)[:, None])
            length = seen_BN.shape[1]
            if attention is None:
                by_rule = torch.ones(length, length, dtype=torch.bool).tril()
            else:
                by_rule = attention(now["ids"], now["prompt"], index)
            allowed = (by_rule & seen_BN[:, None, :])[:, None]
            mask = torch.zeros(allowed.shape).masked_fill(~allowed, torch.finfo(torch.float32).min)
            return args, {**kwargs, "attention_mask": mask}

        return hook

    handles = [model.register_forward_pre_hook(look, with_kwargs=True)]
    for i, layer in enumerate(layers):
        handles.append(layer.register_forward_pre_hook(swap(i), with_kwargs=True))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def positions_of(model, ids_BN: Tensor, valid_BN: Tensor, inputs: dict) -> Tensor:
    """Position ids as `generate` makes them: (B, N) counted over real tokens; with M-RoPE (4, B, N)."""
    text_BN = (valid_BN.cumsum(1) - 1).clamp(min=0)
    if "mm_token_type_ids" not in inputs:
        return text_BN
    axes_3BN, _ = model.model.get_rope_index(
        ids_BN,
        _grown(inputs["mm_token_type_ids"], ids_BN.shape[1]),
        image_grid_thw=inputs.get("image_grid_thw"),
        video_grid_thw=inputs.get("video_grid_thw"),
        attention_mask=valid_BN,
    )
    return torch.cat([text_BN[None], axes_3BN])


def _grown(types_BN: Tensor, tokens: int) -> Tensor:
    # what is generated is text
    return torch.nn.functional.pad(types_BN, (0, tokens - types_BN.shape[1]))


@torch.no_grad()
def greedy_reference(model, inputs: dict, exits_B, visual_ids, steps: int, attention=None, freezes_B=None):
    """Logits (B, 1 + steps, V) of the prefill's end and each greedy step, and tokens (B, 1 + steps)."""
    inputs = dict(inputs)
    ids_BN, valid_BN = inputs.pop("input_ids"), inputs.pop("attention_mask")
    logits, tokens = [], []
    never_B = [len(model.get_decoder().layers)] * len(ids_BN)
    with (
        exit_by_masks(model, exits_B, visual_ids, attention=attention),
        frozen_by_hooks(model, never_B if freezes_B is None else freezes_B, visual_ids),
    ):
        for _ in range(steps + 1):
            grown = {n: _grown(v, ids_BN.shape[1]) for n, v in inputs.items() if n.endswith("token_type_ids")}
            out = model(
                input_ids=ids_BN,
                attention_mask=valid_BN,
                position_ids=positions_of(model, ids_BN, valid_BN, inputs),
                use_cache=False,
                **{**inputs, **grown},
            )
            logits.append(out.logits[torch.arange(len(ids_BN)), last_valid(valid_BN)])
            tokens.append(allowed_argmax(logits[-1], visual_ids))
            ids_BN = torch.cat([ids_BN, tokens[-1][:, None]], 1)
            valid_BN = torch.cat([valid_BN, torch.ones_like(valid_BN[:, :1])], 1)
    return torch.stack(logits, 1), torch.stack(tokens, 1)


@torch.no_grad()
def greedy_cached(model, inputs: dict, visual_ids, steps: int):
    """The same by the ordinary loop of cached forward calls, for use inside an exit block; also the cache."""
    inputs = dict(inputs)
    ids_BN, valid_BN = inputs.pop("input_ids"), inputs.pop("attention_mask")
    out = model(
        input_ids=ids_BN,
        attention_mask=valid_BN,
        position_ids=positions_of(model, ids_BN, valid_BN, inputs),
        use_cache=True,
        **inputs,
    )
    logits = [out.logits[torch.arange(len(ids_BN)), last_valid(valid_BN)]]
    tokens = [allowed_argmax(logits[-1], visual_ids)]
    for _ in range(steps):
        ids_BN = torch.cat([ids_BN, tokens[-1][:, None]], 1)
        valid_BN = torch.cat([valid_BN, torch.ones_like(valid_BN[:, :1])], 1)
        out = model(
            input_ids=tokens[-1][:, None],
            attention_mask=valid_BN,
            position_ids=positions_of(model, ids_BN, valid_BN, inputs)[..., -1:],
            past_key_values=out.past_key_values,
            use_cache=True,
        )
        logits.append(out.logits[:, -1])
        tokens.append(allowed_argmax(logits[-1], visual_ids))
    return torch.stack(logits, 1), torch.stack(tokens, 1), out.past_key_values


def last_valid(valid_BN: Tensor) -> Tensor:
    """Index of each row's last real token."""
    return valid_BN.shape[1] - 1 - valid_BN.flip(1).argmax(1)


def allowed_argmax(logits_BV: Tensor, visual_ids) -> Tensor:
    """Greedy token, never a placeholder: random weights like to say them."""
    logits_BV = logits_BV.clone()
    logits_BV[:, list(visual_ids)] = -torch.inf
    return logits_BV.argmax(1)


@contextmanager
def exit_in_own_masks(model, exits_B, visual_ids, layers):
    """Inside, each decoder layer's own additive mask also hides the visual keys of rows whose exit is past.

    For models in eager mode without a cache: whatever rule a family's masks follow is kept as it is.
    """
    exits_B, now = torch.as_tensor(exits_B), {}

    def look(module, args, kwargs):
        now["visual"] = torch.isin(kwargs["input_ids"], torch.tensor(list(visual_ids)))

    def hide(index):
        def hook(module, args, kwargs):
            names = list(inspect.signature(module.forward).parameters)
            kwargs = {**dict(zip(names, args, strict=False)), **kwargs}
            gone_BN = now["visual"] & (exits_B <= index)[:, None]
            mask = kwargs["attention_mask"]
            kwargs["attention_mask"] = mask.masked_fill(gone_BN[:, None, None], torch.finfo(mask.dtype).min)
            return (), kwargs

        return hook

    handles = [model.register_forward_pre_hook(look, with_kwargs=True)]
    handles += [layer.register_forward_pre_hook(hide(i), with_kwargs=True) for i, layer in enumerate(layers)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def frozen_by_hooks(model, freezes_P, visual_ids, layers=None):
    """Inside, decoder layers behind a prompt's freeze layer hand its visual states on as they came.

    `freezes_P`: one entry per prompt, or an (L, P) bool tensor: which layers freeze which prompt. Put it
    around forward calls without a cache; combines with `exit_by_masks`.
    """
    layers = model.get_decoder().layers if layers is None else layers
    freezes_P, now = torch.as_tensor(freezes_P), {}

    def look(module, args, kwargs):
        now["visual"] = torch.isin(kwargs["input_ids"], torch.tensor(list(visual_ids)))

    def restore(index):
        def hook(module, args, kwargs, output):
            hidden = args[0] if args else kwargs["hidden_states"]
            frozen_P = freezes_P[index] if freezes_P.dim() == 2 else freezes_P <= index
            frozen_B = frozen_P.repeat_interleave(len(hidden) // len(frozen_P))
            kept_BN1 = (now["visual"] & frozen_B[:, None])[..., None]
            if isinstance(output, tuple):
                return (torch.where(kept_BN1, hidden, output[0]), *output[1:])
            return torch.where(kept_BN1, hidden, output)

        return hook

    handles = [model.register_forward_pre_hook(look, with_kwargs=True)]
    handles += [layer.register_forward_hook(restore(i), with_kwargs=True) for i, layer in enumerate(layers)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
