"""What a step sees is a function of seed and step alone; learning rates are those of transformers."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch

from dyvte.training.schedule import SampleOrder, drawn_layer, held_out, lr_factor, total_steps
from dyvte.training.trackers import JsonlTracker


def test_each_epoch_sees_every_sample_once_in_its_own_order() -> None:
    order = SampleOrder(7, seed=1)
    epochs = [order.at(7 * epoch, 7).tolist() for epoch in range(3)]
    assert all(sorted(epoch) == list(range(7)) for epoch in epochs)
    assert epochs[0] != epochs[1]
    assert SampleOrder(7, seed=2).at(0, 7).tolist() != epochs[0]


def test_the_stream_does_not_depend_on_how_it_is_read() -> None:
    whole = SampleOrder(7, seed=1).at(0, 40).tolist()
    order = SampleOrder(7, seed=1)
    for start, count in [(30, 10), (3, 12), (0, 1), (6, 30)]:
        assert order.at(start, count).tolist() == whole[start : start + count]


def test_drawn_layers_are_uniform_over_all_but_the_last() -> None:
    drawn = torch.tensor([drawn_layer(3, step, 6) for step in range(600)])
    assert set(drawn.tolist()) == {1, 2, 3, 4, 5}
    assert torch.bincount(drawn)[1:].min() > 80
    assert drawn_layer(3, 17, 6) == drawn_layer(3, 17, 6)


def test_held_out_samples_are_whole_images() -> None:
    images = tuple(f"{index // 8}.png" for index in range(400))
    out = held_out(images, 0.1, seed=0)
    assert int(out.sum()) == 40
    for image in range(50):
        assert len(set(out[image * 8 : image * 8 + 8].tolist())) == 1
    assert not torch.equal(out, held_out(images, 0.1, seed=1))
    assert not held_out(images, 0.0, seed=0).any()
    assert not held_out(("a", "a"), 0.9, seed=0).any()  # never everything


@pytest.mark.parametrize("schedule", ["cosine", "linear", "constant"])
def test_learning_rates_are_those_of_transformers(schedule: str) -> None:
    from transformers import get_scheduler

    name = "constant_with_warmup" if schedule == "constant" else schedule
    parameter = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([parameter], lr=1.0)
    reference = get_scheduler(name, optimizer, num_warmup_steps=math.ceil(50 * 0.03), num_training_steps=50)
    factor = lr_factor(schedule, 50, 0.03)
    for step in range(50):
        assert factor(step) == pytest.approx(reference.get_last_lr()[0])
        optimizer.step()
        reference.step()


def test_steps_cover_the_epochs() -> None:
    assert total_steps(100, 2, 32) == 7
    assert total_steps(3, 0.1, 32) == 1


def test_log_lines_after_the_resumed_step_are_cut_and_a_torn_line_too(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    path.write_text('{"step": 1, "loss": 3}\n{"step": 2, "loss": 2}\n{"step": 3, "loss": 1}\n{"step": 4, "lo')
    tracker = JsonlTracker(path, resume_step=2)
    tracker.write(3, {"loss": 0.5})
    tracker.close()
    assert [json.loads(line) for line in path.read_text().split("\n")[:-1]] == [
        {"step": 1, "loss": 3}, {"step": 2, "loss": 2}, {"step": 3, "loss": 0.5}
    ]  # fmt: skip
