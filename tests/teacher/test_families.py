"""The one-pass teacher on every family that the runtime serves: M-RoPE, deepstack, sliding windows,
bidirectional images, prefix-LM; rows with one, no and two images, padded on either side.

The reference takes each layer's own mask and hides the visual keys past the exit in it, and hands the visual
states on as they are past the freeze; one pass per schedule.
"""

from __future__ import annotations

import pytest
import torch

from dyvte.backbones import describe
from dyvte.errors import ConfigError, UnsupportedBackboneError
from dyvte.gates import FEATURES
from dyvte.teacher import streams, trace_exits
from dyvte.teacher.exits import exit_logits
from dyvte.teacher.memory import PassPlan
from dyvte.teacher.schedules import thinned_exits
from tests.helpers.families import FAMILIES
from tests.helpers.passes import answers_of, before, check_grid, close, padded, separate_pass

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


@pytest.mark.parametrize(("name", "attention", "side"), CASES)
def test_one_pass_equals_masked_passes(name: str, attention: str, side: str, monkeypatch) -> None:
    model, inputs, _ = FAMILIES[name](attention)
    inputs = padded(inputs, side)
    answer = answers_of(inputs)
    predict = before(answer)
    num_layers = describe(model).num_layers
    expected = {k: separate_pass(model, inputs, num_layers, k)[0] for k in range(num_layers + 1)}

    def check(found) -> None:
        for place, k in enumerate(found.exits):
            for row in range(len(predict)):
                mine = found.logits_KBAV[place, row][found.valid_BA[row]]
                torch.testing.assert_close(mine, expected[k][row][predict[row]], atol=1e-4, rtol=0)

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


@pytest.mark.parametrize(("name", "attention", "side"), CASES)
def test_the_grid_equals_passes_with_frozen_visual_tokens(name: str, attention: str, side: str) -> None:
    model, inputs, visual_ids = FAMILIES[name](attention)
    inputs = padded(inputs, side)
    answer = answers_of(inputs)
    num_layers = describe(model).num_layers
    trace = trace_exits(model, inputs, answer, freezes=range(num_layers), features=FEATURES)
    assert trace.freezes == tuple(range(num_layers))
    changed = trace.grid.risk[[0, 2], 0, 1:] - trace.risk[[0, 2], 1:]
    assert changed.abs().max() > 1e-3, "a freeze that changes nothing tests nothing"
    check_grid(trace, model, inputs, answer, visual_ids, FEATURES)
    trace.grid.check(trace.exits, trace.tensors())
    # What gates read of the text alone lets the last layer stop early; thinned, as the whole grid thinned.
    thin = trace_exits(model, inputs, answer, freezes=(1, 3), exits=(0, 2, 3), exits_per_chunk=2)
    close(thin, trace.select(FEATURES, FEATURES[:2]).thinned(exits=(0, 2, 3), freezes=(1, 3)), atol=2e-5)


def test_what_cannot_be_frozen_is_refused_by_name() -> None:
    model, inputs, _ = FAMILIES["llava"]("sdpa")
    answer = answers_of(inputs)
    with pytest.raises(ConfigError, match=r"freeze layers \(4,\): expected layers in 0\.\.3"):
        trace_exits(model, inputs, answer, freezes=(4,))
    attention = describe(model).layers[1].self_attn
    projection = attention.q_proj
    del attention.q_proj
    attention.qkv_proj = projection
    try:
        with pytest.raises(UnsupportedBackboneError, match="visual tokens of llava cannot be frozen"):
            trace_exits(model, inputs, answer, freezes=(1,))
    finally:
        del attention.qkv_proj
        attention.q_proj = projection
