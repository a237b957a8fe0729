"""``dyvte eval`` and ``dyvte score`` on every benchmark, with a tiny random model and mini files."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest
from transformers import SamModel

from dyvte.backbones.segmenter import Segmenter
from dyvte.cli import main
from dyvte.evaluation.masks import FOLDER
from dyvte.tasks.base import TASKS, get_benchmark
from tests.backbones.test_lisa import sam_config
from tests.helpers.benchmark_files import CASES, write_benchmark
from tests.helpers.models import tiny_llava

ROOT = Path(__file__).resolve().parents[2]
QUICK = {("mmmu", "parquet"), ("videomme", "tsv"), ("mmvet", "release")}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    backbone, processor = tiny_llava(4, 32)
    backbone.save_pretrained(folder)
    processor.save_pretrained(folder)
    Segmenter(SamModel(sam_config()), 32, None).save(folder / FOLDER)  # of the tasks that ask for masks
    return folder


@pytest.mark.parametrize(
    ("name", "form"), [pytest.param(*c, marks=[] if c in QUICK else pytest.mark.full) for c in CASES]
)
def test_eval_then_score(tmp_path, capsys, model, name, form):
    data = write_benchmark(tmp_path / "data", name, form)
    options = ["--policy", "never", "--policy", "fixed:2", "--max-new-tokens", "3", "--batch-size", "4"]
    more = ["--timing-batches", "0", "--set", "num_frames=3"]
    command = ["eval", "--model", model, "--benchmark", name, "--data", data, "--output", tmp_path / "out"]
    assert main([str(part) for part in [*command, *options, *more]]) == 0, capsys.readouterr().err
    benchmark = get_benchmark(name)
    questions = benchmark.load(data)
    capsys.readouterr()
    for policy in ("never", "fixed-2"):
        folder = tmp_path / "out" / policy
        result = json.loads((folder / "scores.json").read_text())
        predictions = folder / "predictions.jsonl"
        assert set(benchmark.read_predictions(predictions, questions).texts) == {q.id for q in questions}
        assert any(benchmark.submission_name in path.name for path in folder.iterdir()) or name in (
            "gqa",
            "mme",
        )
        exits = [json.loads(line) for line in (folder / "exits.jsonl").read_text().splitlines()]
        pictures = 3 if questions[0].video else None
        for question, row in zip(questions, exits, strict=True):
            assert row["question_id"] == question.id
            assert row["num_visual"] == 16 * (pictures or len(question.images))
            assert row["exit_layer"] == (4 if policy == "never" else 2)
        score = ["score", name, "--data", str(data), "--predictions", str(predictions), "--dialect", "all"]
        out = tmp_path / f"{policy}.json"
        code = main([*score, "--output", str(out)])
        if result["scores"].get("graded") is False:
            assert code == 2
            assert "no score can be given" in capsys.readouterr().err
            code = main([*score, "--output", str(out), "--submission", str(tmp_path / "submission")])
            assert list((tmp_path / "submission").iterdir())
        assert code == 0
        scored = json.loads(out.read_text())
        assert tuple(scored) == benchmark.dialects
        assert scored["original"] == result["scores"]


def test_help_lists_every_benchmark(capsys):
    for command in ("eval", "score"):
        with pytest.raises(SystemExit):
            main([command, "--help"])
        text = capsys.readouterr().out
        assert all(name in text for name in TASKS)


def _run_script(*arguments):
    command = ["bash", str(ROOT / "scripts" / "eval" / "run.sh"), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=60)


def test_one_script_serves_every_benchmark(tmp_path):
    for arguments in ((), ("pope",)):
        done = _run_script(*arguments)
        assert done.returncode == 2
        assert "run.sh pope --model" in done.stderr
    done = _run_script("popee", "--model", "x", "--data", tmp_path, "--output", tmp_path / "out")
    assert done.returncode == 2
    assert "did you mean 'pope'" in done.stderr
    scripts = ROOT / "scripts" / "eval"
    assert sorted(path.name for path in scripts.iterdir()) == ["gqa.sh", "mme.sh", "run.sh"]
    for name in ("gqa", "mme"):
        assert f'run.sh" {name} "$@"' in (scripts / f"{name}.sh").read_text()


def test_docs_have_a_row_for_each_benchmark():
    text = (ROOT / "docs" / "benchmarks.md").read_text(encoding="utf-8")
    assert all(f"| `{name}` |" in text for name in TASKS)
