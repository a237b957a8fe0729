"""Traces that hold more parts than gates read: one teacher pass serves every choice of features."""

from __future__ import annotations

import pytest
import torch

from dyvte.calibration import calibrate_compute
from dyvte.commands.parser import Parser
from dyvte.commands.training_options import add_training, config_of
from dyvte.errors import ConfigError, GateMismatchError
from dyvte.gates import FEATURES, GateConfig, GateStack, exit_layers
from dyvte.teacher import Manifest, Shard, Trace, TraceStore
from dyvte.training.train import make_gates

ROWS, LAYERS, HIDDEN = 12, 4, 3


@pytest.fixture
def store(tmp_path) -> TraceStore:
    """All four parts; part p of the features is filled with p."""
    manifest = Manifest(
        fingerprint={"features": "+".join(FEATURES)},
        num_samples=ROWS,
        shard_size=ROWS,
        num_layers=LAYERS,
        feature_size=4 * HIDDEN,
    )
    found = TraceStore.create(tmp_path / "trace", manifest)
    names = ("risk", "reverse_risk", "agreement", "same_answer", "loss")
    columns = {name: torch.rand(ROWS, LAYERS + 1) for name in names}
    parts = torch.randn(ROWS, LAYERS, 4, HIDDEN, generator=torch.Generator().manual_seed(1))
    parts[..., 0] = torch.arange(4.0)
    trace = Trace(
        **columns,
        features=parts.flatten(2),
        sample_ids=tuple(map(str, range(ROWS))),
        num_visual=torch.full((ROWS,), 9),
    )
    found.write(0, Shard(trace=trace, image_ids=tuple(map(str, range(ROWS)))))
    return found


def test_a_store_gives_the_parts_that_are_asked_for(store) -> None:
    assert store.manifest.features == FEATURES
    assert store.trace().features.shape == (ROWS, LAYERS, 4 * HIDDEN)
    picked = store.trace(("last_visual", "mean_prompt")).features
    assert picked.shape == (ROWS, LAYERS, 2 * HIDDEN)
    assert picked[..., 0].unique().tolist() == [3.0]
    assert picked[..., HIDDEN].unique().tolist() == [0.0]


def test_gates_are_calibrated_on_their_own_parts(store) -> None:
    names = ("last_prompt", "mean_visual")
    gates = GateStack.init(GateConfig(num_layers=LAYERS, hidden_size=HIDDEN, features=names))
    found = calibrate_compute(gates, store, 0.6)
    logits = gates(store.trace().features.unflatten(2, (4, HIDDEN))[:, :, [1, 2]].flatten(2))
    exits = exit_layers(logits, found.threshold)
    assert found.record["mean_exit_layer"] == pytest.approx(float(exits.double().mean()))


def test_gates_of_another_size_are_refused(store) -> None:
    # The same number of features as the store holds, and yet another hidden size.
    gates = GateStack.init(GateConfig(num_layers=LAYERS, hidden_size=2 * HIDDEN))
    with pytest.raises(GateMismatchError, match=f"size {HIDDEN}, the gates have {LAYERS} of {2 * HIDDEN}"):
        calibrate_compute(gates, store, 0.6)


def test_features_on_the_command_line() -> None:
    parser = Parser()
    add_training(parser)
    common = ["--model_name_or_path", "backbone", "--data_path", "data.json"]
    args = parser.parse_args([*common, "--features", "mean_visual,last_prompt"])
    assert config_of(args, ["output_dir=."]).teacher.features == ("mean_visual", "last_prompt")
    # New gates read what is traced, or the part of it that they are told to.
    cfg = config_of(args, ["output_dir=."])
    assert make_gates(cfg, LAYERS, HIDDEN, {}).config.features == ("mean_visual", "last_prompt")
    cfg = config_of(args, ["output_dir=.", 'gates.features=["last_prompt"]'])
    assert make_gates(cfg, LAYERS, HIDDEN, {}).config.feature_size == HIDDEN
    for given, message in (
        ("last_prompt,colour", "unknown value 'colour'"),
        ("last_prompt,last_prompt", "once"),
    ):
        with pytest.raises(ConfigError, match=message):
            config_of(parser.parse_args([*common, "--features", given]), ["output_dir=."])
