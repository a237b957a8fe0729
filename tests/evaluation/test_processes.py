"""Reductions beside policies, several processes, and batches: the same answers whoever asks them."""

from __future__ import annotations

import copy
import dataclasses
import json
import threading

import pytest

from dyvte.backbones import BackboneConfig, get_template
from dyvte.distributed import Processes
from dyvte.errors import ConfigError
from dyvte.evaluation.generation import Pipeline, answer, encode_questions
from dyvte.evaluation.given import known_answers
from dyvte.evaluation.run_log import PARTIAL_FILE, AnswerLog, pack_layers, unpack_layers
from dyvte.evaluation.runner import EvalConfig, load_questions, run_policies
from dyvte.evaluation.settings import given_exits, parse_policies, with_reductions
from dyvte.tasks.base import get_benchmark
from tests.helpers.fixtures import write_mini_gqa
from tests.helpers.models import tiny_llava

LAYERS = 4
FILES = ("predictions.jsonl", "exits.jsonl", "testdev_balanced_predictions.json")


@pytest.fixture(scope="module")
def pipeline():
    model, processor = tiny_llava(LAYERS)
    return Pipeline(model, processor, get_template("chat", processor), max_new_tokens=4)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_mini_gqa(tmp_path_factory.mktemp("data") / "gqa")


def _config(data, output, **changes):
    settings = EvalConfig(
        model=BackboneConfig(path="tiny"),
        benchmark="gqa",
        data=data,
        output=output,
        question_suffix="",
        batch_size=5,
        max_new_tokens=4,
        timing_batches=0,
    )
    return dataclasses.replace(settings, **changes)


def _run(pipeline, config, policies=("never", "fixed:2"), reductions=("none",), processes=None):
    benchmark = get_benchmark("gqa")
    named = with_reductions(parse_policies(policies), reductions)
    questions = load_questions(benchmark, config.data, None, config.max_bad_samples)
    found = run_policies(pipeline, benchmark, questions, named, config, processes=processes)
    return {result.name: result for result in found}


def test_every_policy_runs_with_every_reduction(pipeline, data, tmp_path):
    results = _run(pipeline, _config(data, tmp_path), reductions=("none", "fastv:1:0.5", "random_tokens:2:7"))
    assert list(results) == [
        *("never", "fixed-2", "never+fastv-1-0.5", "fixed-2+fastv-1-0.5"),
        *("never+random_tokens-2-7", "fixed-2+random_tokens-2-7"),
    ]
    assert {path.name for path in tmp_path.iterdir()} == set(results)
    # 16 visual tokens: FastV leaves 8 from layer 2 on
    compute = {name: result.scores.cost.visual_compute for name, result in results.items()}
    assert compute["never+fastv-1-0.5"] == (16 + 3 * 8) / 64
    assert compute["fixed-2+fastv-1-0.5"] == (16 + 8) / 64
    assert compute["fixed-2"] == compute["fixed-2+random_tokens-2-7"] == 0.5
    fastv = results["never+fastv-1-0.5"]
    assert fastv.scores.run.policy == "never"
    assert fastv.scores.run.reduction == "fastv:1:0.5"
    assert fastv.scores.cost.mean_exit_layer == LAYERS
    assert fastv.scores.cost.score_row_flops_per_question > 0
    assert 0.5 < compute["never+random_tokens-2-7"] < 1
    for given in results["never+random_tokens-2-7"].answers:
        visual_L, text_L = unpack_layers(given.visual_tokens), unpack_layers(given.text_tokens)
        # as many tokens leave as there were visual ones, of all kinds
        assert visual_L[2] + text_L[2] == given.num_text
    only = results["fixed-2"].scores
    assert only.run.reduction == "none"
    assert only.same_answer_as_never is not None


def test_a_reduction_is_part_of_what_a_folder_holds(pipeline, data, tmp_path):
    _run(pipeline, _config(data, tmp_path), ["never"], ["fastv:1:0.5"])
    (tmp_path / "never+fastv-1-0.5").rename(tmp_path / "never")
    with pytest.raises(ConfigError, match=r"another reduction: 'fastv:1:0.5', now 'none'"):
        _run(pipeline, _config(data, tmp_path), ["never"])
    with pytest.raises(ConfigError, match=r"reduction 'fastv:1:0.5' is given twice"):
        with_reductions(parse_policies(["never"]), ["fastv:1:0.5", "fastv:1:0.50"])


def test_answers_of_a_batch_are_those_of_batch_one(pipeline, data, tmp_path):
    """Exits, reductions and padding included."""
    reductions = ("none", "fastv:1:0.5")
    many = _run(
        pipeline, _config(data, tmp_path / "many", batch_size=11), ("never", "random:0-4"), reductions
    )
    one = _run(pipeline, _config(data, tmp_path / "one", batch_size=1), ("never", "random:0-4"), reductions)
    for name, result in many.items():
        pairs = list(zip(result.answers, one[name].answers, strict=True))
        assert [a.prediction for a, _ in pairs] == [b.prediction for _, b in pairs]
        assert [(a.exit_layer, a.visual_tokens, a.text_tokens) for a, _ in pairs] == [
            (b.exit_layer, b.visual_tokens, b.text_tokens) for _, b in pairs
        ]


def test_a_batch_of_questions_without_images(pipeline):
    from dyvte.tasks.base import Question

    questions = [Question(id=i, image=None, text="how many ?", answer="", image_id=i, kind="") for i in "ab"]
    batch = encode_questions(pipeline, questions, [q.text for q in questions])
    given = answer(pipeline, batch, parse_policies(["fixed:1"])[0].exits())
    for one in given:
        assert (one.exit_layer, one.num_visual, one.visual_tokens) == (-1, 0, ((0, LAYERS),))
        assert one.text_tokens == ((one.num_text, LAYERS),)
        # keys and values of 2 heads of 8 in every layer, fp32
        assert one.kv_bytes == LAYERS * one.num_text * 2 * 2 * 8 * 4


class _Threads:
    """Processes that are threads of this process, each with its own copy of the model."""

    def __init__(self, world_size):
        self.barrier = threading.Barrier(world_size)
        self.world_size = world_size
        self.said = None

    def rank(self, rank):
        threads, shared = self, self.barrier

        class Rank(Processes):
            def barrier(self):
                shared.wait(60)

            def first_alone(self, work):
                found = work() if self.first else None
                shared.wait(60)
                return found

            def from_first(self, value):
                if self.first:
                    threads.said = value
                shared.wait(60)
                said = threads.said
                shared.wait(60)
                return said

        return Rank(rank, self.world_size)


def _run_in_threads(pipeline, config, world_size):
    threads = _Threads(world_size)
    results, errors = {}, []

    def work(rank):
        own = dataclasses.replace(pipeline, model=copy.deepcopy(pipeline.model))
        try:
            results[rank] = _run(own, config, processes=threads.rank(rank))
        except BaseException as error:
            errors.append(error)
            threads.barrier.abort()

    running = [threading.Thread(target=work, args=(rank,)) for rank in range(world_size)]
    for thread in running:
        thread.start()
    for thread in running:
        thread.join(120)
    return results, errors


def test_processes_share_the_batches_and_merge_in_order(pipeline, data, tmp_path):
    _run(pipeline, _config(data, tmp_path / "alone"))
    results, errors = _run_in_threads(pipeline, _config(data, tmp_path / "three"), 3)
    assert not errors
    assert [list(results[rank]) for rank in range(3)] == [["never", "fixed-2"], [], []]
    for name in ("never", "fixed-2"):
        for file in FILES:
            assert (tmp_path / "three" / name / file).read_bytes() == (
                tmp_path / "alone" / name / file
            ).read_bytes()
        assert not list((tmp_path / "three" / name).glob("answers.partial*"))


def test_processes_agree_on_what_cannot_be_asked(pipeline, tmp_path):
    root = write_mini_gqa(tmp_path / "gqa", questions=12, images=4)
    image = root / "images" / "1.png"  # of three questions
    image.write_bytes(image.read_bytes()[:-300])
    allowed = {"batch_size": 2, "max_bad_samples": 3}
    alone = _run(pipeline, _config(root, tmp_path / "alone", **allowed))
    assert len(alone["never"].scores.unanswered) == 3
    results, errors = _run_in_threads(pipeline, _config(root, tmp_path / "two", **allowed), 2)
    assert not errors
    assert results[0]["fixed-2"].scores.unanswered == alone["never"].scores.unanswered
    for file in FILES:
        assert (tmp_path / "two" / "never" / file).read_bytes() == (
            tmp_path / "alone" / "never" / file
        ).read_bytes()


def test_a_killed_process_loses_nothing_for_any_number_that_goes_on(pipeline, data, tmp_path, monkeypatch):
    _run(pipeline, _config(data, tmp_path / "alone"))
    own, lock = threading.local(), threading.Lock()

    def until_killed(*args):
        own.asked = getattr(own, "asked", 0) + 1
        if own.asked > 2:
            raise KeyboardInterrupt
        return answer(*args)

    config = _config(data, tmp_path / "killed")
    monkeypatch.setattr("dyvte.evaluation.asking.answer", until_killed)
    _, errors = _run_in_threads(pipeline, config, 2)
    assert [type(error) for error in errors] == [KeyboardInterrupt, KeyboardInterrupt]
    folder = tmp_path / "killed" / "never"
    partial = sorted(path.name for path in folder.glob("answers.partial*"))
    assert partial == ["answers.partial.1.jsonl", PARTIAL_FILE]
    # the kill tore the last line of one of them
    torn = folder / partial[0]
    torn.write_bytes(torn.read_bytes()[:-9])
    kept = []

    def noting(*args):
        with lock:
            kept.append(args[1].question_ids)
        return answer(*args)

    monkeypatch.setattr("dyvte.evaluation.asking.answer", noting)
    _, errors = _run_in_threads(pipeline, config, 3)
    assert not errors
    # two policies on five batches; two answers from each process before, one of those torn
    assert len(kept) == 10 - 4 + 1
    for name in ("never", "fixed-2"):
        for file in FILES:
            assert (tmp_path / "killed" / name / file).read_bytes() == (
                tmp_path / "alone" / name / file
            ).read_bytes()


def test_first_alone_without_a_launcher():
    assert Processes().first_alone(lambda: 3) == 3
    assert list(Processes(1, 3).share(range(8))) == [1, 4, 7]


def test_an_old_run_is_named_not_misread(tmp_path):
    AnswerLog(tmp_path, {"a": 1}, [["q1"]])
    (tmp_path / "predictions.jsonl").write_text('{"question_id": "q1", "prediction": "x"}\n')
    (tmp_path / "exits.jsonl").write_text('{"question_id": "q1", "exit_layer": 3}\n')
    from dyvte.errors import DataError

    with pytest.raises(DataError, match=r"do not fit together.*--overwrite"):
        AnswerLog(tmp_path, {"a": 1}, [["q1"]])


def test_layers_are_packed_without_loss():
    tokens = [576, 576, 288, 288, 288, 0]
    assert pack_layers(tokens) == ((576, 2), (288, 3), (0, 1))
    assert unpack_layers(pack_layers(tokens)) == tokens


def test_scores_say_how_the_run_was_made(pipeline, data, tmp_path):
    result = _run(pipeline, _config(data, tmp_path, seed=3), ["fixed:1"])["fixed-1"]
    scores = json.loads((result.folder / "scores.json").read_text())
    assert scores["config"]["seed"] == scores["run"]["seed"] == 3
    assert {"dyvte", "torch", "transformers"} <= scores["run"].keys()
    assert set(scores["prefill"]) == {"vtw", "fastv", "pyramiddrop"}
    rows = [json.loads(line) for line in (result.folder / "exits.jsonl").read_text().splitlines()]
    assert rows[0]["visual_tokens"] == [[16, 1], [0, 3]]
    assert scores["visual_token_layers_per_question"] == 16


def test_what_an_earlier_run_was_asked_is_not_asked_again(pipeline, data, tmp_path, monkeypatch):
    asked = []

    def counted(pipeline, batch, exits, *args):
        asked.append(str(exits.policy))
        return answer(pipeline, batch, exits, *args)

    monkeypatch.setattr("dyvte.evaluation.asking.answer", counted)
    first = _run(pipeline, _config(data, tmp_path / "first"), ("never", "fixed:2"))
    (tmp_path / "first" / "fixed-2" / "predictions.jsonl").rename(tmp_path / "lost")  # a run that was killed
    asked.clear()
    earlier = (tmp_path / "first", tmp_path / "nowhere", tmp_path / "first" / "never")
    later = _run(pipeline, _config(data, tmp_path / "later", earlier=earlier), ("never", "fixed:2"))
    assert len(set(asked)) == 1  # fixed:2 alone
    assert [later[name].answers == first[name].answers for name in first] == [True, True]
    for name in ("run.json", "exits.jsonl", "predictions.jsonl"):
        theirs, ours = (tmp_path / folder / "never" / name for folder in ("first", "later"))
        assert ours.read_bytes() == theirs.read_bytes()
    # Asked in another way, or anew: nothing is taken over.
    for changes in ({"batch_size": 4}, {"overwrite": True}):
        asked.clear()
        _run(pipeline, _config(data, tmp_path / "other", earlier=earlier, **changes), ("never",))
        assert asked


def test_given_policies_share_answers_at_equal_schedules(pipeline, data, tmp_path, monkeypatch):
    benchmark, config = get_benchmark("gqa"), _config(data, tmp_path / "shared")
    questions = load_questions(benchmark, data, None, 0)
    ids = [question.id for question in questions]
    exits = [dict(zip(ids, layers)) for layers in ([1, 2, 3] * 40, [1, 2, 4] * 40, [3] * 120)]
    freezes = [None, {one: min(k, 2) for one, k in exits[1].items()}, dict.fromkeys(ids, 1)]
    given = [given_exits(f"given-{n}", *both) for n, both in enumerate(zip(exits, freezes))]
    alone = run_policies(pipeline, benchmark, questions, given, _config(data, tmp_path / "alone"))
    (full,) = run_policies(pipeline, benchmark, questions, parse_policies(["fixed:1"]), config)
    asked = []

    def counted(pipeline, batch, exits, *args):
        asked.extend(batch.question_ids)
        return answer(pipeline, batch, exits, *args)

    monkeypatch.setattr("dyvte.evaluation.asking.answer", counted)
    known = known_answers(full.answers)
    shared = run_policies(pipeline, benchmark, questions, given, config, known=known)
    # After layer 1 all is known; (2, 2) and (3, 3) are asked once, (2, 4) and (1, 3) too.
    schedules = {
        (one, min(f[one], k), k) for e, f in zip(exits, [exits[0], *freezes[1:]]) for one, k in e.items()
    }
    assert len(asked) == len(set(asked)) == len([one for one in schedules if one[1:] != (1, 1)])
    for mine, theirs in zip(shared, alone, strict=True):
        for ours, other in zip(mine.answers, theirs.answers, strict=True):
            bytes_apart = abs(ours.kv_bytes - other.kv_bytes) / other.kv_bytes
            assert dataclasses.replace(ours, kv_bytes=other.kv_bytes) == other
            assert bytes_apart < 0.15  # padding, which depends on the other rows
    # A run that stopped goes on in the same batches.
    path = tmp_path / "shared" / "given-2"
    for name in ("predictions.jsonl", "exits.jsonl"):
        (path / name).unlink()
    before = list(asked)
    asked.clear()
    again = run_policies(pipeline, benchmark, questions, given, config, known=known)
    assert asked == before
    assert [one.answers for one in again] == [one.answers for one in shared]
