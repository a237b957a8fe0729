"""Gates: the decision rule, probabilities, features, storage; against scalar loops and closed forms."""

import json
import math

import pytest
import torch

from dyvte.errors import CheckpointError, ConfigError
from dyvte.gates import (
    ARCHITECTURES,
    FEATURES,
    GateConfig,
    GateStack,
    exit_layers,
    exit_probabilities,
    load_checkpoint,
    prompt_features,
    save_config,
    select_features,
    uniform_offsets,
)


def rule_by_hand(logits, threshold, min_layer, fallback):
    """DESIGN's rule, one row, in plain Python."""
    num_layers = len(logits)
    cut = (
        math.inf if threshold == 1 else -math.inf if threshold == 0 else math.log(threshold / (1 - threshold))
    )
    for k in range(min_layer, num_layers):
        if not math.isfinite(logits[k - 1]):
            return max(k, num_layers if fallback is None else fallback)
        if logits[k - 1] > cut:
            return k
    return num_layers


@pytest.mark.parametrize("threshold", [0.0, 0.3, 0.5, 0.9, 1.0])
@pytest.mark.parametrize("min_layer", [1, 3, 9])
@pytest.mark.parametrize("fallback", [None, 0, 2, 6])
def test_exit_layers_follow_the_rule(threshold, min_layer, fallback):
    logits = torch.randn(200, 6, generator=torch.Generator().manual_seed(0))
    logits[::7, 2] = torch.nan
    logits[::11, 0] = torch.inf
    logits[::13, 4] = -torch.inf
    logits[5] = 0.0
    got = exit_layers(logits, threshold, min_layer, fallback)
    assert got.dtype == torch.int64
    assert got.tolist() == [rule_by_hand(row, threshold, min_layer, fallback) for row in logits.tolist()]


def test_a_logit_equal_to_the_threshold_does_not_fire():
    assert exit_layers(torch.zeros(1, 4), 0.5).tolist() == [4]
    assert exit_layers(torch.full((1, 4), 1e-6), 0.5).tolist() == [1]


def test_gate_L_changes_nothing():
    logits = torch.full((1, 4), -1.0)
    logits[0, 3] = torch.nan
    assert exit_layers(logits, 0.5, fallback=0).tolist() == [4]


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ((1.5,), "threshold 1.5"),
        ((0.5, 0), "min_layer 0"),
        ((0.5, 1, 7), r"exit layer 7: expected 0\.\.4"),
        ((0.5, 1, -1), "exit layer -1"),
    ],
)
def test_settings_that_make_no_sense_are_refused(settings, text):
    with pytest.raises(ConfigError, match=text):
        exit_layers(torch.zeros(1, 4), *settings)


def test_exit_probabilities_are_the_product_formula_in_float64():
    logits = torch.randn(5, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    h = torch.sigmoid(logits)
    expected = torch.stack(
        [h[:, k] * torch.prod(1 - h[:, :k], 1) if k < 6 else torch.prod(1 - h[:, :6], 1) for k in range(7)], 1
    )
    got = exit_probabilities(logits)
    assert got.dtype == torch.float64
    torch.testing.assert_close(got.exp(), expected, rtol=1e-12, atol=0)


def test_exit_probabilities_stay_finite_where_products_underflow():
    logits = torch.full((1, 64), 40.0, requires_grad=True)
    log_p = exit_probabilities(logits)
    assert log_p[0, 62].item() == pytest.approx(-40.0 * 62, rel=1e-5)
    log_p[0, :63].sum().backward()
    assert torch.isfinite(logits.grad).all()


@pytest.mark.parametrize("num_layers", [2, 12, 32])
def test_uniform_offsets_make_every_exit_equally_likely(num_layers):
    offsets = torch.tensor([uniform_offsets(num_layers)], dtype=torch.float64)
    expected = torch.full((1, num_layers), 1 / num_layers, dtype=torch.float64)
    torch.testing.assert_close(exit_probabilities(offsets).exp(), expected)
    assert uniform_offsets(num_layers)[-1] == 0.0


def test_prompt_features_by_hand():
    hidden = torch.randn(4, 6, 3, generator=torch.Generator().manual_seed(2))
    mask = torch.tensor([[0, 0, 1, 1, 1, 1], [0, 1, 1, 0, 0, 0], [0, 0, 0, 1, 0, 0], [0] * 6]).bool()
    hidden[0, 0] = torch.inf  # a position outside the prompt must not leak
    got = prompt_features(hidden, mask)
    torch.testing.assert_close(got[0], torch.cat([hidden[0, 2:5].mean(0), hidden[0, 5]]))
    torch.testing.assert_close(got[1], torch.cat([hidden[1, 1], hidden[1, 2]]))
    torch.testing.assert_close(got[2], torch.cat([hidden[2, 3], hidden[2, 3]]))
    assert torch.equal(got[3], torch.zeros(6))
    assert prompt_features(hidden.bfloat16(), mask).dtype == torch.float32


def features_by_hand(hidden, prompt, visual, name):
    """One part of one row, in plain Python."""
    places = [n for n, on in enumerate(prompt if name.endswith("prompt") else visual) if on]
    if name == "mean_prompt" and len(places) > 1:
        places = places[:-1]
    if name.startswith("last"):
        places = places[-1:]
    return hidden[places].mean(0) if places else torch.zeros(hidden.shape[1])


@pytest.mark.parametrize(
    "names", [("mean_visual",), ("last_visual", "mean_visual"), ("mean_prompt", "last_visual"), FEATURES]
)
def test_every_feature_by_hand(names):
    hidden = torch.randn(4, 9, 3, generator=torch.Generator().manual_seed(2))
    visual = torch.tensor([[0, 1, 1, 0, 1] + [0] * 4, [1] + [0] * 8, [0] * 9, [0, 1] + [0] * 7]).bool()
    prompt = torch.tensor([[0] * 5 + [1, 1, 1, 0], [0, 1] + [0] * 7, [1] * 9, [0] * 9]).bool()
    hidden[0, 3] = hidden[0, 8] = torch.nan  # neither visual nor prompt: must not leak
    got = prompt_features(hidden, prompt, visual, names)
    for row in range(4):
        wanted = [features_by_hand(hidden[row], prompt[row], visual[row], name) for name in names]
        torch.testing.assert_close(got[row], torch.cat(wanted))


def test_features_that_cannot_be_read_are_refused():
    with pytest.raises(ConfigError, match="visual tokens"):
        prompt_features(torch.zeros(1, 2, 3), torch.ones(1, 2).bool(), names=("mean_visual",))
    for names in ((), ("mean_prompt", "mean_prompt"), ("attention",)):
        with pytest.raises(ConfigError, match="gate features"):
            GateConfig(num_layers=3, hidden_size=4, features=names)


def test_gates_take_their_parts_of_wider_traces():
    parts = torch.arange(24.0).view(2, 3, 4)  # 2 rows, 3 parts of size 4
    got = select_features(parts.flatten(1), FEATURES[:3], ("mean_visual", "mean_prompt"))
    assert torch.equal(got, parts[:, [2, 0]].flatten(1))
    with pytest.raises(ConfigError, match=r"--features that include last_visual$"):
        select_features(parts.flatten(1), FEATURES[:3], ("mean_prompt", "last_visual"))
    config = GateConfig(num_layers=3, hidden_size=4, features=FEATURES[:3])
    assert config.feature_size == 12
    assert GateStack.init(config)(parts.flatten(1)[:, None].expand(2, 3, 12)).shape == (2, 3)
    assert GateConfig.from_json(config.to_json()).features == FEATURES[:3]


def test_compact_gates_equal_their_formula():
    config = GateConfig(
        num_layers=3,
        hidden_size=8,
        architecture="compact",
        gate_hidden_size=5,
        offsets=(0.5, -1.0, 0.0),
    )
    gates = GateStack.init(config, seed=3)
    for p in gates.parameters():
        torch.nn.init.normal_(p, generator=torch.Generator().manual_seed(p.numel()))
    x = torch.randn(4, 3, 16)
    logits = gates(x)
    for k in range(3):
        parts = x[:, k].view(4, 2, 8)
        normed = (parts / (parts.pow(2).mean(-1, keepdim=True) + 1e-6).sqrt()).flatten(1)
        gate = gates.gates[k]
        inner = normed @ gate.w1.weight.T + gate.w1.bias
        inner = 0.5 * inner * (1 + torch.erf(inner / 2**0.5))
        expected = (inner @ gate.w2.weight.T + gate.w2.bias).squeeze(1) + config.offsets[k]
        torch.testing.assert_close(logits[:, k], expected, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(gates.gate(k + 1, x[:, k]), logits[:, k])


def test_reference_gates_give_the_reference_decision():
    generator = torch.Generator().manual_seed(4)
    state = {"model.embed_tokens.weight": torch.zeros(2, 2)}
    for i in range(4):
        state[f"model.visual_gates_router.{i}.w1.weight"] = torch.randn(32, 16, generator=generator)
        state[f"model.visual_gates_router.{i}.w2.weight"] = torch.randn(2, 32, generator=generator)
    gates = GateStack.from_reference(state)
    assert (gates.config.num_layers, gates.config.hidden_size, gates.config.gate_hidden_size) == (4, 8, 32)
    x = torch.randn(50, 4, 16, generator=generator)
    logits = gates(x)
    leaves = []
    for i in range(4):
        w1, w2 = (state[f"model.visual_gates_router.{i}.{w}.weight"] for w in ("w1", "w2"))
        out = torch.nn.functional.gelu(x[:, i] @ w1.T) @ w2.T
        torch.testing.assert_close(logits[:, i], out[:, 1] - out[:, 0], rtol=0, atol=1e-5)
        leaves.append(out[:, 0] < out[:, 1])
    first = [next((i + 1 for i in range(3) if leaves[i][row]), 4) for row in range(50)]
    assert exit_layers(logits, 0.5).tolist() == first


def test_incomplete_or_missing_reference_gates_are_refused():
    with pytest.raises(CheckpointError, match="no reference gates"):
        GateStack.from_reference({"lm_head.weight": torch.zeros(1)})
    with pytest.raises(CheckpointError, match=r"1\.w2"):
        GateStack.from_reference(
            {
                "model.visual_gates_router.0.w1.weight": torch.zeros(4, 8),
                "model.visual_gates_router.0.w2.weight": torch.zeros(2, 4),
                "model.visual_gates_router.1.w1.weight": torch.zeros(4, 8),
            }
        )


def test_seven_b_compact_gates_cost_at_most_five_million_parameters():
    with torch.device("meta"):
        gates = GateStack(GateConfig(num_layers=32, hidden_size=4096))
    assert sum(p.numel() for p in gates.parameters()) <= 5_400_000


def test_shared_gates_equal_their_formula():
    config = GateConfig(
        num_layers=3, hidden_size=8, architecture="shared", gate_hidden_size=5, offsets=(1, -1, 0)
    )
    gates = GateStack.init(config, seed=3)
    assert torch.equal(gates.gates[0].gain, torch.zeros(5))  # at first every layer reads the trunk as it is
    for number, p in enumerate(gates.parameters()):
        torch.nn.init.normal_(p, generator=torch.Generator().manual_seed(number))
    x = torch.randn(4, 3, 16)
    logits = gates(x)
    for k in range(3):
        parts = x[:, k].view(4, 2, 8)
        normed = (parts / (parts.pow(2).mean(-1, keepdim=True) + 1e-6).sqrt()).flatten(1)
        own = gates.gates[k]
        inner = (normed @ gates.trunk.w1.weight.T + gates.trunk.w1.bias) * (1 + own.gain) + own.shift
        expected = torch.nn.functional.gelu(inner) @ own.w2.weight[0] + own.w2.bias + config.offsets[k]
        torch.testing.assert_close(logits[:, k], expected)
        torch.testing.assert_close(gates.gate(k + 1, x[:, k]), logits[:, k])


def test_seven_b_shared_gates_cost_a_thousandth_of_the_references():
    with torch.device("meta"):
        shared = GateStack(GateConfig(num_layers=32, hidden_size=4096, architecture="shared"))
        reference = GateStack(GateConfig(num_layers=32, hidden_size=4096, architecture="reference"))
    count = sum(p.numel() for p in shared.parameters())
    assert count == 8192 * 64 + 64 + 32 * (3 * 64 + 1)
    assert count - shared.num_deciding_parameters == 3 * 64 + 1
    assert sum(p.numel() for p in reference.parameters()) == 32 * (8192 * 2048 + 2 * 2048)
    assert count < 0.001 * sum(p.numel() for p in reference.parameters())


def test_init_is_seeded_xavier():
    config = GateConfig(num_layers=2, hidden_size=64, architecture="reference", gate_hidden_size=32)
    a, b, c = GateStack.init(config, 0), GateStack.init(config, 0), GateStack.init(config, 1)
    assert all(torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters(), strict=True))
    assert not torch.equal(next(a.parameters()), next(c.parameters()))
    weight = a.gates[0].w1.weight
    bound = math.sqrt(6 / (128 + 32))
    assert weight.abs().max() <= bound
    assert weight.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.05)


def test_a_gate_that_is_not_used_gets_no_gradient():
    gates = GateStack.init(GateConfig(num_layers=3, hidden_size=4, architecture="compact"))
    gates.gate(2, torch.randn(2, 8)).sum().backward()
    assert gates.gates[0].w1.weight.grad is None
    assert gates.gates[1].w1.weight.grad is not None
    shared = GateStack.init(GateConfig(num_layers=3, hidden_size=4, architecture="shared"))
    shared.gate(2, torch.randn(2, 8)).sum().backward()
    assert shared.gates[0].w2.weight.grad is None
    assert shared.gates[1].w2.weight.grad is not None
    assert shared.trunk.w1.weight.grad.any()


@pytest.mark.parametrize("architecture", ARCHITECTURES.names())
def test_checkpoint_round_trip(tmp_path, architecture):
    config = GateConfig(
        num_layers=3,
        hidden_size=4,
        architecture=architecture,
        gate_hidden_size=6,
        offsets=uniform_offsets(3),
        threshold=0.25,
        min_layer=2,
        fallback=1,
        backbone={"id": "x", "fingerprint": "abc"},
    )
    gates = GateStack.init(config, 5)
    gates.save_pretrained(tmp_path / "gates")
    assert sorted(p.name for p in (tmp_path / "gates").iterdir()) == ["gate_config.json", "gates.safetensors"]
    again = GateStack.from_pretrained(tmp_path / "gates")
    assert again.config == config
    x = torch.randn(2, 3, 8)
    assert torch.equal(gates(x), again(x))


def test_a_folder_without_weights_describes_a_fixed_exit(tmp_path):
    save_config(GateConfig(num_layers=3, hidden_size=4, fallback=2, mode="fixed"), tmp_path)
    config, gates = load_checkpoint(tmp_path)
    assert gates is None
    assert config.fallback == 2
    with pytest.raises(CheckpointError, match="fixed exit after layer 2"):
        GateStack.from_pretrained(tmp_path)


def test_broken_checkpoints_say_what_is_wrong(tmp_path):
    with pytest.raises(CheckpointError, match="no gates checkpoint folder"):
        GateStack.from_pretrained(tmp_path / "nothing")
    with pytest.raises(CheckpointError, match=r"no gate_config\.json"):
        GateStack.from_pretrained(tmp_path)
    GateStack.init(GateConfig(num_layers=3, hidden_size=4)).save_pretrained(tmp_path)
    text = (tmp_path / "gate_config.json").read_text()
    (tmp_path / "gate_config.json").write_text(
        text.replace('"num_layers": 3', '"num_layers": 2').replace(
            json.dumps(json.loads(text)["offsets"], indent=4).replace("\n]", "\n  ]"), "[0.0, 0.0]"
        )
    )
    with pytest.raises(CheckpointError, match=r"gates\.2"):
        GateStack.from_pretrained(tmp_path)
    (tmp_path / "gate_config.json").write_text('{"num_layers": 3, "hidden_size": 4, "colour": 1}')
    with pytest.raises(CheckpointError, match="colour"):
        GateStack.from_pretrained(tmp_path)
    (tmp_path / "gate_config.json").write_text('{"num_layers": 3, "hidden_size": 4}')
    (tmp_path / "gates.safetensors").write_bytes(b"not a tensor file")
    with pytest.raises(CheckpointError, match="not a readable safetensors"):
        GateStack.from_pretrained(tmp_path)


def test_features_of_another_shape_are_refused():
    gates = GateStack.init(GateConfig(num_layers=3, hidden_size=4))
    with pytest.raises(ConfigError, match=r"L = 3 and F = 8"):
        gates(torch.zeros(2, 4, 8))
    with pytest.raises(ConfigError, match="gate 4"):
        gates.gate(4, torch.zeros(2, 8))
