"""The runner on a tiny random model: answers, costs, files, resuming."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from dyvte.backbones import BackboneConfig
from dyvte.backbones.sizes import decoder_shape
from dyvte.comparison.probe import probe_gates
from dyvte.comparison.question_features import TextStates
from dyvte.costs.schedules import kv_share
from dyvte.data import load_image
from dyvte.errors import ConfigError, GateMismatchError
from dyvte.evaluation import generation
from dyvte.evaluation.run_log import Answer, AnswerLog, read_answers, unpack_layers
from dyvte.evaluation.runner import EvalConfig, run_policies
from dyvte.evaluation.scores import RunScores
from dyvte.evaluation.settings import given_exits, parse_policies
from dyvte.gates import (
    GateConfig,
    GateStack,
    exit_layers,
    logit_threshold,
    uniform_freeze_offsets,
    uniform_offsets,
)
from dyvte.tasks.base import get_benchmark
from tests.helpers.evaluations import LAYERS, small_run


def _run(pipeline, config, policies):
    benchmark = get_benchmark(config.benchmark)
    questions = benchmark.load(config.data, config.limit)
    policies = parse_policies(policies) if isinstance(policies[0], str) else policies
    results = run_policies(pipeline, benchmark, questions, policies, config)
    return questions, {result.name: result for result in results}


def _plain_answer(pipeline, question) -> str:
    """One question at a time, on the stock model, no padding, no dyvte in the forward."""
    prompt = pipeline.template.render(question.text).text
    inputs = pipeline.processor(
        text=prompt,
        images=load_image(question.image),
        return_tensors="pt",
        add_special_tokens=False,
    )
    tokens = pipeline.model.generate(**inputs, max_new_tokens=4, do_sample=False)
    new = tokens[0, inputs["input_ids"].shape[1] :]
    return pipeline.processor.tokenizer.decode(new, skip_special_tokens=True)


def test_never_gives_the_stock_models_answers_one_by_one(pipeline, data, tmp_path):
    questions, results = _run(pipeline, small_run(data, tmp_path), ["never"])
    answers = [a.prediction for a in results["never"].answers]
    assert answers == [_plain_answer(pipeline, q) for q in questions]
    assert len(set(answers)) > 1


def test_costs_of_fixed_and_given_exits(pipeline, data, tmp_path):
    questions = get_benchmark("gqa").load(data / "gqa")
    given = {q.id: n % (LAYERS + 1) for n, q in enumerate(questions)}
    policies = [*parse_policies(["never", "fixed:1"]), given_exits("mixed", given)]
    _, results = _run(pipeline, small_run(data, tmp_path), policies)
    never, fixed, mixed = (results[name].scores for name in ("never", "fixed-1", "mixed"))
    assert (never.cost.mean_exit_layer, never.cost.visual_compute, never.same_answer_as_never) == (
        LAYERS,
        1,
        1,
    )
    assert (fixed.cost.mean_exit_layer, fixed.cost.visual_compute) == (1, 0.25)
    assert fixed.cost.prefill["vtw"].tflops < never.cost.prefill["vtw"].tflops
    assert fixed.cost.prefill["pyramiddrop"].ratio == pytest.approx(0.25)
    assert [a.exit_layer for a in results["mixed"].answers] == list(given.values())
    assert mixed.cost.visual_compute == pytest.approx(sum(given.values()) / LAYERS / len(given))
    assert fixed.cost.kv_bytes_per_question < never.cost.kv_bytes_per_question
    assert all(a.num_visual == 16 for a in results["never"].answers)
    same = [
        a.prediction == b.prediction for a, b in zip(results["fixed-1"].answers, results["never"].answers)
    ]
    assert fixed.same_answer_as_never == pytest.approx(sum(same) / len(same))


def test_gate_logits_on_disk_explain_the_exits(pipeline, data, tmp_path, gates_folder):
    # at threshold 1 every gate is asked and none fires
    _, results = _run(pipeline, small_run(data, tmp_path), [f"gates:{gates_folder}@1"])
    complete = [a.gate_logits for a in next(iter(results.values())).answers]
    assert all(None not in row[: LAYERS - 1] for row in complete)
    assert {a.exit_layer for a in next(iter(results.values())).answers} == {LAYERS}
    # a threshold that some rows pass at the first gate and some do not
    first = torch.tensor([row[0] for row in complete]).sigmoid().sort().values
    # in the widest gap: near one row's own value, rounding would decide
    gap = first.diff().argmax()
    threshold = first[gap : gap + 2].mean().item()
    _, results = _run(pipeline, small_run(data, tmp_path), [f"gates:{gates_folder}@{threshold}"])
    folder = next(iter(results.values())).folder
    rows = [json.loads(line) for line in (folder / "exits.jsonl").read_text().splitlines()]
    assert len({row["exit_layer"] for row in rows}) > 1
    logits = torch.tensor([[-1e9 if x is None else x for x in row["gate_logits"]] for row in rows])
    assert exit_layers(logits, threshold).tolist() == [row["exit_layer"] for row in rows]
    for row, whole in zip(rows, complete, strict=True):
        asked = row["gate_logits"][: min(row["exit_layer"], LAYERS - 1)]
        assert asked == pytest.approx(whole[: len(asked)], abs=1e-4)


def test_random_exits_do_not_depend_on_batches(pipeline, data, tmp_path):
    _, one = _run(pipeline, small_run(data, tmp_path / "a"), ["random:1-4"])
    _, two = _run(pipeline, small_run(data, tmp_path / "b", batch_size=7), ["random:1-4"])
    a, b = (next(iter(r.values())).answers for r in (one, two))
    assert [x.exit_layer for x in a] == [x.exit_layer for x in b]
    assert [x.prediction for x in a] == [x.prediction for x in b]
    assert len({x.exit_layer for x in a}) > 1


@pytest.mark.parametrize("cut", [0.0, 0.35, 0.8])
def test_a_killed_run_ends_with_identical_files(pipeline, data, tmp_path, cut, monkeypatch):
    config = small_run(data, tmp_path / "whole")
    _run(pipeline, config, ["never", "fixed:2"])
    # reproduce the state at the kill: answers of the batches asked so far, the last line torn
    killed = tmp_path / "killed"
    calls = []
    original = generation.answer

    def answer_until(*args):
        if len(calls) == 6:
            raise KeyboardInterrupt
        calls.append(args)
        return original(*args)

    monkeypatch.setattr("dyvte.evaluation.asking.answer", answer_until)
    with pytest.raises(KeyboardInterrupt):
        _run(pipeline, small_run(data, killed), ["never", "fixed:2"])
    partial = killed / "never" / "answers.partial.jsonl"
    content = partial.read_bytes()
    partial.write_bytes(content[: int(len(content) * cut)] if cut else content)
    monkeypatch.setattr("dyvte.evaluation.asking.answer", original)
    _run(pipeline, small_run(data, killed), ["never", "fixed:2"])
    for name in ("never", "fixed-2"):
        for file in ("predictions.jsonl", "exits.jsonl", "testdev_balanced_predictions.json"):
            assert (killed / name / file).read_bytes() == (tmp_path / "whole" / name / file).read_bytes()
        assert not (killed / name / "answers.partial.jsonl").exists()


def test_a_finished_run_is_not_asked_again(pipeline, data, tmp_path, monkeypatch):
    config = small_run(data, tmp_path)
    _, first = _run(pipeline, config, ["fixed:2"])
    monkeypatch.setattr("dyvte.evaluation.asking.answer", lambda *args: pytest.fail("asked again"))
    _, second = _run(pipeline, config, ["fixed:2"])
    assert first["fixed-2"].answers == second["fixed-2"].answers
    assert first["fixed-2"].scores == second["fixed-2"].scores


def test_another_run_in_the_folder_is_refused_by_field(pipeline, data, tmp_path):
    _run(pipeline, small_run(data, tmp_path), ["never"])
    with pytest.raises(ConfigError, match=r"another batch_size: 5, now 6.*--overwrite"):
        _run(pipeline, small_run(data, tmp_path, batch_size=6), ["never"])
    _run(pipeline, small_run(data, tmp_path, batch_size=6, overwrite=True), ["never"])


def test_mme_end_to_end_and_submission(pipeline, data, tmp_path):
    questions, results = _run(pipeline, small_run(data, tmp_path, "mme"), ["never", "fixed:2"])
    scores = results["fixed-2"].scores.scores
    assert scores["perception_subtasks"] == ["color"]
    assert scores["cognition_subtasks"] == ["code_reasoning"]
    mme = get_benchmark("mme")
    again = mme.read_predictions(results["fixed-2"].folder / "mme_results", questions)
    assert mme.score(questions, again)["per_subtask"] == scores["per_subtask"]


def test_timing_covers_every_policy(pipeline, data, tmp_path):
    config = small_run(data, tmp_path, timing_batches=1, timing_repeats=1)
    _, results = _run(pipeline, config, ["never", "fixed:1"])
    for result in results.values():
        timing = result.scores.timing
        assert timing.times.first_token_ratio > 0
        assert timing.times.time_per_token_ms > 0
        assert timing.batches == 1


def test_policies_by_name(gates_folder, tmp_path):
    copy = tmp_path / "x" / gates_folder.name
    shutil.copytree(gates_folder, copy)
    named = parse_policies(["never", "fixed:3", "random:1-2", f"gates:{copy}", f"gates:{copy}@0.7"], seed=5)
    names = [one.name for one in named]
    assert names == ["never", "fixed-3", "random-1-2-5", f"gates-x-{copy.name}", f"gates-x-{copy.name}-0.7"]
    assert (named[3].policy.threshold, named[4].policy.threshold) == (0.4, 0.7)
    assert named[3].identity["gates_sha256"] == named[4].identity["gates_sha256"]
    with pytest.raises(ConfigError, match="given twice"):
        parse_policies(["never", "never"])
    with pytest.raises(ConfigError, match="expected a probability"):
        parse_policies([f"gates:{copy}@1.5"])


def test_foreign_answers_are_refused(tmp_path):
    AnswerLog(tmp_path, {"a": 0}, [["q1"], ["q2"]])
    log = AnswerLog(tmp_path, {"a": 1}, [["q1"], ["q2"]])  # the other start answered nothing
    assert log.missing() == [0, 1]
    log.append(0, [Answer.unanswered("q1", "image: torn", 2)])
    with pytest.raises(ConfigError, match="another a: 1, now 2"):
        AnswerLog(tmp_path, {"a": 2}, [["q1"]])
    (tmp_path / "run.json").write_text("{")
    with pytest.raises(ConfigError, match="damaged"):
        AnswerLog(tmp_path, {"a": 1}, [["q1"]])
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="cannot write"):
        AnswerLog(tmp_path / "file" / "x", {}, [])


def test_gates_trained_with_another_image_padding_are_refused(pipeline, data, tmp_path, gates_folder):
    copy = tmp_path / "gates"
    shutil.copytree(gates_folder, copy)
    config = json.loads((copy / "gate_config.json").read_text())
    config["backbone"]["image_padding"] = "square"
    (copy / "gate_config.json").write_text(json.dumps(config))
    with pytest.raises(GateMismatchError, match=r"image padding is 'none', but .* trained with 'square'"):
        _run(pipeline, small_run(data, tmp_path / "out"), [f"gates:{copy}"])
    assert not (tmp_path / "out").exists()


def test_bad_settings(data, tmp_path):
    with pytest.raises(ConfigError, match="did you mean 'gqa'"):
        small_run(data, tmp_path, "gqq")
    with pytest.raises(ConfigError, match="batch_size must be at least 1"):
        small_run(data, tmp_path, batch_size=0)
    with pytest.raises(ConfigError, match="max_new_tokens must be at least 1"):
        small_run(data, tmp_path, max_new_tokens=0)


def test_answers_are_as_long_as_the_benchmark_says():
    given = {"model": BackboneConfig(path="tiny"), "data": Path("d"), "output": Path("o")}
    lengths = [EvalConfig(benchmark=name, **given).max_new_tokens for name in ("gqa", "mmvet")]
    assert lengths == [16, 1024]
    assert EvalConfig(benchmark="mmvet", max_new_tokens=8, **given).max_new_tokens == 8


def test_probe_notes_what_the_gates_would_say(pipeline, data, tmp_path, gates_folder):
    questions, results = _run(pipeline, small_run(data, tmp_path), [f"gates:{gates_folder}@1"])
    answers = next(iter(results.values())).answers
    stacks = [
        GateStack.from_pretrained(gates_folder),
        GateStack.init(GateConfig(num_layers=4, hidden_size=32)),
    ]
    logits = probe_gates(pipeline, questions, [q.text for q in questions], stacks, batch_size=7)
    expected = torch.tensor([a.gate_logits[: LAYERS - 1] for a in answers])
    torch.testing.assert_close(logits[0][:, : LAYERS - 1], expected, atol=1e-4, rtol=0)
    assert logits[1].shape == (len(questions), LAYERS)
    assert not torch.allclose(logits[1][:, 0], logits[0][:, 0])


def test_text_states_are_those_of_the_prompt_without_its_image(pipeline):
    states = TextStates.of(pipeline)
    texts = ["what color is the circle ?", "how many ?", "what color is the circle ?"]
    found = states(texts)
    for row, text in enumerate(texts):
        prompt = pipeline.template.render(text, has_image=False).text
        inputs = pipeline.processor.tokenizer(prompt, return_tensors="pt", add_special_tokens=False)
        hidden = pipeline.model(**inputs, output_hidden_states=True).hidden_states
        parts = [torch.cat([hidden[k][0, :-1].mean(0), hidden[k][0, -1]]) for k in states.layers]
        torch.testing.assert_close(found[row], torch.cat(parts), atol=1e-4, rtol=1e-4)


def test_costs_of_frozen_and_given_schedules(pipeline, data, tmp_path):
    questions = get_benchmark("gqa").load(data / "gqa")
    pairs = {q.id: [(0, 2), (1, LAYERS), (2, 2)][n % 3] for n, q in enumerate(questions)}
    file = tmp_path / "given.json"
    file.write_text(json.dumps(pairs))
    _, results = _run(
        pipeline,
        small_run(data, tmp_path),
        ["never", "freeze:1:3", "freeze:2:2", "fixed:2", f"oracle:{file}"],
    )
    oracle = next(name for name in results if name.startswith("oracle"))
    frozen, given = results["freeze-1-3"], results[oracle]
    share = kv_share(decoder_shape(pipeline.model.config))
    assert frozen.scores.cost.visual_compute == pytest.approx((1 + 2 * share) / LAYERS)
    assert (frozen.scores.cost.mean_freeze_layer, frozen.scores.cost.mean_exit_layer) == (1, 3)
    assert [(a.updated_layers, a.exit_layer) for a in given.answers] == list(pairs.values())
    spent = [(f + share * (k - f)) / LAYERS for f, k in pairs.values()]
    assert given.scores.cost.visual_compute == pytest.approx(sum(spent) / len(spent))
    assert all(unpack_layers(a.frozen_tokens) == [0, 16, 16, 0] for a in frozen.answers)
    costs = {name: results[name].scores.cost for name in ("freeze-1-3", "fixed-2", "freeze-2-2", "never")}
    # Three layers of keys and values beside two; f = k is the fixed exit in all that is written.
    assert costs["freeze-1-3"].kv_bytes_per_question > costs["fixed-2"].kv_bytes_per_question
    assert costs["freeze-1-3"].prefill["vtw"].ratio < costs["never"].prefill["vtw"].ratio
    assert costs["freeze-2-2"] == costs["fixed-2"]
    assert costs["fixed-2"].mean_freeze_layer is None
    for one in ("exits.jsonl", "predictions.jsonl"):
        same = [(results[name].folder / one).read_text() for name in ("freeze-2-2", "fixed-2")]
        assert same[0] == same[1]
    assert read_answers(frozen.folder) == frozen.answers
    assert RunScores.read(frozen.folder).cost == frozen.scores.cost


def test_logits_of_both_heads_on_disk_explain_the_schedules(pipeline, data, tmp_path):
    config = GateConfig(
        num_layers=LAYERS,
        hidden_size=32,
        offsets=uniform_offsets(LAYERS),
        freeze_head=True,
        freeze_offsets=uniform_freeze_offsets(LAYERS),
    )
    GateStack.init(config, seed=3).save_pretrained(tmp_path / "gates")
    policies = ["never", f"gates:{tmp_path / 'gates'}@0.3"]
    _, results = _run(pipeline, small_run(data, tmp_path / "out"), policies)
    gated = next(result for name, result in results.items() if name != "never")
    assert len({(a.updated_layers, a.exit_layer) for a in gated.answers}) > 2
    cut = logit_threshold(0.3)
    for one in gated.answers:
        first = next((k for k, x in enumerate(one.gate_logits, 1) if x is not None and x > cut), LAYERS)
        freezes = [j for j, x in enumerate(one.freeze_logits) if x is not None and x > cut]
        assert one.exit_layer == first
        assert one.updated_layers == min([*freezes[:1], first])
    assert read_answers(gated.folder) == gated.answers
