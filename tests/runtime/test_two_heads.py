"""Gates with a freeze head at run time: decisions follow from brute force's states, each row's own stream."""

from __future__ import annotations

import math

import pytest
import torch

from dyvte import VisualExit
from dyvte.errors import ConfigError
from dyvte.gates import GateConfig, GateStack, HeadLogits, prompt_features, schedules
from dyvte.spans import find_spans
from tests.helpers.batches import QUESTIONS, VISUAL_ID, batch, llava
from tests.helpers.reference import frozen_by_hooks, greedy_cached, greedy_reference

LAYERS, HIDDEN = 4, 32
IMAGES = [row for row, (_, images) in enumerate(QUESTIONS) if images]


def features_by_hand(model, inputs) -> torch.Tensor:
    """(B, G, 1 + L, 2D): what the gates read before any layer and after each, frozen after g layers.

    From separate forwards of the whole model in which visual states are overwritten.
    """
    ids_BN, valid_BN = inputs["input_ids"], inputs["attention_mask"].bool()
    spans = find_spans(ids_BN, [VISUAL_ID], inputs["attention_mask"])
    positions_BN = (valid_BN.long().cumsum(1) - 1).clamp(min=0)
    streams = []
    for f in range(LAYERS + 1):
        with frozen_by_hooks(model, [f] * len(ids_BN), [VISUAL_ID]):
            states = states_of(model, {**inputs, "position_ids": positions_BN})
        streams.append(torch.stack([prompt_features(h, spans.prompt_BN) for h in states], 1))
    return torch.stack(streams, 1)


def states_of(model, inputs) -> list[torch.Tensor]:
    """What goes into the first layer, and what comes out of each."""
    layers, seen = model.get_decoder().layers, []

    def before(_, args, kwargs):
        seen.append(args[0] if args else kwargs["hidden_states"])

    def after(_, args, out):
        seen.append(out[0] if isinstance(out, tuple) else out)

    hooks = [layers[0].register_forward_pre_hook(before, with_kwargs=True)]
    hooks += [layer.register_forward_hook(after) for layer in layers]
    model(**inputs, use_cache=False)
    for hook in hooks:
        hook.remove()
    return seen


def make_gates(features_BGSF: torch.Tensor, architecture: str, **fields) -> GateStack:
    """Random gates whose logits lie around 0 on these features, so that rows differ."""
    config = GateConfig(
        num_layers=LAYERS, hidden_size=HIDDEN, architecture=architecture, gate_hidden_size=16,
        freeze_head=True, **fields,
    )  # fmt: skip
    stack = GateStack.init(config)
    for number, parameter in enumerate(stack.parameters()):
        torch.nn.init.normal_(parameter, generator=torch.Generator().manual_seed(number))
    stack.requires_grad_(False)
    plain_BSF = features_BGSF[IMAGES, -1]
    shift = {"exit": [0.0] * LAYERS, "freeze": [0.0] * LAYERS}
    for k in range(LAYERS):
        both = stack.heads(k, plain_BSF[:, k])
        shift["freeze"][k] = 1.5 - float(both[1].median())
        if k:
            shift["exit"][k - 1] = 1.0 - float(both[0].median())
    object.__setattr__(stack.config, "offsets", tuple(shift["exit"]))
    object.__setattr__(stack.config, "freeze_offsets", tuple(shift["freeze"]))
    return stack


def logits_by_hand(gates: GateStack, features_BGSF: torch.Tensor) -> HeadLogits:
    """All logits of all streams."""
    exits = [gates.gate(k, features_BGSF[:, :, k].flatten(0, 1)) for k in range(1, LAYERS + 1)]
    exit_BGL = torch.stack(exits, -1).unflatten(0, features_BGSF.shape[:2])
    freezes = [gates.heads(k, features_BGSF[:, -1, k])[1] for k in range(LAYERS)]
    return HeadLogits(exit_BGL, torch.stack(freezes, 1), tuple(range(LAYERS)))


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("architecture", ["shared", "compact", "reference"])
def test_decisions_logits_and_answers_follow_from_each_rows_own_stream(architecture, side):
    model, processor = llava()
    inputs = batch(processor, padding_side=side)
    features_BGSF = features_by_hand(model, inputs)
    gates = make_gates(features_BGSF, architecture)
    logits = logits_by_hand(gates, features_BGSF)
    threshold, freeze_threshold = 0.75, 0.8
    chosen = schedules(logits, threshold, freeze_threshold=freeze_threshold)
    exits, freezes = chosen.exit_layers_B.tolist(), chosen.freeze_layers_B.tolist()
    assert len({(freezes[row], exits[row]) for row in IMAGES}) > 2  # or this would test little
    shown = [-1 if row not in IMAGES else k for row, k in enumerate(exits)]
    expected_logits, expected_tokens = greedy_reference(
        model, inputs, shown, [VISUAL_ID], 4, freezes_B=freezes
    )
    exit_run = VisualExit(gates, threshold=threshold, freeze_threshold=freeze_threshold)
    with exit_run(model) as run:
        got, tokens, _ = greedy_cached(model, inputs, [VISUAL_ID], 4)
    assert [run.exit_layers[row].item() for row in IMAGES] == [exits[row] for row in IMAGES]
    assert [run.freeze_layers[row].item() for row in IMAGES] == [freezes[row] for row in IMAGES]
    torch.testing.assert_close(got, expected_logits, rtol=0, atol=1e-4)
    assert torch.equal(tokens, expected_tokens)
    record = run.records[0]
    for row in IMAGES:
        f, k = freezes[row], exits[row]
        for j in range(min(f, k, LAYERS - 1) + 1):  # asked until it froze or left
            if j < k or j == 0:
                assert record.freeze_logits_BL[row, j] == pytest.approx(
                    float(logits.freeze_BL[row, j]), abs=1e-3
                )
        for j in range(1, min(k, LAYERS - 1) + 1):
            stream = f if f < j else LAYERS
            expected = float(logits.exit_BGL[row, min(stream, LAYERS), j - 1])
            assert record.gate_logits_BL[row, j - 1] == pytest.approx(expected, abs=1e-3)


def test_a_broken_freeze_head_freezes_nowhere_and_leaves_at_the_fallback():
    model, processor = llava()
    inputs = batch(processor, QUESTIONS[:3])
    features_BGSF = features_by_hand(model, batch(processor))
    gates = make_gates(features_BGSF, "shared")
    object.__setattr__(gates.config, "freeze_offsets", (-9e9, math.nan, 0.0, 0.0))
    object.__setattr__(gates.config, "offsets", (-9e9,) * LAYERS)
    with pytest.warns(UserWarning, match="not finite"), VisualExit(gates, fallback=3)(model) as run:
        model(**inputs)
    assert run.exit_layers.tolist() == run.freeze_layers.tolist() == [3, 3, 3]
    assert run.records[0].gate_fallbacks == 3


def test_a_freeze_threshold_is_of_gates_with_a_freeze_head():
    one_head = GateStack.init(GateConfig(num_layers=LAYERS, hidden_size=HIDDEN))
    model, _ = llava()
    with (
        pytest.raises(ConfigError, match="these have none"),
        VisualExit(one_head, freeze_threshold=0.5)(model),
    ):
        pass
