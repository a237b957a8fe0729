"""Questions about one image share it: the same files as without, killed or not, whatever it is called."""

from __future__ import annotations

import dataclasses
import json
from itertools import pairwise

import pytest
import torch

import dyvte
from dyvte.backbones import BackboneConfig
from dyvte.errors import ConfigError
from dyvte.evaluation import generation, latency
from dyvte.evaluation.generation import plan_batches, shown_by
from dyvte.evaluation.runner import EvalConfig, load_pipeline, run_policies
from dyvte.evaluation.settings import parse_policies
from dyvte.tasks.base import get_benchmark
from tests.helpers.evaluations import LAYERS, small_run
from tests.helpers.fixtures import write_mini_gqa
from tests.helpers.models import random_image, tiny_llava

GATES_READ = 1e-5


@pytest.fixture(scope="module")
def alone(pipeline):
    return pipeline


def sharing(pipeline, **how):
    return dataclasses.replace(pipeline, images=dyvte.ImageStore(**how))


@pytest.fixture(scope="module")
def policies(gates_folder):
    return parse_policies(["never", "fixed:2", "freeze:1:3", f"gates:{gates_folder}"])


def run(pipeline, data, output, policies, benchmark="gqa", questions=None, **changes):
    config = small_run(data, output, benchmark, **changes)
    task = get_benchmark(benchmark)
    questions = task.load(config.data) if questions is None else questions
    found = run_policies(pipeline, task, questions, policies, config)
    return {result.name: result for result in found}


@pytest.mark.parametrize("benchmark", ["gqa", "mme"])
def test_files_are_those_of_a_run_that_shares_nothing(alone, data, policies, tmp_path, benchmark):
    without = run(alone, data, tmp_path / "alone", policies, benchmark)
    pipeline = sharing(alone)
    found = run(pipeline, data, tmp_path / "shared", policies, benchmark)
    report = pipeline.images.report()
    # both of MME's subtasks show the same pictures
    assert report.images == report.images_computed == {"gqa": 6, "mme": 3}[benchmark]
    assert report.rows_shared == 4 * len(without["never"].answers)
    for name, result in without.items():
        mine = found[name].folder
        file = "predictions.jsonl"
        assert (mine / file).read_bytes() == (result.folder / file).read_bytes()
        for row, expected in zip(rows_of(mine), rows_of(result.folder), strict=True):
            for logit, other in zip(row.pop("gate_logits"), expected.pop("gate_logits"), strict=True):
                assert (logit is None) == (other is None)
                assert logit is None or abs(logit - other) < GATES_READ
            assert {**row, "gate_probabilities": 0} == {**expected, "gate_probabilities": 0}
        assert found[name].scores.cost == result.scores.cost


def rows_of(folder):
    return [json.loads(line) for line in (folder / "exits.jsonl").read_text().splitlines()]


def test_questions_about_an_image_are_asked_together_and_others_as_before(alone, data):
    questions = get_benchmark("gqa").load(data / "gqa")
    prompts = [question.text for question in questions]
    plan = plan_batches(alone, prompts, 5, shown_by(questions))
    order = [i for rows in plan for i in rows]
    assert sorted(order) == list(range(len(questions)))
    assert [len(rows) for rows in plan] == [5, 5, 5, 5, 4]
    images = [questions[i].image for i in order]
    assert sum(one != other for one, other in pairwise(images)) == 5
    # nothing in common: neighbours in length, longest first, as where nothing is known
    assert plan_batches(alone, prompts, 5, list(range(24))) == plan_batches(alone, prompts, 5)


@pytest.mark.parametrize("after", [1, 6, 10])
def test_a_killed_run_ends_with_the_same_files(alone, data, policies, tmp_path, monkeypatch, after):
    # the gates first: they decide which images are there when the others are asked
    order = policies[::-1]
    run(sharing(alone), data, tmp_path / "whole", order)
    original, calls = generation.answer, []

    def answer_until(*args):
        if len(calls) == after:
            raise KeyboardInterrupt
        calls.append(args)
        return original(*args)

    with monkeypatch.context() as patch:
        patch.setattr("dyvte.evaluation.asking.answer", answer_until)
        with pytest.raises(KeyboardInterrupt):
            run(sharing(alone), data, tmp_path / "killed", order)
    run(sharing(alone), data, tmp_path / "killed", order)
    for named in policies:
        for file in ("predictions.jsonl", "exits.jsonl"):
            whole, killed = (tmp_path / part / named.name / file for part in ("whole", "killed"))
            assert killed.read_bytes() == whole.read_bytes()


def test_a_layer_that_fails_half_way_does_no_harm(alone, data, policies, tmp_path):
    expected = run(alone, data, tmp_path / "alone", policies)
    pipeline, calls = sharing(alone), []

    def explode(*_):
        calls.append(1)
        if len(calls) == 40:
            raise ZeroDivisionError

    handle = alone.model.get_decoder().layers[2].mlp.register_forward_hook(explode)
    try:
        with pytest.raises(ZeroDivisionError):
            run(pipeline, data, tmp_path / "shared", policies)
    finally:
        handle.remove()
    found = run(pipeline, data, tmp_path / "shared", policies)
    for name, result in expected.items():
        assert predictions(found[name]) == predictions(result)


def predictions(result):
    return [one.prediction for one in result.answers]


def test_content_decides_and_not_the_name_of_an_image(alone, data, policies, tmp_path):
    pipeline, changed = sharing(alone), tmp_path / "changed"
    write_mini_gqa(changed / "gqa")
    before = run(pipeline, changed, tmp_path / "before", policies)
    for path in (changed / "gqa" / "images").iterdir():  # other pictures under the same paths
        random_image(50 + int(path.stem)).save(path)
    expected = run(alone, changed, tmp_path / "alone", policies)
    after = run(pipeline, changed, tmp_path / "after", policies)
    assert all(predictions(after[name]) == predictions(expected[name]) for name in expected)
    assert any(predictions(after[name]) != predictions(before[name]) for name in expected)
    # two pictures with one id
    questions = get_benchmark("gqa").load(data / "gqa")
    questions = [dataclasses.replace(question, image_id="one") for question in questions]
    expected = run(alone, data, tmp_path / "alone, one id", policies, questions=questions)
    after = run(sharing(alone), data, tmp_path / "one id", policies, questions=questions)
    assert all(predictions(after[name]) == predictions(expected[name]) for name in expected)


def test_a_store_too_small_says_so_once_for_the_whole_run(alone, data, policies, tmp_path):
    pipeline = sharing(alone, max_bytes=1000)
    with pytest.warns(UserWarning, match="the image store may hold 1000") as caught:
        found = run(pipeline, data, tmp_path / "small", policies)
    assert sum("image store" in str(one.message) for one in caught) == 1
    expected = run(alone, data, tmp_path / "alone", policies)
    assert all(predictions(found[name]) == predictions(expected[name]) for name in expected)
    assert pipeline.images.report().rows_shared == 0


def test_times_are_of_fresh_images_unless_asked_otherwise(alone, data, policies, tmp_path, monkeypatch):
    stores = []
    original = latency._take_turns

    def noting(*args):
        stores.append(args[-1])
        return original(*args)

    monkeypatch.setattr(latency, "_take_turns", noting)
    how = {"timing_batches": 1, "timing_repeats": 1, "timing_rows": 3, "timing_tokens": 2}
    pipeline, two = sharing(alone), policies[:2]
    for images in ("fresh", "shared"):
        found = run(pipeline, data, tmp_path / images, two, timing_images=images, **how)
        timing = found["never"].scores.timing
        assert (timing.images, timing.batch_size, timing.batches) == (images, 3, 1)
        text = json.loads((found["never"].folder / "scores.json").read_text())
        assert text["timing"]["images"] == images
    assert stores[0] is None
    assert isinstance(stores[1](), dyvte.ImageStore)


def test_a_single_policy_on_images_of_their_own_keeps_none(alone, data, policies, tmp_path):
    pipeline = sharing(alone)
    questions = get_benchmark("gqa").load(data / "gqa")[:6]
    run(pipeline, data, tmp_path / "one", policies[:1], questions=questions)
    assert pipeline.images.report().rows_shared == 0
    run(pipeline, data, tmp_path / "two", policies[:2], questions=questions)
    assert pipeline.images.report().rows_shared == 12


def test_the_setting_gives_the_store(tmp_path, monkeypatch):
    model, processor = tiny_llava(LAYERS)
    monkeypatch.setattr("dyvte.evaluation.runner.open_backbone", lambda *_, **__: (model, processor))
    config = EvalConfig(model=BackboneConfig(path="tiny"), benchmark="gqa", data=tmp_path, output=tmp_path)
    assert load_pipeline(config, torch.device("cpu")).images.max_bytes == 2 * 2**30
    none = dataclasses.replace(config, image_store=0)
    assert load_pipeline(none, torch.device("cpu")).images is None
    with pytest.raises(ConfigError, match="image_store must be a number of GiB, 0 or more"):
        dataclasses.replace(config, image_store=-1)
