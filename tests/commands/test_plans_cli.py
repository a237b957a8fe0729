"""calibrate --reduction yopo, gates that learn on a reduced backbone, search-plan: as people call them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from dyvte.cli import main
from dyvte.comparison.plans import folder_name
from dyvte.gates import load_checkpoint
from dyvte.reductions import VisualProfile, parse_reductions
from tests.helpers.world import World

QUESTIONS = ["how many ?", "what color is the circle ?"]
LAYERS = 4


WORLD = World(conversations={"train": range(5), "calibration": range(5, 8)}, questions=2, stops=True)


def options(world: Path, data: str) -> list[str]:
    given = {
        "--model_name_or_path": str(world / "backbone"), "--data_path": str(world / f"{data}.json"),
        "--image_folder": str(world / "images"), "--max_new_tokens": "3", "--teacher_batch_size": "4",
    }  # fmt: skip
    return [word for pair in given.items() for word in pair]


@pytest.fixture(scope="module")
def profile(world: Path, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("profile") / "yopo"
    asked = ["--num-samples", "6", "--output", str(folder)]
    assert main(["profile", *asked, *options(world, "train")]) == 0
    return folder


def test_a_profile_says_what_it_was_measured_on(world: Path, profile: Path, capsys) -> None:
    found = VisualProfile.from_pretrained(profile)
    assert found.rho_SLH.shape == (6, LAYERS, 4)
    assert found.importance_LM.shape == (LAYERS, 64)
    assert found.about["num_samples"] == 6
    assert found.about["backbone"]["id"] == str(world / "backbone")
    assert found.about["data"] == str(world / "train.json")
    assert sorted(path.name for path in profile.iterdir()) == [
        "visual_profile.json",
        "visual_profile.safetensors",
    ]
    heads, _ = parse_reductions(f"heads:{profile}:3+ffn:0.25:{profile}")
    assert int(heads.active_LH.sum()) == 12
    # another model's is refused
    other = shutil.copytree(profile, profile.parent / "other", dirs_exist_ok=True)
    about = json.loads((other / "visual_profile.json").read_text())
    about["backbone"]["weights"] = "another"
    (other / "visual_profile.json").write_text(json.dumps(about))
    asked = [*options(world, "calibration"), "--reduction", f"ffn:0.5:{other}"]
    assert main(["trace", *asked, "--output", str(profile.parent / "refused")]) == 2
    assert "measured on another backbone" in capsys.readouterr().err
    assert not (profile.parent / "refused").exists()


def test_calibrate_reduction_yopo_does_it_too_and_says_so(
    world: Path, profile: Path, tmp_path, capsys
) -> None:
    asked = ["--reduction", "yopo", "--num-samples", "6", "--output", str(tmp_path / "yopo")]
    assert main(["calibrate", *asked, *options(world, "train")]) == 0
    assert "note: this is `dyvte profile` now" in capsys.readouterr().err
    for name in ("visual_profile.json", "visual_profile.safetensors"):
        assert (tmp_path / "yopo" / name).read_bytes() == (profile / name).read_bytes()


def test_what_calibrate_lacks_is_named(world: Path, capsys) -> None:
    assert main(["calibrate", "--reduction", "yopo", *options(world, "train")]) == 2
    assert "--output must be given" in capsys.readouterr().err
    assert main(["calibrate", "--budget", "0.5"]) == 2
    assert "--gates and --trace must be given" in capsys.readouterr().err


def test_gates_learn_on_a_reduced_backbone_and_say_so(world: Path, tmp_path: Path, capsys) -> None:
    run = tmp_path / "run"
    schedule = ["--num_train_epochs", "2", "--per_device_train_batch_size", "4", "--report_to", "none"]
    asked = [*options(world, "train"), *schedule, "--output_dir", str(run), "--reduction", "fastv:2:0.5"]
    assert main(["train", *asked]) == 0
    config, gates = load_checkpoint(run / "gates")
    assert gates is not None
    assert config.training["trace"]["reductions"] == "fastv:2:0.5"
    assert config.training["reductions"] == "fastv:2:0.5"
    # calibrating traces new data on the same reduced backbone, and the record says so
    traces = tmp_path / "traces"
    data = [*options(world, "calibration")[2:], "--trace", str(traces)]
    assert main(["calibrate", "--gates", str(run / "gates"), *data, "--budget", "0.7"]) == 0
    assert "of what fastv:2:0.5 leave" in capsys.readouterr().out
    assert json.loads((traces / "manifest.json").read_text())["fingerprint"]["reductions"] == "fastv:2:0.5"
    assert load_checkpoint(run / "gates")[0].calibration["reductions"] == "fastv:2:0.5"


def test_search_plan_lists_traces_chooses_and_goes_on(world: Path, profile: Path, tmp_path, capsys) -> None:
    output = tmp_path / "plans"
    ffn = f"ffn:0.5:{profile}"
    tried = ["--reduction", "fastv:2:0.5", "--reduction", ffn, "--budget", "0.6", "--budget", "0.01"]
    asked = ["search-plan", *options(world, "calibration"), *tried, "--output", str(output)]
    assert main([*asked, "--dry-run"]) == 0
    listed = capsys.readouterr().out
    assert "3 combinations of reductions, each traced once at 5 exits behind 4 freeze layers" in listed
    assert all(text in listed for text in ("none", "fastv:2:0.5", ffn))
    assert not output.exists()
    assert main(asked) == 0
    printed = capsys.readouterr().out
    assert "none is cheap enough" in printed
    found = json.loads((output / "plans.json").read_text())
    assert found["num_samples"] == 6
    # without gates: K = 1..3 and never, and all F < K, for each combination
    assert len(found["plans"]) == 3 * (4 + 4 + 3 + 2 + 1)
    kinds = {"never", "fixed", "freeze", "FastV", "YOPO", "combined"}
    assert {plan["kind"] for plan in found["plans"]} == kinds
    assert {"freeze:0", "freeze:1:3"} <= {plan["policy"] for plan in found["plans"]}
    within = [plan for plan in found["plans"] if plan["visual_compute"] <= 0.6]
    assert found["chosen"]["0.6"]["risk"] == min(plan["risk"] for plan in within)
    assert found["chosen"]["0.01"] is None
    full = next(plan for plan in found["plans"] if plan["kind"] == "never")
    assert full["visual_compute"] == pytest.approx(1.0)
    assert full["risk"] < 1e-6
    assert (output / "plans.png").read_bytes().startswith(b"\x89PNG")
    assert (output / "plans.md").read_text().count("\n") > 4
    # once more, with one combination's traces torn: they alone are made again
    stores = {text: output / "traces" / folder_name(text) for text in ("none", "fastv:2:0.5", ffn)}
    shards = {text: next(folder.glob("shard-*")) for text, folder in stores.items()}
    before = {text: shard.stat().st_mtime_ns for text, shard in shards.items()}
    shards["fastv:2:0.5"].unlink()
    assert main(asked) == 0
    after = {text: shard.stat().st_mtime_ns for text, shard in shards.items()}
    assert [text for text in stores if before[text] != after[text]] == ["fastv:2:0.5"]
    assert json.loads((output / "plans.json").read_text()) == found
    # a search without freezes is another one
    assert main([*asked, "--exits-only"]) == 2
    assert "freezes: stored '0,1,2,3', this run 'none'" in capsys.readouterr().err


def test_search_plan_refuses_what_it_cannot_do(world: Path, tmp_path: Path, capsys) -> None:
    asked = ["search-plan", *options(world, "calibration"), "--budget", "0.5"]
    with pytest.raises(SystemExit):
        main(asked)
    assert "--output" in capsys.readouterr().err
    for text, reason in (("fastv:9:0.5", r"1..3"), ("fast:2", "did you mean 'fastv'"), ("ffn:2", "0..1")):
        assert main([*asked, "--output", str(tmp_path / "out"), "--reduction", text]) == 2
        assert reason in capsys.readouterr().err
    assert main([*asked[:-1], "1.5", "--output", str(tmp_path / "out")]) == 2
    assert "budget" in capsys.readouterr().err
