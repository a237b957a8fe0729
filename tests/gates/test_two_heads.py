"""Gates with a freeze head: the rule against a scalar loop, chances against enumeration, storage by name."""

import itertools
import math
from dataclasses import replace

import pytest
import torch

from dyvte.errors import CheckpointError, ConfigError
from dyvte.gates import (
    ARCHITECTURES,
    CLOSED,
    GateConfig,
    GateStack,
    HeadLogits,
    ScheduleRule,
    close_freezes,
    exit_layers,
    exit_probabilities,
    follow_threshold,
    logit_threshold,
    schedule_probabilities,
    schedules,
    uniform_freeze_offsets,
    uniform_offsets,
)
from tests.helpers.traces import make_trace

LAYERS = 6


def random_logits(rows: int, freezes: tuple[int, ...], layers: int = LAYERS, seed: int = 0) -> HeadLogits:
    generator = torch.Generator().manual_seed(seed)
    exit_BGL = torch.randn(rows, len(freezes) + 1, layers, generator=generator, dtype=torch.float64)
    freeze_BL = torch.randn(rows, layers, generator=generator, dtype=torch.float64)
    for i, f in enumerate(freezes):  # up to layer f a stream is the plain one
        exit_BGL[:, i, :f] = exit_BGL[:, -1, :f]
    return HeadLogits(exit_BGL, freeze_BL, freezes).closed_elsewhere()


def rule_by_hand(exits, freezes, streams, cut, freeze_cut, min_layer, fallback):
    """One row in plain Python: (freeze layer, exit layer)."""
    num_layers, stream, frozen = len(freezes), len(streams), None
    for k in range(num_layers):
        asks_exit, asks_freeze = min_layer <= k, frozen is None
        exit_logit = exits[stream][k - 1] if k else CLOSED
        if (asks_exit and not math.isfinite(exit_logit)) or (asks_freeze and not math.isfinite(freezes[k])):
            leave = max(k, num_layers if fallback is None else fallback)
            return (leave if frozen is None else frozen), leave
        if asks_exit and exit_logit > cut:
            return (k if frozen is None else frozen), k
        if asks_freeze and freezes[k] > freeze_cut:
            stream, frozen = streams.index(k), k
    return (num_layers if frozen is None else frozen), num_layers


@pytest.mark.parametrize("threshold", [0.0, 0.4, 0.7, 1.0])
@pytest.mark.parametrize("freeze_threshold", [None, 0.0, 0.6, 1.0])
@pytest.mark.parametrize(("min_layer", "fallback"), [(1, None), (3, 2), (1, 0), (5, 5)])
def test_schedules_follow_the_rule(threshold, freeze_threshold, min_layer, fallback):
    streams = (0, 1, 2, 3, 4, 5)
    logits = random_logits(300, streams)
    exit_BGL, freeze_BL = logits.exit_BGL.clone(), logits.freeze_BL.clone()
    exit_BGL[::7, :, 2] = torch.nan
    exit_BGL[::11, 3, 4] = torch.inf
    freeze_BL[::13, 1] = torch.nan
    freeze_BL[::17, 0] = -torch.inf
    logits = HeadLogits(exit_BGL, freeze_BL, streams)
    got = schedules(logits, threshold, min_layer, fallback, freeze_threshold)
    cuts = [
        logit_threshold(t) for t in (threshold, threshold if freeze_threshold is None else freeze_threshold)
    ]
    expected = [
        rule_by_hand(exits, freezes, list(streams), *cuts, min_layer, fallback)
        for exits, freezes in zip(exit_BGL.tolist(), freeze_BL.tolist(), strict=True)
    ]
    assert list(zip(got.freeze_layers_B.tolist(), got.exit_layers_B.tolist(), strict=True)) == expected
    assert got.freeze_layers_B.dtype == got.exit_layers_B.dtype == torch.int64
    assert (got.freeze_layers_B <= got.exit_layers_B).all()
    if threshold == 0.4 and freeze_threshold == 0.6 and min_layer == 1:
        assert len(set(expected)) > 15  # so that the test can fail


def test_without_a_freeze_head_rows_freeze_where_they_leave():
    logits = torch.randn(100, LAYERS, generator=torch.Generator().manual_seed(0))
    got = schedules(logits, 0.7, 2, 3)
    assert torch.equal(got.exit_layers_B, exit_layers(logits, 0.7, 2, 3))
    assert torch.equal(got.freeze_layers_B, got.exit_layers_B)


def test_a_broken_freeze_gate_of_a_frozen_row_is_not_asked():
    rule = ScheduleRule(2, 4, 0.5, fallback=3, freeze_threshold=0.5)
    assert rule.wants(0)
    rule.step(0, torch.tensor([[math.nan, math.nan], [1.0, -1.0]]))  # no exit is asked before layer 1
    assert rule.freeze_layers_B.tolist() == [0, 4]
    rule.step(1, torch.tensor([[-1.0, -1.0], [math.nan, math.nan]]))
    assert rule.fallback_B.tolist() == [False, True]
    assert (rule.freeze_layers_B.tolist(), rule.exit_layers_B.tolist()) == ([0, 3], [4, 3])
    rule.step(2, torch.tensor([[math.inf, -1.0], [1.0, 1.0]]))
    assert (rule.freeze_layers_B.tolist(), rule.exit_layers_B.tolist()) == ([0, 3], [3, 3])
    assert not rule.wants(3)


def test_rows_without_visual_tokens_are_settled_and_frozen():
    rule = ScheduleRule(3, 4, 0.5, freeze_threshold=0.5)
    rule.step(1, torch.tensor([[-1.0, -1.0, -1.0], [1.0, -1.0, -1.0]]))
    rule.settle(torch.tensor([True, True, False]), 2)
    assert rule.exit_layers_B.tolist() == [2, 2, 4]
    assert rule.freeze_layers_B.tolist() == [1, 2, 4]
    assert rule.asking_B.tolist() == [False, False, True]


def test_freezing_where_no_stream_was_traced_is_refused():
    logits = random_logits(20, (0, 2))
    schedules(logits, 0.5)
    opened = HeadLogits(logits.exit_BGL, torch.ones_like(logits.freeze_BL) - 2 * torch.eye(LAYERS)[0], (0, 2))
    with pytest.raises(ConfigError, match=r"after layers \[1\].*\(0, 2\)"):
        schedules(opened, 0.9999, freeze_threshold=0.5)


def test_the_freeze_threshold_follows_at_a_constant_distance():
    assert follow_threshold(0.5, 0.5, 0.9) == 0.9
    moved = follow_threshold(0.6, 0.4, 0.7)
    assert logit_threshold(moved) - logit_threshold(0.7) == pytest.approx(
        logit_threshold(0.6) - logit_threshold(0.4)
    )
    assert follow_threshold(1.0, 0.5, 0.9) == 0.9
    assert follow_threshold(0.6, 0.4, 1.0) == 1.0


@pytest.mark.parametrize("freezes", [(0,), (0, 1, 2, 3, 4), (2, 4), (1,), (0, 5)])
def test_chances_are_those_of_every_pattern_of_coins(freezes):
    """Independent of any formula: one coin for every gate of every stream, the rule on each pattern."""
    layers = 4 if max(freezes) < 4 else 6
    layers = 5 if freezes == (0, 1, 2, 3, 4) else layers
    logits = random_logits(2, freezes, layers, seed=3)
    expected = torch.zeros(2, len(freezes) + 1, layers, dtype=torch.float64)
    exit_p, freeze_p = logits.exit_BGL.sigmoid().tolist(), logits.freeze_BL.sigmoid().tolist()

    def walk(row, k, stream, chance):
        """All ways on from layer k."""
        last = len(freezes)
        if k == layers:
            expected[row, stream, k - 1] += chance
            return
        leave = exit_p[row][stream][k - 1] if k else 0.0
        if k:
            expected[row, stream, k - 1] += chance * leave
        stay = chance * (1 - leave)
        if stream == last and k in freezes:
            freeze = freeze_p[row][k]
            walk(row, k + 1, freezes.index(k), stay * freeze)
            stay *= 1 - freeze
        walk(row, k + 1, stream, stay)

    for row in range(2):
        walk(row, 0, len(freezes), 1.0)
    got = schedule_probabilities(logits).exp()
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-15)
    torch.testing.assert_close(got.sum((1, 2)), torch.ones(2, dtype=torch.float64))


def test_chances_agree_with_the_rule_on_sampled_coins():
    logits = random_logits(1, (0, 2, 3), 5, seed=5)
    draws = 40000
    generator = torch.Generator().manual_seed(0)
    many = HeadLogits(logits.exit_BGL.repeat(draws, 1, 1), logits.freeze_BL.repeat(draws, 1), (0, 2, 3))
    # A logistic draw d per gate: logit > d has chance sigmoid(logit).
    noise = [
        torch.rand(x.shape, generator=generator, dtype=torch.float64).logit()
        for x in (many.exit_BGL, many.freeze_BL)
    ]
    found = schedules(HeadLogits(many.exit_BGL - noise[0], many.freeze_BL - noise[1], (0, 2, 3)), 0.5)
    log_p = schedule_probabilities(logits)[0]
    for i, f in enumerate((0, 2, 3, None)):
        for k in range(1, 6):
            wanted = found.exit_layers_B if f is None else torch.full_like(found.exit_layers_B, f)
            share = (
                (found.exit_layers_B == k)
                & (found.freeze_layers_B == wanted)
                & (wanted == (k if f is None else f))
            )
            if f is None or k > f:
                assert float(share.double().mean()) == pytest.approx(float(log_p[i, k - 1].exp()), abs=0.012)


def test_a_head_that_never_freezes_leaves_todays_chances():
    logits = torch.randn(7, LAYERS, generator=torch.Generator().manual_seed(2))
    closed = HeadLogits(logits[:, None].repeat(1, 2, 1), torch.full((7, LAYERS), CLOSED), (3,))
    got = schedule_probabilities(closed)
    assert torch.equal(got[:, 1], exit_probabilities(logits))
    assert (got[:, 0].exp() == 0).all()


def test_chances_stay_finite_where_products_underflow():
    exit_BGL = torch.full((1, 3, 64), 40.0, requires_grad=True)
    freeze_BL = torch.full((1, 64), 40.0, requires_grad=True)
    log_p = schedule_probabilities(HeadLogits(exit_BGL, freeze_BL, (0, 5)))
    finite = log_p.isfinite()
    assert finite.sum() == 64 + 64 + 64 - 0 - 5  # every k of the plain stream, k > f of the others
    log_p[finite].sum().backward()
    assert exit_BGL.grad.isfinite().all()
    assert freeze_BL.grad.isfinite().all()


def test_uniform_offsets_make_freeze_layers_equally_likely():
    offsets = torch.tensor([uniform_freeze_offsets(4)], dtype=torch.float64)
    never = torch.full((1, 5, 4), CLOSED, dtype=torch.float64)
    got = schedule_probabilities(HeadLogits(never, offsets, (0, 1, 2, 3))).exp()
    torch.testing.assert_close(got.sum(2), torch.full((1, 5), 0.2, dtype=torch.float64))
    thinned = torch.tensor(uniform_freeze_offsets(4, (0, 2)))
    torch.testing.assert_close(thinned[[0, 2]].sigmoid(), torch.tensor([1 / 3, 1 / 2]))
    assert (thinned[[1, 3]] == CLOSED).all()
    assert close_freezes((0.5, 0.0, 0.0), (0,)) == (0.5, CLOSED, CLOSED)


def two_headed(architecture: str, **fields) -> GateStack:
    config = GateConfig(
        num_layers=4, hidden_size=3, architecture=architecture, gate_hidden_size=5, freeze_head=True,
        offsets=uniform_offsets(4), freeze_offsets=uniform_freeze_offsets(4), **fields,
    )  # fmt: skip
    stack = GateStack.init(config, seed=1)
    for number, parameter in enumerate(stack.parameters()):
        torch.nn.init.normal_(parameter, generator=torch.Generator().manual_seed(number))
    return stack


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_all_logits_are_those_of_single_gates(architecture):
    trace = make_trace(5, 4, features=6, freezes=(0, 2))
    stack = two_headed(architecture)
    grid = trace.grid
    logits = stack.logits(trace.features, grid.embeddings, grid.features, grid.freeze_layers)
    streams = trace.streams()
    for k in range(4):
        features = trace.features[:, k - 1] if k else grid.embeddings
        exit_B, freeze_B = stack.heads(k, features)
        torch.testing.assert_close(freeze_B, logits.freeze_BL[:, k])
        if k:
            torch.testing.assert_close(exit_B, stack.gate(k, features))
        else:
            assert (exit_B == CLOSED).all()
    for i in range(3):
        for k in range(1, 5):
            torch.testing.assert_close(logits.exit_BGL[:, i, k - 1], stack.gate(k, streams[:, i, k - 1]))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_second_head_leaves_the_first_as_it_was(architecture):
    plain = GateConfig(num_layers=4, hidden_size=3, architecture=architecture, gate_hidden_size=5)
    one = GateStack.init(plain, seed=7)
    two = GateStack.init(GateConfig(**{**plain.__dict__, "freeze_head": True}), seed=7)
    assert all(torch.equal(tensor, two.state_dict()[name]) for name, tensor in one.state_dict().items())
    features = make_trace(5, 4, features=6).features
    for k in range(1, 5):
        assert torch.equal(two.gate(k, features[:, k - 1]), one.gate(k, features[:, k - 1]))


def test_streams_must_be_traced_for_a_freeze_head():
    trace = make_trace(2, 4, features=6)
    with pytest.raises(ConfigError, match="trace with a grid"):
        two_headed("shared")(trace.features)
    one = GateStack.init(GateConfig(num_layers=4, hidden_size=3))
    with pytest.raises(ConfigError, match="freeze head"):
        one.heads(1, trace.features[:, 0])
    with pytest.raises(ConfigError, match="both heads at 4"):
        two_headed("shared").heads(4, trace.features[:, 3])


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_checkpoints_of_two_heads_round_trip(tmp_path, architecture):
    stack = two_headed(architecture, threshold=0.3, freeze_threshold=0.7)
    stack.save_pretrained(tmp_path)
    again = GateStack.from_pretrained(tmp_path)
    assert again.config == stack.config
    assert again.config.open_freezes == (0, 1, 2, 3)
    features = torch.randn(3, 6)
    assert torch.equal(again.heads(2, features), stack.heads(2, features))


@pytest.mark.parametrize("heads", [1, 2])
def test_weights_of_another_number_of_heads_are_refused_by_name(tmp_path, heads):
    GateStack.init(GateConfig(num_layers=4, hidden_size=3, freeze_head=heads == 2)).save_pretrained(tmp_path)
    text = GateConfig(num_layers=4, hidden_size=3, freeze_head=heads == 1).to_json()
    (tmp_path / "gate_config.json").write_text(text)
    with pytest.raises(
        CheckpointError, match=f"freeze_head: {heads == 1}.*{'with' if heads == 2 else 'without'} a"
    ):
        GateStack.from_pretrained(tmp_path)


def test_a_config_without_freeze_head_is_the_text_it_was():
    text = GateConfig(num_layers=2, hidden_size=3, dyvte_version="x").to_json()
    assert "freeze" not in text
    assert not GateConfig.from_json(text).freeze_head
    assert GateConfig.from_json(text).open_freezes == ()
    assert GateConfig.from_json(text).to_json() == text


def test_settings_of_a_head_that_is_not_there_are_refused():
    for fields in ({"freeze_offsets": (0.0, 0.0)}, {"freeze_threshold": 0.4}):
        with pytest.raises(ConfigError, match="freeze_head: true"):
            GateConfig(num_layers=2, hidden_size=3, **fields)
    with pytest.raises(ConfigError, match="3 freeze_offsets for 2 layers"):
        GateConfig(num_layers=2, hidden_size=3, freeze_head=True, freeze_offsets=(0.0,) * 3)
    with pytest.raises(ConfigError, match=r"freeze_threshold 1\.5"):
        GateConfig(num_layers=2, hidden_size=3, freeze_head=True, freeze_threshold=1.5)
    with pytest.raises(CheckpointError, match="reference gates have one head"):
        GateStack.from_reference({}, freeze_head=True)


def test_a_row_can_be_in_any_state_at_once():
    """Every combination that the rule can leave two rows in keeps f <= k."""
    for codes in itertools.product((-1.0, 1.0), repeat=6):
        rule = ScheduleRule(1, 3, 0.5, freeze_threshold=0.5)
        for k in range(3):
            rule.step(k, torch.tensor([[codes[2 * k]], [codes[2 * k + 1]]]))
        assert rule.freeze_layers_B <= rule.exit_layers_B


@pytest.mark.parametrize("freeze_head", [False, True])
def test_scaled_gates_standardise_every_layer_by_all_its_training_features(freeze_head):
    trace = make_trace(40, 4, features=6, freezes=(0, 2))
    trace = replace(trace, features=trace.features * 3 + torch.arange(6.0))
    config = GateConfig(
        num_layers=4, hidden_size=3, architecture="scaled", gate_hidden_size=5, freeze_head=freeze_head
    )
    stack = GateStack.init(config, seed=3)
    inputs = trace.gate_inputs()
    shared = GateStack.init(GateConfig(**{**config.__dict__, "architecture": "shared"}), seed=3)
    untouched = stack.logits(**inputs), shared.logits(**inputs)
    if freeze_head:
        untouched = untouched[0].exit_BGL, untouched[1].exit_BGL
    assert torch.equal(*untouched)  # at first it changes nothing
    stack.fit_inputs(**inputs)
    streams = trace.streams()
    for layer in range(5):
        of_layer = trace.grid.embeddings[:, None] if layer == 0 else trace.features[:, None, layer - 1]
        if freeze_head and layer:  # streams that are frozen before this layer have features of their own
            own = [i for i, f in enumerate(trace.freezes) if f < layer]
            of_layer = torch.cat((of_layer, streams[:, own, layer - 1]), 1)
        parts = of_layer.flatten(0, 1).view(-1, 2, 3)
        normal = (parts / (parts.pow(2).mean(-1, keepdim=True) + 1e-6).sqrt()).flatten(1)
        if layer or freeze_head:
            torch.testing.assert_close(stack.trunk.mean[layer], normal.mean(0), rtol=1e-5, atol=1e-6)
            deviation = (normal.var(0, unbiased=False) + 0.01).sqrt()
            torch.testing.assert_close(stack.trunk.scale[layer], 1 / deviation, rtol=1e-5, atol=1e-6)
        else:
            assert (stack.trunk.mean[0] == 0).all()
    x = trace.features[:, 1]
    parts = x.view(-1, 2, 3)
    normal = (parts / (parts.pow(2).mean(-1, keepdim=True) + 1e-6).sqrt()).flatten(1)
    inner = (normal - stack.trunk.mean[2]) * stack.trunk.scale[2] @ stack.trunk.w1.weight.T
    gate = stack.gates[1]
    expected = torch.nn.functional.gelu(inner * (1 + gate.gain) + gate.shift) @ gate.w2.weight[0]
    torch.testing.assert_close(stack.gate(2, x), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_merged_stack_says_the_mean_of_its_members(tmp_path, architecture):
    trace = make_trace(30, 4, features=6, freezes=(0, 2))
    members = []
    for seed in range(3):
        stack = two_headed(architecture)
        for number, parameter in enumerate(stack.parameters()):
            torch.nn.init.normal_(parameter, generator=torch.Generator().manual_seed(100 * seed + number))
        stack.fit_inputs(**trace.gate_inputs())
        members.append(stack)
    whole = GateStack.merged(members)
    assert whole.config.gate_hidden_size == 15
    whole.save_pretrained(tmp_path)
    got = GateStack.from_pretrained(tmp_path).logits(**trace.gate_inputs())
    each = [one.logits(**trace.gate_inputs()) for one in members]
    for name in ("exit_BGL", "freeze_BL"):
        mean = torch.stack([getattr(one, name) for one in each]).mean(0)
        torch.testing.assert_close(getattr(got, name), mean, rtol=1e-4, atol=1e-4)
    other = GateStack.init(replace(members[0].config, min_layer=2))
    with pytest.raises(ConfigError, match="one backbone"):
        GateStack.merged([members[0], other])
    if architecture == "scaled":
        members[1].fit_inputs(**make_trace(30, 4, seed=1, features=6, freezes=(0, 2)).gate_inputs())
        with pytest.raises(ConfigError, match=r"other samples: their trunk\.mean"):
            GateStack.merged(members)


def test_closed_gates_say_so_without_being_asked():
    config = GateConfig(num_layers=4, hidden_size=6, architecture="scaled", freeze_head=True)
    whole = GateStack.init(config, seed=3)
    features, embeddings = torch.randn(5, 4, 12), torch.randn(5, 12)
    frozen, freezes = torch.randn(5, 6, 12), (0, 2)
    whole.fit_inputs(features, embeddings, frozen, freezes)
    some = GateStack.init(
        replace(config, offsets=(CLOSED, 0.0, CLOSED, 0.0), freeze_offsets=(0.0, CLOSED, 0.0, CLOSED)), seed=3
    )
    some.fit_inputs(features, embeddings, frozen, freezes)
    exits, freeze = whole(features, embeddings, frozen, freezes)
    open_exits, open_freeze = some(features, embeddings, frozen, freezes)
    torch.testing.assert_close(open_exits[..., [1, 3]], exits[..., [1, 3]])
    torch.testing.assert_close(open_freeze[:, [0, 2]], freeze[:, [0, 2]])
    assert (open_exits[..., [0, 2]] == CLOSED).all()
    assert (open_freeze[:, [1, 3]] == CLOSED).all()
