"""The plug-ins inside the harnesses: lmms-eval itself, and a stand-in for VLMEvalKit's interface.

What is expected comes from ``dyvte eval``'s own runner on the same files and model. lmms-eval lives in an
environment of its own, made by ``scripts/test_plugins.sh``.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter
from importlib.metadata import entry_points
from pathlib import Path

import pytest
import yaml

from dyvte.backbones import BackboneConfig
from dyvte.data import load_image
from dyvte.errors import ConfigError
from dyvte.evaluation.generation import answer, encode_questions
from dyvte.evaluation.runner import EvalConfig, evaluate, load_pipeline, prompts_of
from dyvte.evaluation.settings import parse_policies, with_reductions
from dyvte.gates import GateConfig, GateStack
from dyvte.plugins import lmms_tasks
from dyvte.plugins.answering import cut, generation_arguments, plugin_config, stop_texts
from dyvte.tasks.base import Question, get_benchmark
from tests.helpers.fixtures import random_image, write_mini_gqa, write_mini_mme
from tests.helpers.models import tiny_llava

ROOT = Path(__file__).resolve().parents[2]
BACKBONE = ROOT / "checkpoints" / "tiny-llava"
LAYERS = 10
OFFLINE = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}


def run(command, **more):
    env = {**os.environ, **OFFLINE, "OMP_NUM_THREADS": "1", **more}
    done = subprocess.run(
        list(map(str, command)), cwd=ROOT, env=env, capture_output=True, text=True, timeout=1500
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


# What a harness passes


def test_arguments_of_a_harness_are_checked_like_a_configuration():
    config = plugin_config("--model_args", "some/model", policy="fixed:3", batch_size=4, device=None)
    assert (config.model.path, config.policy, config.reduction) == ("some/model", "fixed:3", "none")
    assert (config.batch_size, config.model.image_padding) == (4, "auto")
    with pytest.raises(ConfigError, match=r"--model_args: unknown key 'polcy'; did you mean 'policy'"):
        plugin_config("--model_args", "some/model", polcy="never")
    with pytest.raises(ConfigError, match="batch_size: expected int, found '4'"):
        plugin_config("--model_args", "some/model", batch_size="4")


@pytest.mark.parametrize(
    ("given", "samples", "tokens"),
    [
        ({}, False, 1024),
        (
            {"max_new_tokens": 16, "temperature": 0, "top_p": 1.0, "num_beams": 1, "do_sample": False},
            False,
            16,
        ),
        ({"temperature": 0.0, "do_sample": True}, False, 1024),
        ({"temperature": 0.7, "do_sample": False}, False, 1024),
        ({"temperature": 0.7, "top_p": 0.9}, True, 1024),
        ({"do_sample": True}, True, 1024),
    ],
)
def test_generation_arguments(given, samples, tokens):
    arguments = generation_arguments(given, 1024)
    assert (arguments.get("do_sample", False), arguments["max_new_tokens"]) == (samples, tokens)
    if samples:
        assert arguments["temperature"] == given.get("temperature", 1.0)
        assert arguments["top_p"] == given.get("top_p")
    else:
        assert arguments == {"max_new_tokens": tokens}


def test_generation_arguments_that_cannot_be_followed():
    with pytest.raises(ConfigError, match="num_beams=4"):
        generation_arguments({"num_beams": 4}, 16)
    with pytest.raises(ConfigError, match="at least 1"):
        generation_arguments({"max_new_tokens": -3}, 16)
    with pytest.warns(UserWarning, match="image_aspect_ratio, penalty_alpha"):
        generation_arguments({"penalty_alpha": 1, "image_aspect_ratio": "pad"}, 16)


def test_an_answer_ends_before_the_first_stop_text():
    ends = stop_texts({"until": ["\n\n", "", "ASS"]})
    assert ends == ("\n\n", "ASS")
    assert cut("red ASSISTANT: x\n\ny", ends) == "red "
    assert cut("red\nblue", ends) == "red\nblue"
    assert stop_texts({"until": "stop"}) == ("stop",)
    assert stop_texts({"until": None}) == stop_texts({}) == ()


# VLMEvalKit


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """A random backbone and images of several shapes."""
    root = tmp_path_factory.mktemp("small")
    model, processor = tiny_llava(4, 32)
    model.save_pretrained(root / "model")
    processor.save_pretrained(root / "model")
    for n in range(3):
        random_image(n).resize((16 + 8 * n, 16)).save(root / f"{n}.png")
    return root


def test_vlmevalkit_runs_unmodified_with_our_class(small, tmp_path):
    """Answers and exits are those of the runner, with several images, padding, a policy and a reduction."""
    rows = [
        {"index": 7, "question": "what color is the circle ?", "images": [str(small / "1.png")]},
        {"index": 9, "question": "how many objects ?", "images": [str(small / f"{n}.png") for n in (2, 0)]},
        {"index": 11, "question": "is there a red square ?", "images": []},
    ]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    arguments = {
        "pretrained": str(small / "model"),
        "policy": "fixed:3",
        "reduction": "fastv:1:0.5",
        "image_padding": "square",
        "max_new_tokens": 4,
        "device": "cpu",
        "exits": str(tmp_path / "out" / "exits.jsonl"),
    }
    config = {
        "model": {"ours": {"class": "DyvteVLM", **arguments}},
        "data": {"GQA_local": {"file": str(tmp_path / "rows.json")}},
    }
    (tmp_path / "c.json").write_text(json.dumps(config))
    checkout = ROOT / "tests" / "helpers" / "vlmeval_checkout"
    run(
        [
            *(sys.executable, "-m", "dyvte.plugins.vlmevalkit", checkout / "run.py"),
            *("--config", tmp_path / "c.json", "--work-dir", tmp_path),
        ],
        PYTHONPATH=f"{checkout}{os.pathsep}{ROOT}",
    )
    found = json.loads((tmp_path / "ours_GQA_local.json").read_text())
    exits = [json.loads(line) for line in (tmp_path / "out" / "exits.jsonl").read_text().splitlines()]
    settings = EvalConfig(
        model=BackboneConfig(path=str(small / "model"), image_padding="square", device="cpu"),
        benchmark="gqa",
        data=small,
        output=tmp_path,
        max_new_tokens=4,
    )
    pipeline = load_pipeline(settings)
    policy = with_reductions(parse_policies(("fixed:3",)), ("fastv:1:0.5",))[0]
    for row, exit_row in zip(rows, exits, strict=True):
        first, *others = map(Path, row["images"]) if row["images"] else (None,)
        question = Question(
            id="x",
            image=first,
            more_images=tuple(others),
            text=row["question"],
            answer=None,
            image_id="",
            kind="",
        )
        (expected,) = answer(
            pipeline, encode_questions(pipeline, [question], [question.text]), policy.exits()
        )
        assert found[str(row["index"])] == expected.prediction
        assert exit_row["exit_layer"] == expected.exit_layer == (3 if row["images"] else -1)
        assert exit_row["num_visual"] == expected.num_visual == 16 * len(row["images"])
        assert exit_row["visual_tokens"] == [list(run) for run in expected.visual_tokens]
        assert exit_row["shown"] == [Path(path).name for path in row["images"]]


def test_vlmevalkit_registration_by_name(small, monkeypatch):
    """`register` makes a name that builds the model; a video is refused beside images."""
    for name in [name for name in sys.modules if name.split(".")[0] == "vlmeval"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.delitem(sys.modules, "dyvte.plugins.vlmevalkit", raising=False)
    monkeypatch.syspath_prepend(str(ROOT / "tests" / "helpers" / "vlmeval_checkout"))
    from vlmeval.config import supported_VLM

    from dyvte.errors import DataError
    from dyvte.plugins.vlmevalkit import DyvteVLM, register

    register("dyvte-tiny", str(small / "model"), policy="never", max_new_tokens=2, device="cpu")
    model = supported_VLM["dyvte-tiny"]()
    assert isinstance(model, DyvteVLM)
    picture = {"type": "image", "value": str(small / "0.png")}
    text = {"type": "text", "value": "is there a red square ?"}
    assert len(model.generate([picture, text]).split()) <= 2
    with pytest.raises(DataError, match="expected images or one video, found image, video"):
        model.generate([picture, {"type": "video", "value": str(small / "1.png")}, text])
    with pytest.raises(ConfigError, match="DyvteVLM: unknown key 'gates'"):
        DyvteVLM(str(small / "model"), gates="somewhere")


# lmms-eval


def test_the_entry_point_names_the_manifest():
    """What lmms-eval looks for in the installed package, and what it then finds there."""
    (ours,) = {e.value for e in entry_points(group="lmms_eval.models") if e.name == "dyvte"} or (
        _declared_entry_point(),
    )
    module, _, name = ours.partition(":")
    source = (ROOT / Path(*module.split("."))).with_suffix(".py").read_text(encoding="utf-8")
    assert f"{name} = ModelManifest(" in source
    assert "dyvte.plugins.lmms_model.DyvteChat" in source
    # it is imported at every start of lmms-eval
    assert "import torch" not in source
    assert "from dyvte" not in source


def _declared_entry_point() -> str:
    """From pyproject.toml, where the installation is older than the entry point."""
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    return text.split('[project.entry-points."lmms_eval.models"]\ndyvte = "', 1)[1].split('"', 1)[0]


@pytest.mark.parametrize("name", ["gqa", "mme"])
def test_local_tasks_ask_and_generate_as_dyvte_eval_does(name):
    """The suffix is the benchmark's own, 16 tokens, no stop text that the runner has not."""

    class Loader(yaml.SafeLoader):
        pass

    Loader.add_constructor("!function", lambda loader, node: loader.construct_scalar(node))
    folder = ROOT / "configs" / "lmms_tasks"
    task = yaml.load((folder / f"{name}_local.yaml").read_text(), Loader)  # noqa: S506 a SafeLoader
    assert task["lmms_eval_specific_kwargs"]["default"]["post_prompt"] == get_benchmark(name).suffix
    generation = task["generation_kwargs"]
    assert generation["max_new_tokens"] == get_benchmark(name).max_new_tokens
    assert (generation["until"], generation["do_sample"]) == ([], False)
    scenes = yaml.load((folder / f"{name}_scenes.yaml").read_text(), Loader)  # noqa: S506 a SafeLoader
    embedded = yaml.safe_load((ROOT / "configs" / "eval_embedded.yaml").read_text())
    assert scenes["lmms_eval_specific_kwargs"]["default"]["post_prompt"] == embedded["question_suffix"]
    assert scenes["generation_kwargs"]["max_new_tokens"] == embedded["max_new_tokens"]
    (split,) = task["dataset_kwargs"]["data_files"].values()
    assert (folder / split).is_file()


def test_local_tasks_show_the_runners_questions(tmp_path, monkeypatch):
    """Prompts, images and pairs of the release layout; a folder that is not named is asked for."""
    docs = {"gqa": lmms_tasks.gqa_docs, "mme": lmms_tasks.mme_docs}
    for name, write in (("gqa", write_mini_gqa), ("mme", write_mini_mme)):
        monkeypatch.delenv(f"DYVTE_{name.upper()}", raising=False)
        with pytest.raises(ConfigError, match=f"DYVTE_{name.upper()} is not set"):
            docs[name](None)
        monkeypatch.setenv(f"DYVTE_{name.upper()}", str(write(tmp_path / name)))
        benchmark = get_benchmark(name)
        questions = benchmark.load(tmp_path / name)
        rows = list(docs[name](None))
        assert [row["id"] for row in rows] == [question.id for question in questions]
        assert [row["answer"] for row in rows] == [question.answer for question in questions]
        for suffix in (None, "", " Briefly."):
            asked = {"post_prompt": benchmark.suffix if suffix is None else suffix}
            texts = [lmms_tasks.text(row, asked) for row in rows]
            assert texts == prompts_of(benchmark, questions, suffix)
        (shown,) = lmms_tasks.visual(rows[1])
        assert shown.tobytes() == load_image(questions[1].image).tobytes()
    # lmms-eval's MME pairs by question_id within a category
    pairs = Counter((row["category"], row["question_id"]) for row in rows)
    assert set(pairs.values()) == {2}
    assert len(pairs) == len(rows) // 2


@pytest.fixture(scope="module")
def plugins_python():
    """An environment with lmms-eval in it."""
    script = ROOT / "scripts" / "test_plugins.sh"
    done = subprocess.run(["bash", script, "--environment"], capture_output=True, text=True, timeout=3000)
    if done.returncode == 3:
        pytest.skip(f"lmms-eval cannot be installed here: {done.stderr.strip().splitlines()[-1]}")
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout.strip().splitlines()[-1]


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    root = tmp_path_factory.mktemp("scenes")
    sizes = [f"--{split}=8" for split in ("train", "calibration", "validation", "test")]
    run([sys.executable, "-m", "dyvte.data.scenes", "--output", root, *sizes, "--gqa=60", "--mme=4"])
    gates = GateStack.init(GateConfig(num_layers=LAYERS, hidden_size=_hidden_size(), threshold=0.5), seed=3)
    gates.save_pretrained(root / "gates")
    return root


def _hidden_size() -> int:
    config = json.loads((BACKBONE / "config.json").read_text())
    assert config["text_config"]["num_hidden_layers"] == LAYERS
    return config["text_config"]["hidden_size"]


@pytest.mark.full
@pytest.mark.parametrize(
    ("policy", "reduction", "batch_size"),
    [("gates", "fastv:2:0.5", 8), ("fixed:3", "none", 1)],
)
def test_lmms_eval_scores_are_the_runners(policy, reduction, batch_size, plugins_python, scenes, tmp_path):
    """`lmms-eval --model dyvte` as a user runs it: every answer, both scores and every exit."""
    policy = f"gates:{scenes / 'gates'}" if policy == "gates" else policy
    model_args = (
        f"pretrained={BACKBONE},policy={policy},reduction={reduction},exits={tmp_path / 'exits.jsonl'}"
    )
    run(
        [
            *(plugins_python, "-m", "lmms_eval", "--model", "dyvte", "--model_args", model_args),
            *("--tasks", "gqa_scenes,mme_scenes", "--include_path", ROOT / "configs" / "lmms_tasks"),
            *("--batch_size", batch_size, "--device", "cpu", "--verbosity", "DEBUG"),
            *("--log_samples", "--output_path", tmp_path / "out"),
        ],
        DYVTE_GQA=str(scenes / "mini_gqa"),
        DYVTE_MME=str(scenes / "mini_mme"),
        HF_HOME=str(tmp_path / "hub"),
    )
    (results,) = (tmp_path / "out").rglob("*_results.json")
    figures = json.loads(results.read_text())["results"]
    exits = [json.loads(line) for line in (tmp_path / "exits.jsonl").read_text().splitlines()]
    right = {}
    for name in ("gqa", "mme"):
        (ours,) = evaluate(
            EvalConfig(
                model=BackboneConfig(path=str(BACKBONE), device="cpu"),
                benchmark=name,
                data=scenes / f"mini_{name}",
                output=tmp_path / name,
                policies=(policy,),
                reductions=(reduction,),
                dialect="lmms",
                question_suffix="",
                batch_size=batch_size,
                max_new_tokens=8,
                timing_batches=0,
            )
        )
        (file,) = (tmp_path / "out").rglob(f"*_samples_{name}_scenes.jsonl")
        samples = sorted(map(json.loads, file.read_text().splitlines()), key=lambda one: one["doc_id"])
        assert [one["filtered_resps"] for one in samples] == [one.prediction for one in ours.answers]
        rows = [row for row in exits if row["task"] == f"{name}_scenes"]
        assert [row["doc_id"] for row in rows] == [one["doc_id"] for one in samples]
        assert [row["exit_layer"] for row in rows] == [one.exit_layer for one in ours.answers]
        assert [row["question_id"] for row in rows] == [one.question_id for one in ours.answers]
        right[name] = ours.scores.scores
    assert len({row["exit_layer"] for row in exits}) > 1 or policy == "fixed:3"
    accuracy = figures["gqa_scenes"]["exact_match,none"]
    assert 0 < accuracy < 1
    assert accuracy == pytest.approx(right["gqa"]["accuracy"] / 100, abs=1e-9)
    for part in ("perception", "cognition"):
        score = figures["mme_scenes"][f"mme_{part}_score,none"]
        assert score == pytest.approx(right["mme"][part], abs=1e-6)


@pytest.mark.full
def test_the_lmms_eval_model_serves_what_tasks_ask(plugins_python, scenes, tmp_path):
    """Several images, conversations, stop texts, lengths, sampling; what is refused; nothing left behind."""
    script = ROOT / "tests" / "helpers" / "lmms_checks.py"
    images = scenes / "mini_gqa" / "images"
    found = json.loads(
        run([plugins_python, script, BACKBONE, images, tmp_path / "exits.jsonl"]).splitlines()[-1]
    )
    answers = found["answers"]
    assert answers == found["one_by_one"]
    assert len(set(answers)) > 1
    assert found["left_behind"] == []
    stop = answers[0][1:3]
    assert found["stopped"] == answers[0][: answers[0].index(stop)]
    short = [one.split()[:1] if n % 2 == 0 else one.split() for n, one in enumerate(answers)]
    assert [one.split() for one in found["shorter"]] == short
    assert short != [one.split() for one in answers]
    assert len(set(found["sampled"])) > 1
    assert found["warned"] == ["generation arguments that dyvte does not use: length_penalty"]
    assert "num_beams=3" in found["beams"]
    assert "found ['system', 'user']" in found["system"]
    assert "did you mean 'policy'" in found["unknown"]
    assert "exit layer 99" in found["deep"]
    assert "expected a number" in found["batch"]
    rows = [json.loads(line) for line in (tmp_path / "exits.jsonl").read_text().splitlines()]
    per_image = rows[0]["num_visual"]
    assert [row["num_visual"] // per_image for row in rows[:6]] == [1, 2, 0, 1, 1, 1]
    assert [row["exit_layer"] for row in rows[:6]] == [6, 6, -1, 6, 6, 6]
