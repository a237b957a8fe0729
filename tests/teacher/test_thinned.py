"""Thinned traces: exits without a label are NaN, cost nothing, and nobody can leave there."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from dyvte.calibration.apply import check_store
from dyvte.errors import CheckpointError, DataError, GateMismatchError
from dyvte.gates import CLOSED, GateConfig, GateStack, close_gates, exit_layers, uniform_offsets
from dyvte.objectives import expected_risk, reference_label, reference_labels, safe_label, safe_labels
from dyvte.teacher import Manifest, Shard, Trace, TraceStore, thinned_exits, trace_exits
from dyvte.teacher.manifest import exits_text
from dyvte.teacher.trace import COLUMNS
from tests.helpers.models import tiny_llava
from tests.teacher.test_teacher import batch_of

LAYERS, EVERY = 6, 3
EXITS = (0, 3, 6)


@pytest.fixture(scope="module")
def traces() -> tuple[Trace, Trace]:
    """All exits, and every third."""
    model, processor = tiny_llava(layers=LAYERS)
    inputs, answer = batch_of(processor, [0, 1, 2], "left")
    return trace_exits(model, inputs, answer), trace_exits(model, inputs, answer, exits=(3, 0))


@pytest.mark.parametrize(
    ("num_layers", "every", "exits"),
    [(6, 3, EXITS), (7, 3, (0, 3, 6, 7)), (3, 1, (0, 1, 2, 3)), (3, 9, (0, 3))],
)
def test_every_mth_exit_and_the_full_model(num_layers: int, every: int, exits: tuple[int, ...]) -> None:
    assert thinned_exits(num_layers, every) == exits


def test_labelled_columns_are_those_of_the_whole_pass_and_the_others_nan(traces) -> None:
    whole, thinned = traces
    assert (whole.exits, whole.complete) == (tuple(range(LAYERS + 1)), True)
    assert (thinned.exits, thinned.complete) == (EXITS, False)
    unknown = [k for k in range(LAYERS + 1) if k not in EXITS]
    for name in COLUMNS:
        mine, theirs = getattr(thinned, name), getattr(whole, name)
        torch.testing.assert_close(mine[:, list(EXITS)], theirs[:, list(EXITS)], atol=1e-5, rtol=0)
        assert mine[:, unknown].isnan().all()
        assert not theirs.isnan().any()
    torch.testing.assert_close(thinned.features, whole.features)
    assert thinned.rows([1]).exits == thinned.to("cpu").exits == Trace.cat([thinned, thinned]).exits == EXITS
    with pytest.raises(ValueError, match="other exits"):
        Trace.cat([whole, thinned])
    with pytest.raises(DataError, match=r"can leave after layers \[2\]"):
        thinned.check_labelled([2, 3], "a rule")


def test_impossible_exits_are_refused() -> None:
    model, processor = tiny_llava(layers=2)
    inputs, answer = batch_of(processor, [0], "left")
    for exits in ((-1,), (3,)):
        with pytest.raises(ValueError, match=r"expected exit layers in 0\.\.2"):
            trace_exits(model, inputs, answer, exits=exits)


def test_objectives_see_labelled_exits_only(traces) -> None:
    """Each equals its own definition, written out over the labelled exits, whatever the other logits are."""
    _, trace = traces
    logits = torch.randn(3, LAYERS, generator=torch.Generator().manual_seed(0)).requires_grad_()
    leave = logits.detach().double().sigmoid()
    price = 0.1
    by_hand = torch.stack(
        [
            leave[:, 2] * (trace.risk[:, 3].double() + price * 3 / LAYERS)
            + (1 - leave[:, 2]) * (trace.risk[:, 6].double() + price)
        ]
    ).mean()
    loss = expected_risk(logits, trace, lam=price)
    torch.testing.assert_close(loss.double(), by_hand, atol=1e-6, rtol=1e-6)
    assert expected_risk(logits, trace, lam=price, span=10.0).isfinite()

    epsilon = float(trace.risk[:, 3].median()) + 1e-6
    labels = trace.risk[:, 3] < epsilon  # exit 6 is the full model, risk 0
    assert 0 < labels.float().mean() < 1
    assert torch.equal(safe_labels(trace, epsilon)[:, 2], labels)
    cross = torch.nn.functional.binary_cross_entropy(leave[:, 2], labels.double())
    torch.testing.assert_close(safe_label(logits, trace, epsilon=epsilon).double(), cross, atol=1e-6, rtol=0)

    agreed = reference_labels(trace)[:, 2]
    cross = torch.nn.functional.binary_cross_entropy(leave[:, 2], agreed.double())
    torch.testing.assert_close(reference_label(logits, trace).double(), cross, atol=1e-6, rtol=0)
    with pytest.raises(ValueError, match="layer 2 has no label"):
        reference_label(logits, trace, layer=2)

    for objective in (loss, safe_label(logits, trace), reference_label(logits, trace)):
        (gradient,) = torch.autograd.grad(objective, logits)
        assert gradient[:, 2].abs().min() > 0
        assert gradient[:, [0, 1, 3, 4, 5]].eq(0).all()


@pytest.mark.parametrize("threshold", [0.0, 1e-300, 0.5, 1.0])
def test_closed_gates_never_fire(threshold: float) -> None:
    offsets = close_gates((0.0,) * LAYERS, EXITS)
    assert GateConfig(num_layers=LAYERS, hidden_size=4, offsets=offsets).open_gates == (3,)
    logits = torch.full((2, LAYERS), 1e4) + torch.tensor(offsets)
    left = exit_layers(logits, threshold)
    assert left.tolist() == [3, 3] if threshold < 1 else [LAYERS, LAYERS]
    # not a broken gate either: the rows go on asking, no fallback is taken
    assert exit_layers(logits, 0.5, fallback=5).tolist() == [3, 3]


def test_uniform_offsets_share_the_chance_among_labelled_exits() -> None:
    offsets = torch.tensor(uniform_offsets(7, (0, 2, 5, 7)), dtype=torch.float64)
    stay, chances = 1.0, []
    for offset in offsets[:-1].sigmoid():
        chances.append(float(stay * offset))
        stay = float(stay * (1 - offset))
    assert chances == pytest.approx([0, 1 / 3, 0, 0, 1 / 3, 0])
    assert offsets[0] == CLOSED
    assert uniform_offsets(7, range(8)) == uniform_offsets(7)


def test_stores_keep_the_exits_and_refuse_those_of_another_thinning(traces, tmp_path) -> None:
    whole, thinned = traces

    def manifest(exits) -> Manifest:
        return Manifest(
            fingerprint={"backbone": "b", "exits": exits_text(exits, LAYERS)},
            num_samples=3,
            shard_size=3,
            num_layers=LAYERS,
            feature_size=whole.features.shape[2],
        )

    store = TraceStore.create(tmp_path / "thin", manifest(EXITS))
    store.write(0, Shard(trace=thinned, image_ids=("a", "b", "c")))
    read = TraceStore.open(tmp_path / "thin")
    assert read.trace().exits == read.manifest.exits == EXITS
    with pytest.raises(CheckpointError, match="exits: stored '0,3,6', this run 'all'"):
        TraceStore.create(tmp_path / "thin", manifest(whole.exits))
    # A store from before there was thinning says nothing and labels all.
    old = replace(manifest(whole.exits), fingerprint={"backbone": "b"})
    assert TraceStore.create(tmp_path / "old", old).manifest.exits == whole.exits
    TraceStore.create(tmp_path / "old", manifest(whole.exits))

    hidden = whole.features.shape[2] // 2
    gates = GateConfig(num_layers=LAYERS, hidden_size=hidden)
    with pytest.raises(GateMismatchError, match=r"fire after layers \[1, 2, 4, 5\].*do not label"):
        check_store(gates, read)
    check_store(replace(gates, offsets=close_gates(gates.offsets, EXITS)), read)


def test_gates_of_thinned_traces_leave_at_labelled_layers_at_inference() -> None:
    from dyvte.runtime import VisualExit

    model, processor = tiny_llava(layers=LAYERS)
    inputs, _ = batch_of(processor, [0, 1, 2], "left")
    config = GateConfig(num_layers=LAYERS, hidden_size=32, offsets=uniform_offsets(LAYERS, EXITS))
    with VisualExit(GateStack.init(config), threshold=0.0)(model) as run:
        model.generate(**inputs, max_new_tokens=1)
    assert run.exit_layers.tolist() == [3, 3, 3]
