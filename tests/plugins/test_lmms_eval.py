"""lmms-eval's model ``dyvte``, inside lmms-eval itself.

What is expected comes from ``dyvte eval``'s own runner on the same files and model. lmms-eval lives in an
environment of its own, made by ``scripts/test_plugins.sh``.
"""

from __future__ import annotations

import json
from collections import Counter
from importlib.metadata import entry_points
from pathlib import Path

import pytest
import yaml

from dyvte.backbones import BackboneConfig
from dyvte.data import load_image
from dyvte.errors import ConfigError
from dyvte.evaluation.runner import EvalConfig, evaluate, prompts_of
from dyvte.plugins import lmms_tasks
from dyvte.tasks.base import get_benchmark
from tests.helpers.fixtures import write_mini_gqa, write_mini_mme
from tests.helpers.tool_runs import BACKBONE, ROOT, run, tool_python


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
    return tool_python("lmms-eval")


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
