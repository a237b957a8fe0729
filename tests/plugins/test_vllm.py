"""The plug-in inside vLLM itself: answers, log-probabilities and schedules are those of dyvte's own runtime.

vLLM lives in an environment of its own, made by ``scripts/test_plugins.sh vllm``. Engines are dear to start:
all run in one process (`tests.helpers.vllm_checks`), and what came of them is looked at here.
"""

from __future__ import annotations

import base64
import json
import math
import os
import re
import signal
import subprocess
import time
import urllib.request
from pathlib import Path

import pytest

from tests.helpers.tool_runs import OFFLINE, ROOT, run, tool_python

pytestmark = pytest.mark.full

SMALL = {
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_NO_USAGE_STATS": "1",
    "DO_NOT_TRACK": "1",
}
FAMILIES = ("llava", "llava_next", "qwen2_vl", "qwen2_5_vl", "qwen3_vl", "internvl")
POLICIES = ("never", "freeze:1", "fixed:2", "freeze:1:3", "gates:")
EXACT = [
    *("never", "freeze:0", "freeze:2", "freeze:5", "fixed:0", "fixed:3", "fixed:5", "freeze:2:5"),
    *("gates", "gates, two heads", "chunks, cached prefixes", "chunks, exits"),
    *("preempted, freeze", "preempted, exits", "preempted, gates"),
    *("all the memory", "text alone in memory", "text alone, preempted", "text alone, chunks"),
    *(f"{family}, {policy}" for family in FAMILIES for policy in POLICIES),
    *("gates of their backbone", "gates of other weights, allowed", "compiled"),
]
REFUSED = {
    "gates of other weights": "these gates were made for own (weights ",
    "gates of another shape": "these gates are for 10 layers of hidden size 144, the backbone has 4 layers",
    "too deep": "exit layer 11: expected 0..10",
    "unknown setting": "unknown key 'polcy'; did you mean 'policy'",
    "two in a pipeline": "policy fixed:3 inside vLLM cannot go together with pipeline parallelism",
    "memory for gates": "it is for a fixed exit after layer 1..9 alone",
}


@pytest.fixture(scope="module")
def python():
    """An environment with vLLM in it."""
    return tool_python("vllm")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("vllm")


@pytest.fixture(scope="module")
def found(python, scenes, folder):
    """What came of every engine."""
    script = ROOT / "tests" / "helpers" / "vllm_checks.py"
    run(
        [python, script, scenes, folder],
        seconds=3600,
        **SMALL,
        PYTHONPATH=str(ROOT),
        VLLM_ENABLE_V1_MULTIPROCESSING="0",
        VLLM_LOGGING_LEVEL="ERROR",
    )
    return json.loads((folder / "found.json").read_text())


def test_nothing_is_left_out(found):
    assert set(found) == {*EXACT, *REFUSED}


@pytest.mark.parametrize("name", EXACT)
def test_answers_are_those_of_the_runtime(name, found):
    one = found[name]
    assert "refused" not in one, one
    assert one["equal"] == one["asked"] >= 4
    assert one["largest_difference"] < 1e-4
    if not name.endswith("never"):
        assert one["schedules"] == one["schedules_wanted"]


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_refused_says_why(name, found):
    assert REFUSED[name] in found[name]["refused"]


def test_the_cases_are_what_they_are_named_for(found):
    """Requests of one batch have their own layers; prefixes were cached; requests were preempted."""
    assert found["chunks, cached prefixes"]["cached_tokens"] > 0
    assert found["chunks, exits"]["cached_tokens"] == 0
    for name in ("preempted, freeze", "preempted, exits", "preempted, gates", "text alone, preempted"):
        assert found[name]["preemptions"] > 0
    schedules = list(found["gates, two heads"]["schedules"].values())
    assert len(set(map(tuple, schedules))) > 3
    assert any(freeze < leave < 10 for freeze, leave in schedules)
    assert len({leave for _, leave in found["gates"]["schedules"].values()}) > 2
    different = [found[name]["answers"] for name in ("never", "fixed:3", "freeze:0")]
    assert any(a["tokens"] != b["tokens"] for a, b in zip(different[0], different[1], strict=False))


def test_a_fixed_exit_frees_memory(found):
    """Behind the exit no block is taken for an image."""
    whole, text = found["all the memory"], found["text alone in memory"]
    assert whole["groups"] == [["FullAttentionSpec", 10]]
    kinds = [kind for kind, _ in text["groups"]]
    assert sum(layers for kind, layers in text["groups"] if kind == "TextOnlySpec") == 7
    assert kinds.count("FullAttentionSpec") == 1
    # a block of a group holds as many bytes as the group has layers
    per_block = max(layers for _, layers in text["groups"])
    assert text["most_blocks"] * per_block < 0.7 * whole["most_blocks"] * 10


def test_a_server_in_processes_of_its_own(python, scenes, folder, found, tmp_path):
    """``vllm serve`` by the entry points: answers, the log, and the counters under /metrics."""
    counters = tmp_path / "counters"
    counters.mkdir()
    model = folder / "embedded"
    log = (tmp_path / "log").open("w+")
    port = 8000 + os.getpid() % 2000
    command = [
        *(python, "-m", "vllm.entrypoints.openai.api_server", "--model", model, "--port", port),
        *("--host", "127.0.0.1", "--dtype", "float32", "--enforce-eager", "--max-model-len", "256"),
        *("--hf-overrides", json.dumps({"architectures": ["DyvteLlavaForConditionalGeneration"]})),
        *("--additional-config", json.dumps({"dyvte": {"policy": "fixed:3"}})),
    ]
    env = {**os.environ, **OFFLINE, **SMALL, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    env["PROMETHEUS_MULTIPROC_DIR"] = str(counters)
    server = subprocess.Popen(
        list(map(str, command)),
        cwd=ROOT,
        env=env,
        stdout=log,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )
    try:
        wait_for(f"http://127.0.0.1:{port}/health", server, 600)
        texts = [ask(port, model, *one, number) for number, one in enumerate(asked_of(scenes, 6))]
        metrics = urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=60).read().decode()
    finally:
        os.killpg(server.pid, signal.SIGINT)
        server.wait(60)
    words = json.loads((model / "tokenizer.json").read_text())["model"]["vocab"]
    names = {number: word for word, number in words.items()}
    wanted = [[names[t] for t in one["tokens"]] for one in found["fixed:3"]["answers"][:6]]
    assert [text.split() for text in texts] == [[w for w in one if w != "</s>"] for one in wanted]
    log.seek(0)
    assert len(re.findall(r"prompt q\d of \d+ tokens, 64 visual: updated in layers 1..3", log.read())) == 6
    assert re.search(r'dyvte:prompts_total\{exit_layer="3",freeze_layer="3"\} 6.0', metrics)
    assert not math.isnan(float(re.search(r'visual_token_layers_total\{state="gone"\} (\S+)', metrics)[1]))


def asked_of(scenes: Path, count: int):
    """(question, image) as the other engines were asked."""
    entries = json.loads((scenes / "mini_gqa" / "testdev_balanced_questions.json").read_text())
    images = scenes / "mini_gqa" / "images"
    return [(e["question"], next(images.glob(e["imageId"] + ".*"))) for e in list(entries.values())[:count]]


def ask(port, model, question, image, number):
    picture = "data:image/png;base64," + base64.b64encode(image.read_bytes()).decode()
    content = [{"type": "image_url", "image_url": {"url": picture}}, {"type": "text", "text": question}]
    body = {
        "model": str(model),
        "temperature": 0,
        "max_tokens": 8,
        "vllm_xargs": {"dyvte_id": f"q{number}"},
        "messages": [{"role": "user", "content": content}],
    }
    request = urllib.request.Request(
        f"http://127.0.0.1:{port}/v1/chat/completions",
        json.dumps(body).encode(),
        {"Content-Type": "application/json"},
    )
    reply = json.load(urllib.request.urlopen(request, timeout=120))
    return reply["choices"][0]["message"]["content"]


def wait_for(url, server, seconds):
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        assert server.poll() is None, "the server ended"
        try:
            urllib.request.urlopen(url, timeout=5)
            return
        except OSError:
            time.sleep(1)
    raise AssertionError("the server did not start")
