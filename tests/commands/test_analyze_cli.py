"""``dyvte analyze`` from the command line, on a tiny model and on the embedded backbone."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from dyvte.analysis import STUDIES
from dyvte.cli import main
from dyvte.data.scenes.writers import write_all
from tests.helpers.world import World

ROOT = Path(__file__).resolve().parents[2]


WORLD = World(gqa=(6, 3))


def _options(world, output, *more):
    return [
        *("--model", str(world / "backbone"), "--benchmark", "gqa", "--data", str(world / "gqa")),
        *("--output", str(output), "--question-suffix", "", "--max-new-tokens", "3"),
        *("--samples", "3", *more),
    ]


def test_list_names_every_study(capsys):
    with pytest.raises(SystemExit) as left:
        main(["analyze", "--list"])
    assert left.value.code == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == list(STUDIES)
    assert all(source in line for line, (source, _) in zip(lines, STUDIES.values(), strict=True))


def test_studies_write_numbers_table_and_plot_and_share_their_runs(world, tmp_path, capsys):
    names = ["positions", "layers", "text_to_vision"]
    assert main(["analyze", *_options(world, tmp_path, "--layers", "2", "4", "--layer", "2"), *names]) == 0
    printed = capsys.readouterr().out
    for name in names:
        record = json.loads((tmp_path / f"{name}.json").read_text())
        assert record["source"] == STUDIES[name][0]
        assert record["about"]["questions"] == 6
        table = (tmp_path / f"{name}.md").read_text()
        assert record["definition"] in table
        assert f"]({name}.png)" in table
        assert (tmp_path / f"{name}.png").read_bytes().startswith(b"\x89PNG")
        assert "<svg" in (tmp_path / f"{name}.svg").read_text()
        assert record["title"] in printed
    layers = json.loads((tmp_path / "layers.json").read_text())["metrics"]["curve"]
    positions = json.loads((tmp_path / "positions.json").read_text())["metrics"]["rows"]
    assert [point["k"] for point in layers] == [2, 4]
    assert layers[0]["same_answer"] == positions["keep"]["same_answer"]
    # One run for K = 2, whoever asked for it.
    assert sorted(p.name for p in (tmp_path / "runs").iterdir()) == ["fixed-2", "fixed-2-rearrange", "never"]


def test_what_cannot_be_asked_is_excluded_with_its_image(world, tmp_path, capsys):
    shutil.copytree(world / "gqa", tmp_path / "gqa")
    torn = tmp_path / "gqa" / "images" / "1.png"  # of two of the six questions
    torn.write_bytes(torn.read_bytes()[:-300])
    options = _options(world, tmp_path / "out", "--layers", "2", "--data", str(tmp_path / "gqa"))
    assert main(["analyze", *options, "layers"]) == 2
    assert "2 of 6 questions cannot be asked, 0 allowed" in capsys.readouterr().err
    assert main(["analyze", *options, "--max-bad-samples", "2", "layers"]) == 0
    about = json.loads((tmp_path / "out" / "layers.json").read_text())["about"]
    assert about["questions"] == 4
    assert len(about["unaskable"]) == 2


def test_all_omits_by_name_what_lacks_its_option(world, tmp_path, capsys, monkeypatch):
    import dyvte.analysis as analysis

    done = []

    def pretend(name):
        def study(subject):
            done.append(name)
            return analysis.Findings("t", "d", {}, analysis.Table(["a"], [["1"]]), lambda figure: None)

        return study

    monkeypatch.setattr(analysis, "get_study", pretend)
    assert main(["analyze", "all", *_options(world, tmp_path)]) == 0
    printed = capsys.readouterr().out
    without = {"exits", "transfer", "gate_inputs", "shift"}
    assert done == [name for name in STUDIES if name not in without]
    assert all(f"omitted: {name} needs --" in printed for name in without)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["migratoin"], "did you mean 'migration'"),
        (["exits"], "--gates"),
        (["layers", "--layers", "9"], "expected 0..4"),
        (["eta", "--eta", "0"], "positive"),
    ],
)
def test_what_is_wrong_is_said(world, tmp_path, capsys, arguments, message):
    assert main(["analyze", *arguments, *_options(world, tmp_path)]) == 2
    assert message in capsys.readouterr().err


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    """A few questions of the synthetic scenes, as the quickstart makes them."""
    root = tmp_path_factory.mktemp("scenes")
    write_all(root, {"train": 4, "calibration": 1, "validation": 1, "test": 1, "gqa": 24, "mme": 1}, 0)
    return root


def _embedded(scenes, output, *studies):
    options = ["--config", str(ROOT / "configs" / "eval_embedded.yaml"), "--data", str(scenes / "mini_gqa")]
    assert main(["analyze", *studies, *options, "--samples", "4", "--output", str(output)]) == 0
    return {name: json.loads((output / f"{name}.json").read_text())["metrics"] for name in studies}


def test_embedded_backbone_moves_what_it_saw_into_text(scenes, tmp_path):
    """VTW's Table 1 on the embedded backbone, in small: (c) near the full model, (a) and (b) far below."""
    found = _embedded(scenes, tmp_path, "migration", "stages")
    rows = found["migration"]
    assert rows["full"]["correct"] > 85
    assert rows["real_image"]["correct"] > rows["without_image"]["correct"] + 25
    assert rows["real_image"]["correct"] > rows["blank_image"]["correct"] + 25
    assert len(found["stages"]["shares"]) == 10


@pytest.mark.full
def test_embedded_backbone_does_every_study_without_gates(scenes, tmp_path):
    names = [name for name in STUDIES if name not in ("exits", "transfer", "shift", "gate_inputs")]
    found = _embedded(scenes, tmp_path, *names)
    layers = found["layers"]
    assert layers["kl"][0] > layers["kl"][5] > layers["kl"][9] >= layers["kl"][10] == 0
    assert found["eta"]["kl"] == layers["kl"]  # one search serves both
    rows = found["cost"]["rows"]
    assert rows["VTW, K = 5"]["kv_bytes_per_question"] < 0.7 * rows["full model"]["kv_bytes_per_question"]
