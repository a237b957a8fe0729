"""The one-pass teacher on every family that the runtime serves: M-RoPE, deepstack, sliding windows,
bidirectional images, prefix-LM; rows with one, no and two images, padded on either side.

The reference takes each layer's own mask and hides the visual keys past the exit in it; one pass per exit.
"""

from __future__ import annotations

import pytest
import torch

from dyvte.backbones import describe
from dyvte.teacher import streams
from dyvte.teacher.exits import exit_logits, thinned_exits
from dyvte.teacher.memory import PassPlan
from tests.helpers.families import FAMILIES

FAST = {
    ("qwen2_vl", "eager", "left"),
    ("qwen3_vl", "sdpa", "right"),
    ("gemma3", "sdpa", "left"),
    ("paligemma", "eager", "right"),
    ("llava_onevision", "sdpa", "right"),
}
CASES = [
    pytest.param(*case, id=" ".join(case), marks=() if case in FAST else pytest.mark.full)
    for case in (
        (name, attention, side)
        for name in FAMILIES
        for attention in ("sdpa", "eager")
        for side in ("left", "right")
    )
]


def padded(inputs: dict[str, torch.Tensor], side: str) -> dict[str, torch.Tensor]:
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


def masked_logits(model, layers, inputs, k: int, visual: torch.Tensor) -> torch.Tensor:
    """Logits when layers k+1..L see no visual key; the mask is otherwise the model's own."""

    def hide(module, args, kwargs):
        mask = kwargs["attention_mask"]
        if mask.dtype == torch.bool:
            mask = mask & ~visual[:, None, None, :]
        else:
            mask = mask.masked_fill(visual[:, None, None, :], torch.finfo(mask.dtype).min)
        return args, {**kwargs, "attention_mask": mask}

    handles = [layer.register_forward_pre_hook(hide, with_kwargs=True) for layer in layers[k:]]
    try:
        with torch.no_grad():
            return model(**inputs, use_cache=False).logits
    finally:
        for handle in handles:
            handle.remove()


def reference(model, inputs, predict: torch.Tensor, exits) -> dict[int, list[torch.Tensor]]:
    """For each exit, the logits of every row at its predicted positions."""
    backbone = describe(model)
    valid = inputs["attention_mask"].bool()
    visual = torch.isin(inputs["input_ids"], torch.tensor(backbone.visual_token_ids))
    placed = dict(inputs)
    if not any(hasattr(module, "get_rope_index") for module in backbone.path):
        placed["position_ids"] = (valid.long().cumsum(1) - 1).clamp(min=0)
    found = {}
    for k in exits:
        logits = masked_logits(model, backbone.layers, placed, k, visual)
        found[k] = [logits[row][predict[row]] for row in range(len(predict))]
    return found


def answers_of(inputs: dict[str, torch.Tensor], count: int = 3) -> torch.Tensor:
    """The last tokens of every row."""
    mask = inputs["attention_mask"]
    left = mask.sum(1, keepdim=True) - mask.cumsum(1)
    return mask.bool() & (left < count)


@pytest.mark.parametrize(("name", "attention", "side"), CASES)
def test_one_pass_equals_masked_passes(name: str, attention: str, side: str, monkeypatch) -> None:
    model, inputs, _ = FAMILIES[name](attention)
    inputs = padded(inputs, side)
    answer = answers_of(inputs)
    predict = answer.roll(-1, dims=1)
    predict[:, -1] = False
    num_layers = describe(model).num_layers
    expected = reference(model, inputs, predict, range(num_layers + 1))

    def check(found) -> None:
        for place, k in enumerate(found.exits):
            for row in range(len(predict)):
                mine = found.logits_KBAV[place, row][found.valid_BA[row]]
                torch.testing.assert_close(mine, expected[k][row], atol=1e-4, rtol=0)

    found = exit_logits(model, inputs, predict_BN=predict, answer_BN=answer)
    assert found.exits == tuple(range(num_layers + 1))
    assert (found.logits_KBAV[1] - found.logits_KBAV[-1]).abs().max() > 0.1
    check(found)
    # Thinned, one exit per call, and the output head run over a few positions at a time.
    monkeypatch.setattr(streams, "plan_pass", lambda *_, **__: PassPlan(1, 2, 0))
    thinned = exit_logits(
        model, inputs, predict_BN=predict, answer_BN=answer, exits=thinned_exits(num_layers, 3)
    )
    assert thinned.exits == (0, 3, 4)
    check(thinned)
    torch.testing.assert_close(thinned.features_BLF, found.features_BLF, atol=1e-5, rtol=1e-5)
