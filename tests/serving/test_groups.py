"""Rows that are generated together: each answer is what it is alone, whoever is beside it."""

from __future__ import annotations

import math

import pytest
import torch

from dyvte.evaluation.generation import answer, encode_rendered
from dyvte.runtime import VisualExit
from dyvte.serving.asking import Collected, ask
from dyvte.serving.errors import RequestError
from dyvte.serving.groups import RowGroup
from dyvte.serving.jobs import Conversation, Decoding, Failed, Finished
from dyvte.serving.schedules import ScheduleWish
from tests.helpers.models import random_image

ASKED = [
    (Conversation("what color is the circle ?", [[random_image(1)]]), ScheduleWish()),
    (Conversation("how many ?", [[random_image(2)]]), ScheduleWish(policy="fixed:1")),
    (Conversation("is there any red square on the left ?", [[]]), ScheduleWish(policy="fixed:2")),
    (Conversation("what is this ?", [[random_image(3), random_image(1)]]), ScheduleWish(policy="freeze:1:3")),
    (Conversation("what color is the circle ?", [[random_image(1)]]), ScheduleWish(policy="never")),
    (
        Conversation("which ?", [[random_image(4)], [random_image(5)]], [("how many ?", "two")]),
        ScheduleWish(threshold=0.4),
    ),
]


def by_runtime(answerer, conversation, wish):
    """The answer of the evaluation's own path, in a batch of one."""
    job = answerer.job(conversation, id="alone", emit=None, schedule=answerer.menu.choose(wish))
    batch = encode_rendered(answerer.pipeline, ["alone"], [job.prompt], [job.images])
    return answer(answerer.pipeline, batch, VisualExit.from_policy(job.schedule.policy))[0]


def jobs_of(answerer, asked=ASKED, **options):
    collected = [Collected(options.get("num_choices", 1)) for _ in asked]
    events = [[] for _ in asked]

    def sink(at):
        def emit(event):
            events[at].append(event)
            collected[at].add(event)

        return emit

    jobs = [
        answerer.job(
            conversation, id=f"job{at}", emit=sink(at), schedule=answerer.menu.choose(wish), **options
        )
        for at, (conversation, wish) in enumerate(asked)
    ]
    return jobs, collected, events


def run(group, pause=lambda _: False):
    while not group.is_over:
        group.go_on(pause)


@pytest.mark.parametrize("tokens", [1, 3, 100], ids=lambda n: f"turns of {n}")
def test_a_mixed_group_answers_as_the_runtime_does_alone(answerer, tokens):
    jobs, collected, events = jobs_of(answerer)
    group = RowGroup(answerer, jobs)
    run(group, lambda count: count >= tokens)
    found = [one.answer() for one in collected]
    exits = set()
    for one, (conversation, wish) in zip(found, ASKED, strict=True):
        alone = by_runtime(answerer, conversation, wish)
        assert one.texts[0] == alone.prediction
        assert one.num_tokens[0] == alone.num_new_tokens
        assert one.report.exit_layer == alone.exit_layer
        assert one.report.visual_tokens == alone.num_visual
        assert one.report.kv_bytes == alone.kv_bytes
        exits.add(alone.exit_layer)
    assert len(exits) >= 4, "rows of one batch leave at their own layers"
    assert len({one.num_tokens for one in found}) >= 2, "and answers end at their own lengths"
    assert all(isinstance(seen[-1], Finished) for seen in events)
    assert group.rows == []
    assert not hasattr(answerer.pipeline.model, "hf_hooks")
    assert "generate" not in answerer.pipeline.model.__dict__, "nothing is left on the model"


def test_reports(answerer):
    one = ask(answerer, ASKED[0][0])
    report = one.report
    assert report.schedule == "gates@0.5"
    assert {name: report.certified[name] for name in ("alpha", "delta", "loss")} == {
        "alpha": 0.05,
        "delta": 0.1,
        "loss": "same_answer",
    }
    asked = [p is not None for p in report.gate_probabilities]
    k = report.exit_layer
    assert asked == [layer <= min(k, 3) for layer in range(1, 5)], "gates are asked until one fires"
    assert all(0 <= p <= 0.5 for p in report.gate_probabilities[: k - 1])
    assert report.visual_compute == pytest.approx(k / 4)
    frozen = ask(answerer, *ASKED[3][:1], schedule=answerer.menu.choose(ScheduleWish(policy="freeze:1:3")))
    assert (frozen.report.freeze_layer, frozen.report.exit_layer) == (1, 3)
    assert 1 / 4 < frozen.report.visual_compute < 3 / 4
    assert frozen.report.certified is None
    text = ask(answerer, ASKED[2][0]).report
    assert (text.exit_layer, text.freeze_layer, text.visual_compute) == (-1, -1, None)


def test_cancelled_rows_leave_the_batch_and_the_others_do_not_notice(answerer):
    jobs, collected, events = jobs_of(answerer)
    group = RowGroup(answerer, jobs)
    group.go_on(lambda count: True)
    live = group.live_rows
    victim = next(row.job for row in group.rows if not row.is_over)
    victim.is_cancelled = True
    run(group, lambda count: True)
    assert live >= 2
    assert not any(isinstance(event, Finished) for event in events[jobs.index(victim)])
    for at, (conversation, wish) in enumerate(ASKED):
        if jobs[at] is not victim:
            assert collected[at].answer().texts[0] == by_runtime(answerer, conversation, wish).prediction


def test_a_row_that_fails_does_not_take_its_batch(answerer, monkeypatch):
    jobs, collected, events = jobs_of(answerer)
    jobs[1].emit = events[1].append
    group = RowGroup(answerer, jobs)
    group.rows[1].take = lambda token, ends: 1 / 0
    run(group)
    assert isinstance(events[1][-1], Failed)
    assert isinstance(events[1][-1].error, ZeroDivisionError)
    for at in (0, 2, 3, 4, 5):
        assert collected[at].answer().texts[0] == by_runtime(answerer, *ASKED[at]).prediction


def test_a_prompt_beyond_the_context_is_refused_alone(answerer):
    long = Conversation("how many " * 1100 + "?", [[random_image(1)]])
    jobs, collected, events = jobs_of(answerer, [*ASKED[:2], (long, ScheduleWish())])
    jobs[2].emit = events[2].append
    group = RowGroup(answerer, jobs)
    (failed,) = events[2]
    assert failed.error.code == "context_length_exceeded"
    assert "2048" in str(failed.error)
    run(group)
    for at in (0, 1):
        assert collected[at].answer().texts[0] == by_runtime(answerer, *ASKED[at]).prediction


def test_a_text_that_no_prompt_takes_is_refused(answerer):
    with pytest.raises(RequestError, match="image placeholder"):
        ask(answerer, Conversation("what <image> ?"))


# --- choosing tokens ---

DRAWN = Decoding(max_tokens=6, temperature=1.5, seed=3, top_logprobs=3)


def test_drawn_answers_depend_on_the_seed_alone(answerer):
    alone = ask(answerer, ASKED[0][0], decoding=DRAWN, num_choices=3)
    assert len(set(alone.texts)) == 3
    assert ask(answerer, ASKED[0][0], decoding=DRAWN, num_choices=3).texts == alone.texts
    others = ask(answerer, ASKED[0][0], decoding=Decoding(max_tokens=6, temperature=1.5, seed=4))
    assert others.texts[0] not in alone.texts
    jobs, collected, _ = jobs_of(answerer)
    drawn = Collected(3)
    jobs.insert(2, answerer.job(ASKED[0][0], id="d", emit=drawn.add, decoding=DRAWN, num_choices=3))
    run(RowGroup(answerer, jobs), lambda count: count >= 2)
    assert drawn.answer().texts == alone.texts, "whoever is beside it"
    for at, one in enumerate(collected):
        assert one.answer().texts[0] == by_runtime(answerer, *ASKED[at]).prediction, "greedy rows stay greedy"


def test_draws_follow_the_distribution():
    from dyvte.serving.sampling import RowChoice

    scores = torch.tensor([1.0, 0.0, -1.0, -math.inf, 2.0])
    counts = torch.zeros(5)
    for seed in range(2000):
        counts[RowChoice(Decoding(temperature=2.0, seed=seed), 0).take(scores)] += 1
    assert torch.allclose(counts / 2000, (scores / 2).softmax(-1), atol=0.03)
    kept = {RowChoice(Decoding(temperature=2.0, top_p=0.5, seed=s), 0).take(scores) for s in range(300)}
    assert kept == {0, 4}, "the smallest set of tokens that holds the probability"


def test_logprobs_are_the_models(answerer):
    conversation, wish = ASKED[4]
    found = ask(
        answerer,
        conversation,
        schedule=answerer.menu.choose(wish),
        decoding=Decoding(max_tokens=4, top_logprobs=2),
    )
    job = answerer.job(conversation, id="x", emit=None)
    batch = answerer.encode([job])
    ids = batch.inputs["input_ids"]
    tokens = [one.token for one in found.logprobs[0]]
    assert answerer.pipeline.processor.tokenizer.decode(tokens) == found.texts[0]
    whole = torch.cat([ids, torch.tensor([tokens])], 1)
    inputs = {**batch.inputs, "input_ids": whole, "attention_mask": torch.ones_like(whole)}
    logits = answerer.pipeline.model(**inputs).logits[0, ids.shape[1] - 1 : -1]
    logits[:, list(answerer.backbone.visual_token_ids)] = -math.inf
    expected = logits.log_softmax(-1)
    for at, one in enumerate(found.logprobs[0]):
        assert one.logprob == pytest.approx(float(expected[at, one.token]), abs=1e-4)
        assert [token for token, _ in one.top] == expected[at].topk(2).indices.tolist()


def test_greedy_is_the_top_logprob_and_without_logprobs_nothing_is_kept(answerer):
    with_them = ask(answerer, ASKED[1][0], decoding=Decoding(top_logprobs=1))
    without = ask(answerer, ASKED[1][0])
    assert with_them.texts == without.texts
    assert without.logprobs == ((),)
    assert all(one.top[0][0] == one.token for one in with_them.logprobs[0])


def test_length_ends_an_answer(answerer):
    conversation, wish = ASKED[3]
    schedule = answerer.menu.choose(wish)
    whole = ask(answerer, conversation, schedule=schedule)
    decoding = Decoding(max_tokens=whole.num_tokens[0] - 1)
    cut = ask(answerer, conversation, schedule=schedule, decoding=decoding)
    assert (cut.reasons, whole.reasons) == (("length",), ("stop",))
    assert whole.texts[0].startswith(cut.texts[0])
    assert cut.num_tokens[0] == whole.num_tokens[0] - 1
