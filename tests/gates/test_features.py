"""Every gate input, as the teacher stores it and as the runtime reads it, against the model's own states."""

import pytest
import torch

import dyvte
from dyvte.comparison.probe import ProbePolicy
from dyvte.gates import DEFAULT_FEATURES, FEATURES, GateConfig, GateStack
from dyvte.runtime import VisualExit
from dyvte.teacher import trace_exits
from tests.helpers.batches import VISUAL_ID, batch, llava

LAYERS, HIDDEN = 4, 32


def states_by_hand(model, inputs, names):
    """(B, L-1, F) after layers 1..L-1, token by token; rows without an image have zeros for visual parts."""
    positions = (inputs["attention_mask"].cumsum(1) - 1).clamp(min=0)
    states = model(**inputs, position_ids=positions, output_hidden_states=True).hidden_states[1:-1]
    rows = []
    for row, ids in enumerate(inputs["input_ids"].tolist()):
        real = [n for n in range(len(ids)) if inputs["attention_mask"][row, n]]
        visual = [n for n in real if ids[n] == VISUAL_ID]
        prompt = [n for n in real if not visual or n > visual[-1]]
        read = {
            "mean_prompt": prompt[:-1] or prompt,
            "last_prompt": prompt[-1:],
            "mean_visual": visual,
            "last_visual": visual[-1:],
        }
        means = [[h[row, read[name]].mean(0) for name in names] for h in states]
        rows.append(torch.stack([torch.cat(parts) for parts in means]).nan_to_num(0.0))
    return torch.stack(rows)


def gates_reading(names, seed=0):
    config = GateConfig(
        num_layers=LAYERS,
        hidden_size=HIDDEN,
        architecture="compact",
        gate_hidden_size=8,
        features=names,
    )
    gates = GateStack.init(config, seed)
    for parameter in gates.parameters():
        torch.nn.init.normal_(parameter, generator=torch.Generator().manual_seed(seed))
    return gates.requires_grad_(False)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("names", [FEATURES, ("last_visual",), ("last_prompt", "mean_visual")])
def test_teacher_and_runtime_read_the_same_states(side, names):
    model, processor = llava()
    inputs = batch(processor, padding_side=side)
    expected = states_by_hand(model, inputs, names)
    probe = ProbePolicy([gates_reading(names), gates_reading(DEFAULT_FEATURES, 1)])
    with VisualExit.from_policy(probe)(model):
        model(**inputs, use_cache=False)
    wanted = gates_reading(names)(torch.cat([expected, torch.zeros_like(expected[:, :1])], 1))
    torch.testing.assert_close(probe.noted[0][0, :, :-1], wanted[:, :-1], rtol=0, atol=1e-4)

    # An answer of one token, each row's last: it is no part of the prompt, so the teacher must exclude it.
    mask = inputs["attention_mask"]
    answer = (mask.cumsum(1) == mask.sum(1, keepdim=True)) & mask.bool()
    trace = trace_exits(model, inputs, answer, features=names)
    expected = states_by_hand(model, {**inputs, "attention_mask": mask * ~answer}, names)
    torch.testing.assert_close(trace.features[:, :-1], expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("names", [FEATURES, ("mean_visual",)])
def test_gates_that_read_the_image_decide_by_it_until_they_fire(names):
    model, processor = llava()
    inputs = batch(processor)
    expected = states_by_hand(model, inputs, names)
    gates = gates_reading(names, seed=3)
    logits = gates(torch.cat([expected, torch.zeros_like(expected[:, :1])], 1))
    has_image = (inputs["input_ids"] == VISUAL_ID).any(1)
    # Between two rows' highest logits: some rows leave, some never do.
    cut = logits[has_image, :-1].amax(1).sort().values[1:3].mean()
    threshold = float(cut.sigmoid())
    with dyvte.VisualExit(gates, threshold=threshold)(model) as run:
        model(**inputs, use_cache=False)
    for row, k in enumerate(run.exit_layers.tolist()):
        first = next((n + 1 for n in range(LAYERS - 1) if logits[row, n] > cut), LAYERS)
        assert k == (first if has_image[row] else -1)
    assert len(set(run.exit_layers[has_image].tolist())) > 1
