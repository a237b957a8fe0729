"""What a teacher pass must equal: separate plain forwards, with hooks that hide and hold visual tokens; and
batches for it.

Shares no code with the teacher. Shapes: B rows, N tokens, S schedules.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from dyvte.backbones import describe
from dyvte.gates import prompt_features
from dyvte.spans import find_spans
from dyvte.teacher import Trace
from tests.helpers.families import FAMILIES, one_row
from tests.helpers.reference import frozen_by_hooks
from tests.helpers.zoo.common import Built


def padded(inputs: dict[str, Tensor], side: str) -> dict[str, Tensor]:
    """The same rows, padded on ``side``; they come padded on the left."""
    if side == "left":
        return inputs
    mask = inputs["attention_mask"]
    shift = (mask == 0).sum(1).tolist()

    def moved(value):
        return torch.stack([row.roll(-by) for row, by in zip(value, shift, strict=True)])

    return {
        name: moved(value) if value.dim() == 2 and value.shape == mask.shape else value
        for name, value in inputs.items()
    }


def answers_of(inputs: dict[str, Tensor], count: int = 3) -> Tensor:
    """The last tokens of every row."""
    mask = inputs["attention_mask"]
    left = mask.sum(1, keepdim=True) - mask.cumsum(1)
    return mask.bool() & (left < count)


@contextmanager
def hidden_after(layers: Sequence[torch.nn.Module], k: int, visual_BN: Tensor):
    """Inside, layers k+1..L see no visual key; the masks are otherwise the model's own."""

    def hide(module, args, kwargs):
        mask = kwargs["attention_mask"]
        if mask.dtype == torch.bool:
            mask = mask & ~visual_BN[:, None, None, :]
        else:
            mask = mask.masked_fill(visual_BN[:, None, None, :], torch.finfo(mask.dtype).min)
        return args, {**kwargs, "attention_mask": mask}

    handles = [layer.register_forward_pre_hook(hide, with_kwargs=True) for layer in layers[k:]]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def separate_pass(model, inputs: dict[str, Tensor], f: int, k: int) -> tuple[Tensor, list[Tensor]]:
    """One forward whose visual tokens are updated in layers 1..f and read in layers 1..k: (B, N, V) logits,
    and the (B, N, D) that enter the first layer and come out of each."""
    backbone = describe(model)
    visual_ids = backbone.visual_token_ids
    visual_BN = torch.isin(inputs["input_ids"], torch.tensor(visual_ids))
    placed = dict(inputs)
    if not any(hasattr(module, "get_rope_index") for module in backbone.path):
        placed["position_ids"] = (inputs["attention_mask"].cumsum(1) - 1).clamp(min=0)
    states: list[Tensor] = []

    def enters(module, args, kwargs):
        states.append(args[0] if args else kwargs["hidden_states"])

    def leaves(module, args, output):
        states.append(output[0] if isinstance(output, tuple) else output)

    layers = backbone.layers[: backbone.num_layers]
    with (
        hidden_after(layers, k, visual_BN),
        frozen_by_hooks(model, [f] * len(visual_BN), visual_ids, layers=layers),
    ):
        handles = [layers[0].register_forward_pre_hook(enters, with_kwargs=True)]
        handles += [layer.register_forward_hook(leaves) for layer in layers]
        try:
            return model(**placed, use_cache=False).logits, states
        finally:
            for handle in handles:
                handle.remove()


def about_images(family: str, attention: str) -> tuple[Built, Tensor, list[int]]:
    """A batch of several questions about each of two pictures (or pairs of them), and one without any.

    Returns
    -------
    built, answer_BN, images
        The model with its inputs, padded on the left; the answers; and which rows hold the same image, by
        number, -1 for none.
    """
    model, inputs, visual_ids = FAMILIES[family](attention)
    generator = torch.Generator().manual_seed(3)
    ids, types, images = [], [], []
    # The first image is asked about three times, at very different length; the other one twice.
    of_row = {0: (5, 30, 7), 1: (0,), 2: (4, 12)}
    parts: dict[str, list[Tensor]] = {}
    for row, texts in of_row.items():
        alone = one_row(family, inputs, row)
        is_visual_N = torch.isin(alone["input_ids"][0], torch.tensor(visual_ids))
        end = int(is_visual_N.nonzero()[-1]) + 1 if is_visual_N.any() else len(is_visual_N)
        for length in texts:
            text = torch.randint(7, 64, (length,), generator=generator)
            ids.append(torch.cat((alone["input_ids"][0, :end], text)))
            images.append(row // 2 if row != 1 else -1)
            for name, value in alone.items():
                if value.shape == alone["input_ids"].shape:
                    continue
                parts.setdefault(name, []).append(value)
            if row == 1 and "batch_num_images" in inputs:
                parts["batch_num_images"].append(inputs["batch_num_images"][1:2])
            if row == 1 and family in ("idefics3", "smolvlm"):
                parts["pixel_values"].append(torch.zeros_like(inputs["pixel_values"][1:2]))
    width = max(map(len, ids))
    batch = {
        "input_ids": torch.stack([torch.nn.functional.pad(row, (width - len(row), 0)) for row in ids]),
        "attention_mask": torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in ids]),
    }
    for name in ("token_type_ids", "mm_token_type_ids"):
        if name in inputs:
            marked = torch.isin(batch["input_ids"], torch.tensor(visual_ids))
            types = marked if inputs[name].any() else torch.zeros_like(marked)
            batch[name] = types.to(inputs[name].dtype)
    batch |= {name: torch.cat(values) for name, values in parts.items()}
    return (model, batch, visual_ids), answers_of(batch), images


def before(answer_BN: Tensor) -> Tensor:
    """(B, N) bool: positions whose logits predict an answer token."""
    predict_BN = answer_BN.roll(-1, dims=1)
    predict_BN[:, -1] = False
    return predict_BN


def schedules_of(num_layers: int, freezes: Iterable[int]) -> list[tuple[int, int]]:
    """All (f, k) with k >= f."""
    return [(f, k) for f in freezes for k in range(f, num_layers + 1)]


def close(found: Trace, expected: Trace, atol: float = 1e-4) -> None:
    """Assert that two traces agree, their grids included, and all argmaxes exactly."""
    parts = [(found.tensors(), expected.tensors())]
    if expected.grid is not None:
        parts.append((found.grid.tensors(), expected.grid.tensors()))
    for mine, theirs in parts:
        for name, values in theirs.items():
            discrete = name in ("agreement", "same_answer", "num_visual")
            torch.testing.assert_close(
                mine[name], values, atol=0 if discrete else atol, rtol=0, equal_nan=True,
                msg=lambda text, name=name: f"{name}: {text}",
            )  # fmt: skip
    assert (found.sample_ids, found.exits, found.freezes) == (
        expected.sample_ids, expected.exits, expected.freezes,
    )  # fmt: skip


def check_grid(trace: Trace, model, inputs, answer, visual_ids, features: Sequence[str]) -> None:
    """Labels and features of all schedules of a trace against separate passes."""
    predict = before(answer)
    spans = find_spans(inputs["input_ids"], visual_ids, inputs["attention_mask"], answer)

    def of(states):
        return prompt_features(states, spans.prompt_BN, spans.visual_BN, features)

    full, states = separate_pass(model, inputs, trace.num_layers, trace.num_layers)
    full = full.double().log_softmax(-1)
    embeddings = of(states[0])
    torch.testing.assert_close(trace.grid.embeddings, embeddings, atol=1e-4, rtol=0)
    place = {pair: column for column, pair in enumerate(trace.grid.stream_layers)}
    for f, k in schedules_of(trace.num_layers, trace.freezes):
        logits, states = separate_pass(model, inputs, f, k)
        logits = logits.double().log_softmax(-1)
        kl_BN = (full.exp() * (full - logits)).sum(-1)
        back_BN = (logits.exp() * (logits - full)).sum(-1)
        column = trace.freezes.index(f)
        for row in range(len(predict)):
            at = predict[row]
            labels = inputs["input_ids"][row][answer[row]]
            loss = -logits[row][at].gather(-1, labels[:, None]).mean()
            expected = {"risk": kl_BN[row][at].mean(), "reverse_risk": back_BN[row][at].mean(), "loss": loss}
            for label, value in expected.items():
                mine = getattr(trace.grid, label)[row, column, k].double()
                torch.testing.assert_close(mine, value, atol=1e-4, rtol=0)
        if k == trace.num_layers:
            for layer in range(f + 1, k + 1):
                mine = trace.grid.features[:, place[f, layer]]
                torch.testing.assert_close(mine, of(states[layer]), atol=1e-4, rtol=0)
