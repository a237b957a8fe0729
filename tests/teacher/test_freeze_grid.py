"""The freeze grid of a trace: streams, selection, thinning, checks, and storage beside traces without one."""

from __future__ import annotations

import hashlib
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

from dyvte.errors import CheckpointError, DataError
from dyvte.gates import FEATURES
from dyvte.teacher import Manifest, Shard, Trace, TraceStore
from dyvte.teacher.freeze_grid import LABELS
from dyvte.teacher.manifest import empty_trace, grid_fingerprint
from tests.helpers.traces import make_trace

LAYERS, FREEZES = 5, (0, 2, 4)


def manifest(trace: Trace, features: int = 4, **fingerprint: str) -> Manifest:
    if trace.grid is not None:
        fingerprint |= grid_fingerprint(trace.freezes, trace.grid.kv_share)
    return Manifest(
        fingerprint=fingerprint, num_samples=len(trace), shard_size=4, num_layers=LAYERS,
        feature_size=features,
    )  # fmt: skip


def same(a: Trace, b: Trace) -> bool:
    tensors = [(a.tensors(), b.tensors())]
    if a.grid is not None or b.grid is not None:
        tensors.append((a.grid.tensors(), b.grid.tensors()))
    equal = all(
        torch.equal(x.nan_to_num(-7), y[n].nan_to_num(-7)) for x_, y in tensors for n, x in x_.items()
    )
    return equal and (a.sample_ids, a.exits, a.freezes) == (b.sample_ids, b.exits, b.freezes)


def test_streams_are_the_plain_one_up_to_their_freeze_layer() -> None:
    trace = make_trace(3, LAYERS, freezes=FREEZES)
    streams = trace.streams()
    assert streams.shape == (3, 4, LAYERS, 4)
    assert torch.equal(streams[:, 3], trace.features)
    column = {pair: i for i, pair in enumerate(trace.grid.stream_layers)}
    assert len(column) == 5 + 3 + 1
    for i, f in enumerate(FREEZES):
        for layer in range(1, LAYERS + 1):
            source = trace.features[:, layer - 1] if layer <= f else trace.grid.features[:, column[f, layer]]
            assert torch.equal(streams[:, i, layer - 1], source)
    assert make_trace(3, LAYERS).streams().shape == (3, 1, LAYERS, 4)


def test_labels_hold_all_schedules() -> None:
    trace = make_trace(3, LAYERS, freezes=FREEZES)
    risk = trace.labels("risk")
    assert torch.equal(risk[:, 3], trace.risk)
    assert torch.equal(risk[:, 1].nan_to_num(-1), trace.grid.risk[:, 1].nan_to_num(-1))
    assert torch.equal(make_trace(3, LAYERS).labels("loss")[:, 0], make_trace(3, LAYERS).loss)


def test_rows_and_cat_carry_the_grid() -> None:
    trace = make_trace(6, LAYERS, freezes=FREEZES)
    picked = trace.rows([4, 0, 1])
    assert torch.equal(picked.grid.embeddings, trace.grid.embeddings[[4, 0, 1]])
    assert torch.equal(picked.streams(), trace.streams()[[4, 0, 1]])
    assert same(Trace.cat([trace.rows([0, 1]), trace.rows([2, 3, 4, 5])]), trace)
    with pytest.raises(ValueError, match="freeze layers"):
        Trace.cat([trace, make_trace(2, LAYERS)])
    with pytest.raises(ValueError, match="freeze layers"):
        Trace.cat([trace, trace.thinned(freezes=(0, 2))])


def test_thinning_leaves_what_a_thinner_pass_would_have_labelled() -> None:
    trace = make_trace(6, LAYERS, freezes=FREEZES)
    thin = trace.thinned(exits=(0, 3), freezes=(0, 4))
    assert (thin.exits, thin.freezes) == ((0, 3, 5), (0, 4))
    for name in LABELS:
        values = thin.labels(name)
        for i, f in enumerate((0, 4, None)):
            known = [k for k in (0, 3, 5) if f is None or k >= f]
            source = getattr(trace, name) if f is None else getattr(trace.grid, name)[:, FREEZES.index(f)]
            assert torch.equal(values[:, i, known], source[:, known])
            assert values[:, i, [k for k in range(6) if k not in known]].isnan().all()
    thin.grid.check(thin.exits, thin.tensors())
    assert torch.equal(thin.streams(), trace.streams()[:, [0, 2, 3]])
    assert trace.thinned(freezes=()).grid is None
    assert same(trace.thinned(), trace)
    with pytest.raises(DataError, match=r"\[1\] are not traced"):
        trace.thinned(freezes=(0, 1))
    with pytest.raises(DataError, match="not traced"):
        make_trace(2, LAYERS).thinned(freezes=(0,))
    with pytest.raises(DataError, match=r"layers \[1\]"):
        thin.thinned(exits=(1,))


def test_feature_parts_are_selected_in_every_stream() -> None:
    trace = make_trace(3, LAYERS, features=6, freezes=FREEZES)
    picked = trace.select(FEATURES[:2], FEATURES[1:2])
    assert torch.equal(picked.streams(), trace.streams()[..., 3:])
    assert torch.equal(picked.grid.embeddings, trace.grid.embeddings[:, 3:])


def test_grids_that_make_no_sense_are_refused() -> None:
    trace = make_trace(3, LAYERS, freezes=FREEZES)
    for freezes in ((), (2, 0), (0, 0), (0, 2, 5), (-1, 2)):
        with pytest.raises(DataError, match="freeze layers"):
            replace(trace.grid, freeze_layers=freezes)
    with pytest.raises(DataError, match=r"features has shape .* expected \(3, 9, 4\)"):
        replace(trace.grid, features=trace.grid.features[:, 1:])
    with pytest.raises(DataError, match=r"kv_share 1\.5"):
        replace(trace.grid, kv_share=1.5)
    with pytest.raises(ValueError, match="other freeze layers or backbones"):
        Trace.cat([trace, replace(trace, grid=replace(trace.grid, kv_share=0.2))])
    with pytest.raises(DataError, match="holds 3 samples"):
        replace(make_trace(2, LAYERS), grid=trace.grid)
    trace.grid.check(trace.exits, trace.tensors())
    for row, column in ((1, 0), (1, 4)):  # a label where k < f; none where one belongs
        risk = trace.grid.risk.clone()
        risk[:, row, column] = 0.5 if column == 0 else torch.nan
        with pytest.raises(DataError, match="risk at f = 2 must be labelled"):
            replace(trace.grid, risk=risk).check(trace.exits, trace.tensors())
    loss = trace.grid.loss.clone()
    loss[1, 1, 2] += 1
    with pytest.raises(DataError, match="loss at f = k = 2 differs"):
        replace(trace.grid, loss=loss).check(trace.exits, trace.tensors())


def test_a_store_keeps_grids(tmp_path) -> None:
    trace = make_trace(6, LAYERS, freezes=FREEZES)
    store = TraceStore.create(tmp_path, manifest(trace, features="mean_prompt+last_prompt"))
    store.write(0, Shard(trace=trace.rows(range(4)), image_ids=tuple("aabb")))
    store.write(1, Shard(trace=trace.rows([4, 5]), image_ids=tuple("cc")))
    again = TraceStore.open(tmp_path)
    assert again.complete
    assert again.manifest.freezes == FREEZES
    assert again.trace().grid.kv_share == trace.grid.kv_share
    assert same(again.trace(), trace)
    assert torch.equal(again.trace(["last_prompt"]).streams(), trace.streams()[..., 2:])
    with pytest.raises(DataError, match="for a store of"):
        again.write(1, Shard(trace=make_trace(2, LAYERS), image_ids=tuple("cc")))
    with pytest.raises(CheckpointError, match="freezes: stored '0,2,4', this run 'none'"):
        again.check(manifest(make_trace(6, LAYERS), features="mean_prompt+last_prompt").fingerprint)


def test_a_store_of_dropped_samples_holds_an_empty_grid(tmp_path) -> None:
    trace = empty_trace(LAYERS, 4, torch.float32, freezes=FREEZES, kv_share=0.2)
    store = TraceStore.create(tmp_path, manifest(make_trace(1, LAYERS, freezes=FREEZES)))
    store.write(0, Shard(trace=trace, image_ids=()))
    assert len(TraceStore.open(tmp_path).read(0).trace) == 0
    assert TraceStore.open(tmp_path).read(0).trace.freezes == FREEZES


def test_traces_without_a_grid_are_the_bytes_they_were(tmp_path) -> None:
    trace = make_trace(4, LAYERS)
    store = TraceStore.create(tmp_path, manifest(trace))
    store.write(0, Shard(trace=trace, image_ids=tuple("aabb")))
    path = tmp_path / "shard-00000.safetensors"
    assert sorted(load_file(path)) == sorted(["features", "num_visual", *LABELS])
    assert hashlib.sha256(path.read_bytes()).hexdigest() == BEFORE
    # a store of an earlier version, which says nothing of freezes, is the same store
    TraceStore.open(tmp_path).check({"freezes": "none"})


BEFORE = "c25a4854668d003a19ca395251fcded20cb3c127b252fe7a4563790a494b4d08"
"""sha256 of that shard as written before there were grids."""
