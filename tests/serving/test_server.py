"""The server as its clients see it: OpenAI's own package, and plain HTTP."""

from __future__ import annotations

import concurrent.futures
import json
import math
import threading
import time

import httpx
import openai
import pytest
import torch

from dyvte.gates import GateConfig, GateStack
from dyvte.serving.answerer import Answerer
from dyvte.serving.asking import ask
from dyvte.serving.explore import trace_schedules
from dyvte.serving.groups import RowGroup
from dyvte.serving.jobs import Conversation, Decoding
from dyvte.serving.schedules import ScheduleWish
from tests.helpers.models import random_image
from tests.helpers.served import about, data_url, serving

QUESTION = "what color is the circle ?"
WISHES = [{}, {"policy": "fixed:1"}, {"policy": "freeze:1:3"}, {"policy": "never"}, {"threshold": 0.3}]


@pytest.fixture(scope="module")
def client(served):
    return openai.OpenAI(base_url=f"{served.url}/v1", api_key="none", max_retries=0, timeout=120)


def by_hand(answerer, question=QUESTION, images=(1,), **wish):
    conversation = Conversation(question, [[random_image(seed) for seed in images]])
    return ask(answerer, conversation, schedule=answerer.menu.choose(ScheduleWish(**wish)))


def post(served, body, **how):
    how = {"timeout": 120, **how}
    return httpx.post(f"{served.url}/v1/chat/completions", json=body, **how)


def test_openais_client_gets_the_runtimes_answer(client, served, answerer):
    for wish in WISHES:
        expected = by_hand(answerer, **wish)
        found = client.chat.completions.create(
            model="tiny", messages=about(QUESTION, random_image(1)), extra_body={"visual_exit": wish}
        )
        (choice,) = found.choices
        assert choice.message.content == expected.texts[0]
        assert choice.finish_reason == expected.reasons[0]
        assert found.usage.prompt_tokens == expected.prompt_tokens
        assert found.usage.completion_tokens == expected.num_tokens[0]
        exits = found.model_extra["visual_exit"]
        assert exits["exit_layer"] == expected.report.exit_layer
        assert exits["freeze_layer"] == expected.report.freeze_layer
        assert exits["kv_bytes"] == expected.report.kv_bytes
        assert exits["visual_compute"] == pytest.approx(expected.report.visual_compute)
        assert exits["certified"] == expected.report.certified
        for seen, known in zip(exits["gate_probabilities"], expected.report.gate_probabilities, strict=True):
            assert seen == (None if known is None else pytest.approx(known, abs=1e-5))


def test_a_stream_adds_up_to_the_whole_answer(client, answerer):
    stream = client.chat.completions.create(
        model="tiny",
        messages=about(QUESTION, random_image(1)),
        stream=True,
        stream_options={"include_usage": True},
        n=2,
        logprobs=True,
    )
    texts, reasons, exits, counted, tokens = ["", ""], [None, None], None, None, [[], []]
    for chunk in stream:
        exits = exits or (chunk.model_extra or {}).get("visual_exit")
        counted = chunk.usage or counted
        for choice in chunk.choices:
            texts[choice.index] += choice.delta.content or ""
            reasons[choice.index] = choice.finish_reason or reasons[choice.index]
            if choice.logprobs:
                tokens[choice.index] += [one.token for one in choice.logprobs.content]
    expected = by_hand(answerer)
    assert texts == [expected.texts[0]] * 2
    assert reasons == [expected.reasons[0]] * 2
    assert exits["exit_layer"] == expected.report.exit_layer
    assert counted.completion_tokens == 2 * expected.num_tokens[0]
    assert [" ".join(one) for one in tokens] == texts


def test_choices_seeds_stops_and_logprobs_as_people_use_them(client, answerer):
    messages = about(QUESTION, random_image(1))
    how = {"model": "tiny", "messages": messages, "temperature": 1.5, "n": 3, "max_tokens": 5}
    first = client.chat.completions.create(**how, seed=7)
    again = client.chat.completions.create(**how, seed=7)
    texts = [choice.message.content for choice in first.choices]
    assert texts == [choice.message.content for choice in again.choices]
    assert len(set(texts)) > 1
    whole = by_hand(answerer).texts[0].split()
    stopped = client.chat.completions.create(model="tiny", messages=messages, stop=[whole[1], "zzz"])
    assert stopped.choices[0].message.content == whole[0]
    assert stopped.choices[0].finish_reason == "stop"
    with_them = client.chat.completions.create(
        model="tiny", messages=messages, logprobs=True, top_logprobs=2, max_completion_tokens=3
    )
    content = with_them.choices[0].logprobs.content
    assert [one.token for one in content] == whole[:3]
    assert all(one.logprob == one.top_logprobs[0].logprob <= 0 for one in content)
    assert with_them.choices[0].finish_reason == "length"
    assert with_them.choices[0].message.content == " ".join(whole[:3])


def test_a_conversation_with_images_in_several_turns(client, answerer):
    messages = [
        {"role": "system", "content": "answer"},
        *about("how many ?", random_image(1)),
        {"role": "assistant", "content": "two"},
        *about("what color ?", random_image(2), random_image(3)),
    ]
    found = client.chat.completions.create(model="tiny", messages=messages)
    images = [[random_image(1)], [random_image(2), random_image(3)]]
    expected = ask(answerer, Conversation("what color ?", images, [("how many ?", "two")], "answer"))
    assert found.choices[0].message.content == expected.texts[0]
    assert found.model_extra["visual_exit"]["visual_tokens"] == 3 * 16


def test_images_are_shared_unless_a_request_wants_its_own(client, served, answerer):
    store = answerer.images
    answers = []
    for shares in (True, True, False, None):
        before = store.report()
        found = client.chat.completions.create(
            model="tiny",
            messages=about(QUESTION, random_image(77)),
            extra_body={"visual_exit": {"policy": "fixed:3", "share_images": shares}},
        )
        answers.append(found.choices[0].message.content)
        after = store.report()
        assert after.rows_shared - before.rows_shared == (shares is not False)
    assert len(set(answers)) == 1
    assert store.report().images >= 1


def test_text_alone_is_served(client):
    found = client.chat.completions.create(model="tiny", messages=[{"role": "user", "content": "how many ?"}])
    assert found.choices[0].message.content
    assert found.model_extra["visual_exit"]["exit_layer"] == -1


def test_models_health_metrics_and_settings(client, served):
    (model,) = client.models.list().data
    assert model.id == "tiny"
    assert client.models.retrieve("tiny").id == "tiny"
    with pytest.raises(openai.NotFoundError, match="this server has 'tiny'"):
        client.models.retrieve("other")
    assert httpx.get(f"{served.url}/health").json() == {"status": "ok"}
    counts = httpx.get(f"{served.url}/metrics").text
    assert 'dyvte_requests_total{status="200"}' in counts
    assert "dyvte_exit_layer_bucket" in counts
    assert "dyvte_waiting_answers 0.0" in counts
    settings = httpx.get(f"{served.url}/v1/visual_exit").json()
    assert [one["alpha"] for one in settings["gates"]["certificates"]] == [0.05, 0.2]
    assert settings["num_layers"] == 4


def test_requests_that_wait_are_answered_together_each_at_its_own_layer(client, served, answerer):
    kinds = [
        (seed, wish)
        for seed in range(4)
        for wish in ({}, {"policy": "fixed:1"}, {"policy": "freeze:1:3"}, {"threshold": 0.3})
    ]
    expected = [by_hand(answerer, images=[seed], **wish) for seed, wish in kinds]

    def ask_it(kind):
        seed, wish = kind
        return client.chat.completions.create(
            model="tiny", messages=about(QUESTION, random_image(seed)), extra_body={"visual_exit": wish}
        )

    with concurrent.futures.ThreadPoolExecutor(16) as pool:
        found = list(pool.map(ask_it, kinds * 3))
    for one, known in zip(found, expected * 3, strict=True):
        assert one.choices[0].message.content == known.texts[0]
        assert one.model_extra["visual_exit"]["exit_layer"] == known.report.exit_layer
    counts = httpx.get(f"{served.url}/metrics").text
    largest = [line for line in counts.splitlines() if line.startswith('dyvte_batch_rows_bucket{le="1.0"}')]
    total = [line for line in counts.splitlines() if line.startswith("dyvte_batch_rows_count")]
    assert float(largest[0].split()[1]) < float(total[0].split()[1]), "some batches hold several requests"


def test_a_trace_knows_what_the_runtime_answers_under_every_schedule(served, answerer):
    body = {"messages": about(QUESTION, random_image(1)), "max_tokens": 6}
    found = httpx.post(f"{served.url}/v1/visual_exit/schedules", json=body, timeout=120).json()
    conversation, decoding = Conversation(QUESTION, [[random_image(1)]]), Decoding(max_tokens=6)
    assert [(one["freeze_layer"], one["exit_layer"]) for one in found["schedules"][:5]] == [
        (k, k) for k in range(5)
    ]
    for one in found["schedules"]:
        f, k = one["freeze_layer"], one["exit_layer"]
        schedule = answerer.menu.choose(ScheduleWish(policy=f"freeze:{f}:{k}"))
        alone = ask(answerer, conversation, schedule=schedule, decoding=decoding)
        assert one["answer"] == alone.texts[0]
        assert one["kv_bytes"] == alone.report.kv_bytes
        assert one["visual_compute"] == pytest.approx(alone.report.visual_compute)
    full, stable = found["schedules"][4]["answer"], found["first_stable"]
    exits = found["schedules"][:5]
    assert all(one["answer"] == full for one in exits[stable:])
    assert stable == 0 or exits[stable - 1]["answer"] != full
    assert [one["is_full"] for one in exits] == [one["answer"] == full for one in exits]
    assert exits[4]["risk"] == 0
    assert 0 < found["generated"] < len(found["schedules"])


@pytest.mark.parametrize("freezes", [False, True])
def test_the_path_is_what_the_server_decides_at_any_threshold(pipeline, answerer, tmp_path, freezes):
    """Just below, at and above every step: the runtime's decision."""
    if freezes:
        config = GateConfig(
            num_layers=4, hidden_size=32, architecture="compact", freeze_head=True, freeze_threshold=0.6
        )
        gates = GateStack.init(config, 0)
        generator = torch.Generator().manual_seed(3)
        for parameter in gates.parameters():
            torch.nn.init.normal_(parameter, std=0.3, generator=generator)
        gates.save_pretrained(tmp_path / "gates")
        answerer = Answerer.of(pipeline, f"gates:{tmp_path / 'gates'}")
    conversation = Conversation(QUESTION, [[random_image(1)]])
    found = trace_schedules(answerer, conversation)
    assert len(found.path) > 2
    decided = set()
    for at, step in enumerate(found.path):
        known = found.schedules[step.schedule]
        above = found.path[at + 1].level if at + 1 < len(found.path) else 30.0
        below = -30.0 if step.level is None else step.level
        for level in (below + 1e-3 * (above - below), (below + above) / 2):
            schedule = answerer.menu.choose(ScheduleWish(threshold=1 / (1 + math.exp(-level))))
            one = ask(answerer, conversation, schedule=schedule)
            assert (one.report.freeze_layer, one.report.exit_layer) == (known.freeze_layer, known.exit_layer)
            assert one.texts[0] == known.answer
            asked = [p for p in one.report.gate_probabilities if p is not None]
            for p, logit in zip(asked, step.exit_logits):
                assert p == pytest.approx(1 / (1 + math.exp(-logit)), abs=1e-5)
        decided.add((known.freeze_layer, known.exit_layer))
    assert decided & {(k, k) for k in range(5)}
    assert any(f < k for f, k in decided) == freezes


# --- load, and clients that go away ---


def slowly(monkeypatch, seconds=0.05):
    """Every token takes this long."""
    plain = RowGroup.tell_started
    from dyvte.serving.groups import _Step

    call = _Step.__call__

    def slow(self, *args, **kwargs):
        time.sleep(seconds)
        return call(self, *args, **kwargs)

    monkeypatch.setattr(_Step, "__call__", slow)
    return plain


def test_overload_is_refused_with_when_to_come_again(answerer, monkeypatch):
    slowly(monkeypatch)
    body = {"messages": about(QUESTION, random_image(1)), "visual_exit": {"policy": "never"}}
    with (
        serving(answerer, max_rows=1, max_choices=1, max_waiting=2) as small,
        concurrent.futures.ThreadPoolExecutor(8) as pool,
    ):
        found = list(pool.map(lambda _: post(small, body), range(8)))
    statuses = sorted(one.status_code for one in found)
    assert statuses.count(429) >= 4
    assert statuses.count(200) >= 3
    refused = next(one for one in found if one.status_code == 429)
    assert 1 <= int(refused.headers["retry-after"]) <= 60
    assert refused.json()["error"]["code"] == "overloaded"


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_goes_away_frees_its_rows(answerer, monkeypatch, stream):
    slowly(monkeypatch, 0.2)
    body = {
        "messages": about(QUESTION, random_image(1)),
        "stream": stream,
        "visual_exit": {"policy": "never"},
    }
    with serving(answerer) as running:
        where = f"{running.url}/v1/chat/completions"
        if stream:
            with httpx.stream("POST", where, json=body, timeout=60) as reply:
                assert next(reply.iter_lines()).startswith("data: ")
        else:
            with pytest.raises(httpx.ReadTimeout):
                httpx.post(where, json=body, timeout=0.5)
        until = time.monotonic() + 10
        while running.service.scheduler.running_rows and time.monotonic() < until:
            time.sleep(0.02)
        assert running.service.scheduler.running_rows == 0
        done = post(running, {**body, "stream": False})
        assert done.status_code == 200
        assert "dyvte_cancelled_total 1.0" in httpx.get(f"{running.url}/metrics").text


def test_told_to_stop_the_server_finishes_what_it_has_begun(answerer, monkeypatch):
    slowly(monkeypatch, 0.1)
    body = {"messages": about(QUESTION, random_image(1)), "visual_exit": {"policy": "never"}}
    expected = by_hand(answerer, policy="never").texts[0]
    found = []
    with serving(answerer) as running:
        asking = threading.Thread(target=lambda: found.append(post(running, body)))
        asking.start()
        while not running.service.scheduler.running_rows:
            time.sleep(0.01)
    asking.join(30)
    assert found[0].json()["choices"][0]["message"]["content"] == expected
    with pytest.raises(httpx.ConnectError):
        httpx.get(f"{running.url}/health")


def test_a_batch_that_fails_is_tried_again_one_by_one(answerer, monkeypatch):
    plain = RowGroup.go_on

    def failing(self, pause=lambda _: False):
        if any("fixed:2" in job.schedule.text for job in self.jobs):
            raise RuntimeError("out of luck")
        return plain(self, pause)

    monkeypatch.setattr(RowGroup, "go_on", failing)
    messages = about(QUESTION, random_image(1))
    bodies = [
        {"messages": messages, "visual_exit": {"policy": f"fixed:{k}"}} for k in (0, 1, 2, 3, 4, 1, 0, 3)
    ]
    with serving(answerer) as running, concurrent.futures.ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda body: post(running, body), bodies))
    for body, one in zip(bodies, found, strict=True):
        policy = body["visual_exit"]["policy"]
        if policy == "fixed:2":
            assert (one.status_code, one.json()["error"]["code"]) == (500, "internal_error")
            assert "luck" not in one.text, "what went wrong inside is for the log"
        else:
            answer = one.json()["choices"][0]["message"]["content"]
            assert answer == by_hand(answerer, policy=policy).texts[0]


def test_only_this_machines_names_are_answered_to(served):
    wrong = httpx.get(f"{served.url}/health", headers={"host": "evil.example"})
    assert (wrong.status_code, wrong.json()["error"]["code"]) == (421, "wrong_host")
    port = served.url.rpartition(":")[2]
    assert httpx.get(f"{served.url}/health", headers={"host": f"localhost:{port}"}).status_code == 200
    assert httpx.get(f"{served.url}/health", headers={"host": f"[::1]:{port}"}).status_code == 200


def test_streams_tell_errors_with_their_status(served):
    long = {"messages": about("how many " * 1500, random_image(1)), "stream": True}
    found = post(served, long)
    assert (found.status_code, found.json()["error"]["code"]) == (400, "context_length_exceeded")
    assert json.loads(found.content)["error"]["type"] == "invalid_request_error"


def test_image_urls_of_other_forms(served):
    url = data_url(random_image(1), "WEBP")
    for part in ({"url": url, "detail": "high"}, url):
        content = [{"type": "image_url", "image_url": part}, {"type": "text", "text": "what ?"}]
        found = post(served, {"messages": [{"role": "user", "content": content}]})
        assert found.status_code == 200
        assert found.json()["visual_exit"]["visual_tokens"] == 16
