"""VLMEvalKit's model ``DyvteVLM``: a stand-in for the interface, and VLMEvalKit itself.

What is expected comes from ``dyvte eval``'s own runner on the same files and model. VLMEvalKit lives in an
environment of its own, made by ``scripts/test_plugins.sh vlmeval``.
"""

from __future__ import annotations

import csv
import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest

from dyvte.backbones import BackboneConfig
from dyvte.errors import ConfigError
from dyvte.evaluation.generation import answer, encode_questions
from dyvte.evaluation.runner import EvalConfig, evaluate, load_pipeline
from dyvte.evaluation.settings import parse_policies, with_reductions
from dyvte.plugins.exits_file import ExitsFile
from dyvte.tasks.base import Question, get_benchmark
from tests.helpers.models import random_image, tiny_llava
from tests.helpers.scene_tables import write_tables
from tests.helpers.tool_runs import BACKBONE, ROOT, run, tool_python

CHECKOUT = ROOT / "tests" / "helpers" / "vlmeval_checkout"


def read_rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def ask_stand_in(folder, more):
    run(
        [
            *(sys.executable, "-m", "dyvte.plugins.vlmevalkit", CHECKOUT / "run.py"),
            *("--config", folder / "c.json", "--work-dir", folder, *more),
        ],
        PYTHONPATH=f"{CHECKOUT}{os.pathsep}{ROOT}",
    )


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
    for more in (["--limit", "2", "--use-vllm"], []):  # the second run asks only what the first left
        ask_stand_in(tmp_path, more)
    found = json.loads((tmp_path / "ours_GQA_local.json").read_text())
    exits = read_rows(tmp_path / "out" / "exits.jsonl")
    assert [(row["dataset"], row["index"]) for row in exits] == [("GQA_local", n) for n in (7, 9, 11)]
    assert [row["question_id"] for row in exits] == ["GQA_local/7", "GQA_local/9", "GQA_local/11"]
    assert {(row["policy"], row["reduction"]) for row in exits} == {("fixed:3", "fastv:1:0.5")}
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


@pytest.fixture
def plugin(monkeypatch):
    """`dyvte.plugins.vlmevalkit` over the stand-in."""
    for name in [name for name in sys.modules if name.split(".")[0] == "vlmeval"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.delitem(sys.modules, "dyvte.plugins.vlmevalkit", raising=False)
    monkeypatch.syspath_prepend(str(CHECKOUT))
    from dyvte.plugins import vlmevalkit

    return vlmevalkit


class Rows:
    """A data set of the stand-in's kind."""

    def __init__(self, name, image, indices):
        self.dataset_name, self.image = name, image
        self.data = [{"index": index, "question": "is there a red square ?"} for index in indices]

    def dump_image(self, line):
        return [self.image]

    def build_prompt(self, line):
        shown = {"type": "image", "value": self.dump_image(line)[0]}
        return [shown, {"type": "text", "value": line["question"]}]


def test_registration_by_name(small, plugin):
    """`register` makes a name that builds the model; a video is refused beside images."""
    from vlmeval.config import supported_VLM

    from dyvte.errors import DataError

    plugin.register("dyvte-tiny", str(small / "model"), policy="never", max_new_tokens=2, device="cpu")
    model = supported_VLM["dyvte-tiny"]()
    assert isinstance(model, plugin.DyvteVLM)
    picture = {"type": "image", "value": str(small / "0.png")}
    text = {"type": "text", "value": "is there a red square ?"}
    assert not model.use_custom_prompt("GQA_local")  # no data set has been handed over
    assert len(model.generate([picture, text]).split()) <= 2
    with pytest.raises(DataError, match="expected images or one video, found image, video"):
        model.generate([picture, {"type": "video", "value": str(small / "1.png")}, text])
    with pytest.raises(ConfigError, match="DyvteVLM: unknown key 'gates'"):
        plugin.DyvteVLM(str(small / "model"), gates="somewhere")


def test_an_oracle_names_the_tables_rows(small, plugin, tmp_path, monkeypatch):
    """Ids hold data set and index; a name with Llama-4 brings use_vllm; each process has its own file."""
    from vlmeval.inference import infer_data_job

    layers = {"MME_a/4": 1, "MME_a/x": 2, "MME_b/4": 3}
    (tmp_path / "oracle.json").write_text(json.dumps(layers))
    monkeypatch.setenv("RANK", "2")
    arguments = {"policy": f"oracle:{tmp_path / 'oracle.json'}", "exits": str(tmp_path / "e.jsonl")}
    plugin.register("my-Llama-4", str(small / "model"), **arguments, max_new_tokens=1, device="cpu")
    model = "my-Llama-4"
    for name, indices in (("MME_a", [4, "x"]), ("MME_b", [4])):
        model = infer_data_job(model, tmp_path, "my-Llama-4", Rows(name, str(small / "0.png"), indices))
    rows = read_rows(tmp_path / "e.2.jsonl")
    assert {row["question_id"]: row["exit_layer"] for row in rows} == layers
    assert not (tmp_path / "e.jsonl").exists()
    with pytest.warns(UserWarning, match="DyvteVLM answers with transformers"):
        plugin.DyvteVLM(str(small / "model"), use_vllm=True, device="cpu")


def test_a_file_of_exits_is_continued(tmp_path):
    """Of a question answered again the last row stays; a cut line goes; other settings are refused."""
    path = tmp_path / "exits.jsonl"
    rows = [
        {"dataset": "a", "index": 1, "policy": "never", "exit_layer": 4},
        {"dataset": "a", "index": None, "policy": "never", "exit_layer": 4},
        {"dataset": "b", "index": 1, "policy": "never", "exit_layer": 3},
        {"dataset": "a", "index": None, "policy": "never", "exit_layer": 2},
        {"dataset": "a", "index": 1, "policy": "never", "exit_layer": 1},
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"dataset": "a", "ind')
    key = ("dataset", "index")
    ExitsFile(path, 0, key, {"policy": "never"})
    assert [row["exit_layer"] for row in read_rows(path)] == [1, 4, 3, 2]
    with pytest.raises(ConfigError, match="holds rows of policy 'never', now 'fixed:3'"):
        ExitsFile(path, 0, key, {"policy": "fixed:3"})
    path.write_text('{"dataset": "a", "question": "is it ?"}\n')
    with pytest.raises(ConfigError, match="expected rows with dataset, index"):
        ExitsFile(path, 0, key, {})


@pytest.fixture(scope="module")
def vlmeval_python():
    """An environment with VLMEvalKit in it."""
    return tool_python("vlmeval")


@pytest.mark.full
def test_vlmevalkit_scores_are_the_runners(vlmeval_python, scenes, tmp_path):
    """VLMEvalKit's own run module, resumed and reused: every answer, all scores and every exit."""
    tables = write_tables(scenes, tmp_path / "data")
    policy, reduction = f"gates:{scenes / 'gates'}", "fastv:2:0.5"
    model = {
        "class": "DyvteVLM",
        "pretrained": str(BACKBONE),
        "policy": policy,
        "reduction": reduction,
        "max_new_tokens": 8,
        "device": "cpu",
        "exits": str(tmp_path / "exits.jsonl"),
    }
    data = {
        "GQA_scenes": {"class": "ImageVQADataset", "dataset": "GQA_scenes"},
        "MME_scenes": {"class": "ImageYORNDataset", "dataset": "MME_scenes"},
    }
    (tmp_path / "c.json").write_text(json.dumps({"model": {"tiny-Qwen2-VL": model}, "data": data}))
    command = [
        *(vlmeval_python, "-m", "dyvte.plugins.vlmevalkit", "--config", tmp_path / "c.json"),
        *("--work-dir", tmp_path / "out", "--judge", "exact_matching"),
    ]
    variables = {"LMUData": str(tmp_path / "data"), "PRED_FORMAT": "tsv", "EVAL_FORMAT": "csv"}
    run([*command, "--use-vllm", "--limit", "13", "--mode", "infer"], **variables)
    asked = read_rows(tmp_path / "exits.jsonl")
    assert len(asked) == 26
    for _ in range(2):  # goes on with the others; has all answers
        run([*command, "--reuse"], **variables)
    exits = read_rows(tmp_path / "exits.jsonl")
    assert exits[:26] == asked
    assert len({row["exit_layer"] for row in exits}) > 1
    for name, suffix in (("gqa", None), ("mme", " Please answer yes or no.")):
        (ours,) = evaluate(
            EvalConfig(
                model=BackboneConfig(path=str(BACKBONE), device="cpu"),
                benchmark=name,
                data=tables[name],
                output=tmp_path / name,
                policies=(policy,),
                reductions=(reduction,),
                dialect="vlmevalkit",
                question_suffix=suffix,
                batch_size=1,
                max_new_tokens=8,
                timing_batches=0,
            )
        )
        dataset = tables[name].stem
        folder = tmp_path / "out" / "tiny-Qwen2-VL"
        predictions = read_table(folder / f"tiny-Qwen2-VL_{dataset}.tsv", "\t")
        assert [row["prediction"] for row in predictions] == [one.prediction for one in ours.answers]
        rows = {row["index"]: row for row in exits if row["dataset"] == dataset}
        assert list(rows) == [int(one.question_id) for one in ours.answers]
        for one, row in zip(ours.answers, rows.values(), strict=True):
            assert row["exit_layer"] == one.exit_layer
            assert row["question_id"] == f"{dataset}/{one.question_id}"
            assert row["visual_tokens"] == [list(run) for run in one.visual_tokens]
        check_scores(name, folder, ours.scores.scores)
    assert len(exits) == sum(len(get_benchmark(name).load(path)) for name, path in tables.items())


def read_table(path, delimiter):
    with path.open(encoding="utf-8", newline="") as stream:
        return list(csv.DictReader(stream, delimiter=delimiter))


def check_scores(name, folder, scores):
    if name == "gqa":
        (row,) = read_table(folder / "tiny-Qwen2-VL_GQA_scenes_acc.csv", ",")
        assert 0 < scores["accuracy"] < 100
        assert float(row["Overall"]) == pytest.approx(scores["accuracy"])
        return
    (row,) = read_table(folder / "tiny-Qwen2-VL_MME_scenes_score.csv", ",")
    assert float(row["perception"]) == pytest.approx(scores["perception"])
    assert float(row["reasoning"]) == pytest.approx(scores["cognition"])
    for subtask, found in scores["per_subtask"].items():
        assert float(row[subtask]) == pytest.approx(found["score"])
