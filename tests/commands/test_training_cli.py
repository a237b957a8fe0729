"""init, train, calibrate, search-k and trace as people call them, on a tiny backbone and a LLaVA json."""

from __future__ import annotations

import json
import shlex
import shutil
import socket
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from dyvte.cli import main
from dyvte.gates import GateStack, load_checkpoint
from tests.helpers.killing import train_and_kill
from tests.helpers.models import tiny_llava
from tests.helpers.trainings import LIMIT_SECONDS, ROOT, environment, options, same, script, weights
from tests.helpers.world import World, conversation

WORLD = World(conversations={"train": range(12), "calibration": range(12, 20)}, stops=True)


def reference_flags(output: Path) -> dict[str, str]:
    """Options of the reference run, spelled as the reference's own script spells them."""
    return {
        "--gates": str(output.parent / "init"), "--version": "chat", "--bf16": "False",
        "--gradient_accumulation_steps": "1", "--warmup_ratio": "0.03", "--lr_scheduler_type": "cosine",
        "--model_max_length": "2048",
    }  # fmt: skip


@pytest.fixture(scope="module")
def trained(world: Path, tmp_path_factory) -> Path:
    """The reference run of this module: one process, through the script, from another folder."""
    output = tmp_path_factory.mktemp("trained") / "run"
    gates = output.parent / "init"
    init = subprocess.run(
        [sys.executable, str(ROOT / "scripts" / "init_weight.py"), "--model", str(config_only(world)),
         "--output", str(gates), "--seed", "3"],
        cwd=output.parent, env=environment(), timeout=LIMIT_SECONDS, capture_output=True, text=True,
    )  # fmt: skip
    assert init.returncode == 0, init.stderr
    assert "finetune_visual_gate.sh" in init.stdout
    done = script(*options(world, output, **reference_flags(output)), cwd=output.parent)
    assert done.returncode == 0, done.stderr
    assert "same answer" in done.stdout
    assert "teacher" in done.stderr  # the progress bar
    return output


def config_only(world: Path) -> Path:
    """A folder that holds nothing of the backbone but its config.json."""
    folder = world / "config_only"
    folder.mkdir(exist_ok=True)
    shutil.copy(world / "backbone" / "config.json", folder)
    return folder


def test_script_leaves_gates_that_the_runtime_loads(world: Path, trained: Path) -> None:
    config, gates = load_checkpoint(trained / "gates")
    assert gates is not None
    assert (config.num_layers, config.hidden_size) == (4, 32)
    record = config.training
    assert record["objective"]["name"] == "expected_risk"
    assert record["data"]["conversations"] == record["data"]["chosen"] == 36
    assert record["trace"]["labels"] == "greedy 3"
    before = load_file(trained.parent / "init" / "gates.safetensors")
    after = weights(trained)
    assert not torch.equal(before["gates.0.w2.weight"], after["gates.0.w2.weight"])
    assert torch.equal(before["gates.3.w2.weight"], after["gates.3.w2.weight"])  # gate L
    lines = [json.loads(line) for line in (trained / "train_log.jsonl").read_text().split("\n")[:-1]]
    assert lines[-1]["step"] == json.loads((trained / "summary.json").read_text())["steps"]
    assert any("validation/exit_rate" in line for line in lines)


def test_started_again_it_reuses_what_is_there(world: Path, trained: Path, capsys) -> None:
    stamp = (trained / "gates" / "gates.safetensors").stat().st_mtime_ns
    again = options(world, trained, **reference_flags(trained))
    assert main(["train", *again]) == 0
    assert (trained / "gates" / "gates.safetensors").stat().st_mtime_ns == stamp
    assert "same answer" in capsys.readouterr().out


def test_two_processes_share_traces_and_train_the_same_gates(
    world: Path, trained: Path, tmp_path: Path
) -> None:
    flags = {**reference_flags(trained), "--per_device_train_batch_size": "4"}
    done = script(*options(world, tmp_path / "two", **flags), cwd=tmp_path, NUM_PROCESSES="2")
    assert done.returncode == 0, done.stderr
    for name, tensor in weights(trained).items():
        torch.testing.assert_close(weights(tmp_path / "two")[name], tensor, atol=1e-4, rtol=1e-3)
    for shard in (trained / "trace").iterdir():
        assert (tmp_path / "two" / "trace" / shard.name).read_bytes() == shard.read_bytes()


@pytest.mark.full
@pytest.mark.parametrize("stage", ["zero2", "zero3"])
def test_deepspeed_launcher_with_zero(world: Path, trained: Path, tmp_path: Path, stage: str) -> None:
    flags = {
        **reference_flags(trained), "--per_device_train_batch_size": "4",
        "--deepspeed": str(ROOT / "configs" / "deepspeed" / f"{stage}.json"),
    }  # fmt: skip
    done = script(
        *options(world, tmp_path / "run", **flags), cwd=tmp_path, NUM_PROCESSES="2", LAUNCHER="deepspeed"
    )
    assert done.returncode == 0, done.stderr + done.stdout
    for name, tensor in weights(trained).items():
        torch.testing.assert_close(weights(tmp_path / "run")[name], tensor, atol=1e-4, rtol=1e-3)
    for shard in (trained / "trace").iterdir():  # under ZeRO-3 no process held the whole backbone
        assert (tmp_path / "run" / "trace" / shard.name).read_bytes() == shard.read_bytes()


@pytest.mark.full
@pytest.mark.parametrize("processes", [1, 2])
def test_a_sharded_backbone_says_what_the_whole_one_says(world: Path, tmp_path: Path, processes: int) -> None:
    """ZeRO-3, weights in CPU memory: uneven shares, a broken image and answers of different length."""
    entries = json.loads((world / "train.json").read_text())[:31]
    (world / "images" / "torn.png").write_bytes(b"\x89PNG broken")
    entries[30]["image"] = "torn.png"  # alone in the last batch
    (tmp_path / "data.json").write_text(json.dumps(entries))
    (tmp_path / "zero.json").write_text(json.dumps({"zero_optimization": {
        "stage": 3, "stage3_param_persistence_threshold": 0, "offload_param": {"device": "cpu"},
    }}))  # fmt: skip
    command = [
        "trace", "--model_name_or_path", str(world / "backbone"), "--data_path", str(tmp_path / "data.json"),
        "--image_folder", str(world / "images"), "--max_new_tokens", "6", "--teacher_batch_size", "3",
        "--max_bad_samples", "1", "--freeze_every", "2", "--set", "teacher.shard_batches=2", "--output",
    ]  # fmt: skip
    assert main([*command, str(tmp_path / "whole")]) == 0
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    done = subprocess.run(
        [sys.executable, *launcher, "-m", "dyvte", *command, str(tmp_path / "sharded"),
         "--deepspeed", str(tmp_path / "zero.json")],
        cwd=tmp_path, env=environment(), timeout=LIMIT_SECONDS, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    shards = sorted(path.name for path in (tmp_path / "whole").iterdir())
    assert sorted(path.name for path in (tmp_path / "sharded").iterdir()) == shards
    assert len(shards) == 6 + 1
    for name in shards:
        assert (tmp_path / "sharded" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), name


# --- launch commands ---


def test_several_machines_are_launched_by_deepspeed_with_the_hostfile(tmp_path: Path) -> None:
    from deepspeed.launcher.runner import fetch_hostfile, parse_args

    (tmp_path / "hosts").write_text("node1 slots=8\nnode2 slots=8\n")
    done = script("--config", "a b.yaml", cwd=tmp_path, DRY_LAUNCH="1", HOSTFILE=str(tmp_path / "hosts"))
    python, *words = shlex.split(done.stdout)
    assert Path(python).name.startswith("python")
    assert words[:2] == ["-m", "deepspeed.launcher.runner"]
    # The launcher's own parser and reader understand it.
    args = parse_args(words[2:])
    assert fetch_hostfile(args.hostfile) == {"node1": 8, "node2": 8}
    assert (args.module, args.no_local_rank) == (True, True)
    assert [args.user_script, *args.user_args] == ["dyvte", "train", "--config", "a b.yaml"]


@pytest.mark.parametrize(("launcher", "module"), [
    ("torchrun", "torch.distributed.run"), ("deepspeed", "deepspeed.launcher.runner"),
])  # fmt: skip
def test_several_processes_of_one_machine(tmp_path: Path, launcher: str, module: str) -> None:
    done = script("--seed", "3", cwd=tmp_path, DRY_LAUNCH="1", NUM_PROCESSES="2", LAUNCHER=launcher)
    words = shlex.split(done.stdout)
    assert module in words
    assert words[-4:] == ["dyvte", "train", "--seed", "3"]
    assert "2" in words


def test_an_unknown_launcher_or_a_missing_hostfile_is_named(tmp_path: Path) -> None:
    done = script(cwd=tmp_path, DRY_LAUNCH="1", NUM_PROCESSES="2", LAUNCHER="mpi")
    assert done.returncode == 2
    assert "LAUNCHER=mpi: expected torchrun or deepspeed" in done.stderr
    done = script(cwd=tmp_path, DRY_LAUNCH="1", HOSTFILE="nowhere")
    assert done.returncode == 2
    assert "HOSTFILE=nowhere: there is no such file" in done.stderr
    (tmp_path / "hosts").write_text("node1 slots=1\n")
    done = script(cwd=tmp_path, DRY_LAUNCH="1", HOSTFILE="hosts", NODE_RANK="1", MASTER_ADDR="")
    assert done.returncode == 2
    assert "NODE_RANK needs MASTER_ADDR" in done.stderr


@pytest.mark.full
def test_two_machines_that_cannot_ssh_train_together(world: Path, trained: Path, tmp_path: Path) -> None:
    """Two launchers, each told that it is one of two machines, meet at an address of this one."""
    (tmp_path / "hosts").write_text("node1 slots=1\nnode2 slots=1\n")
    flags = {**reference_flags(trained), "--per_device_train_batch_size": "4"}
    words, port = options(world, tmp_path / "run", **flags), str(free_port())

    def machine(rank: int) -> subprocess.CompletedProcess[str]:
        return script(
            *words, cwd=tmp_path, HOSTFILE="hosts", NODE_RANK=str(rank), MASTER_ADDR="127.0.0.1",
            MASTER_PORT=port,
        )  # fmt: skip

    with ThreadPoolExecutor(2) as pool:
        for done in pool.map(machine, (0, 1)):
            assert done.returncode == 0, done.stderr + done.stdout
    for name, tensor in weights(trained).items():
        torch.testing.assert_close(weights(tmp_path / "run")[name], tensor, atol=1e-4, rtol=1e-3)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


# --- a full disk ---


@pytest.mark.full
@pytest.mark.parametrize(("limit", "message"), [(3, "cannot be written"), (50, "checkpoint of step")])
def test_a_file_that_cannot_grow_ends_the_run_and_the_next_start_completes_it(
    world: Path, trained: Path, tmp_path: Path, limit: int, message: str
) -> None:
    """A limit on file size (in KB) stands in for a full disk: trace shards, then checkpoints do not fit."""
    words = options(world, tmp_path / "run", **reference_flags(trained))
    command = ["bash", "-c", f'ulimit -f {limit}; exec "$0" -m dyvte "$@"', sys.executable, "train", *words]
    failed = subprocess.run(
        command, cwd=tmp_path, env=environment(), timeout=LIMIT_SECONDS, capture_output=True, text=True
    )
    assert failed.returncode == 2, failed.stderr
    assert message in failed.stderr
    assert "Traceback" not in failed.stderr
    assert main(["train", *words]) == 0
    assert same(weights(tmp_path / "run"), weights(trained))


def test_killed_at_any_moment_it_ends_with_the_same_gates(world: Path, trained: Path, tmp_path: Path) -> None:
    """kill -9 during training; the same command then ends bit-identical to a run that was left alone."""
    flags = {
        "--num_train_epochs": "150",
        "--save_steps": "20",
        "--trace_dir": str(trained / "trace"),
        "--version": "chat",
    }
    assert main(["train", *options(world, tmp_path / "whole", **flags)]) == 0
    killed = options(world, tmp_path / "killed", **flags)
    train_and_kill(killed, tmp_path / "killed", environment(), LIMIT_SECONDS)
    assert not (tmp_path / "killed" / "gates").exists(), "the run was over before it could be killed"
    assert main(["train", *killed]) == 0
    assert same(weights(tmp_path / "killed"), weights(tmp_path / "whole"))


def test_trace_calibrate_and_search_k(world: Path, trained: Path, tmp_path: Path, capsys) -> None:
    gates = tmp_path / "gates"
    shutil.copytree(trained / "gates", gates)
    data = [
        "--data_path", str(world / "calibration.json"), "--image_folder", str(world / "images"),
        "--max_new_tokens", "3", "--teacher_batch_size", "8",
    ]  # fmt: skip
    # The model is taken from the gates' own record.
    assert (
        main(["calibrate", "--gates", str(gates), "--trace", str(tmp_path / "t"), "--budget", "0.6", *data])
        == 0
    )
    config, _ = load_checkpoint(gates)
    assert config.calibration["kind"] == "compute"
    assert config.calibration["visual_compute"] <= 0.6
    assert (config.calibration["num_samples"], config.calibration["num_images"]) == (24, 8)
    assert same(load_file(gates / "gates.safetensors"), weights(trained))

    assert main(["calibrate", "--gates", str(gates), "--trace", str(tmp_path / "t"), "--alpha", "0.01"]) == 0
    config, _ = load_checkpoint(gates)
    assert (config.threshold, config.calibration["certified"]) == (1.0, False)
    assert "never leave" in capsys.readouterr().out

    code = main(["calibrate", "--gates", str(gates), "--trace", str(trained / "trace"), "--alpha", "0.1"])
    assert code == 2
    assert "trained on these samples" in capsys.readouterr().err

    model = ["--model_name_or_path", str(world / "backbone")]
    plot = ["--plot", str(tmp_path / "kl.png")]
    kept = ["--json", str(tmp_path / "kl.json"), "--write", str(tmp_path / "none")]
    assert main(["search-k", *model, *data, "--eta", "1e-9", *plot, *kept]) == 3
    assert "none qualifies: no K in 1..3" in capsys.readouterr().err
    assert json.loads((tmp_path / "kl.json").read_text())["k"] is None
    assert (tmp_path / "kl.png").read_bytes().startswith(b"\x89PNG")
    assert not (tmp_path / "none").exists()
    assert main(["search-k", *model, *data, "--eta", "10", "--write", str(tmp_path / "fixed")]) == 0
    config, none = load_checkpoint(tmp_path / "fixed")
    assert none is None
    assert (config.mode, config.fallback) == ("fixed", 1)

    output = str(tmp_path / "t2")
    assert main(["trace", *model, *data, "--output", output]) == 0
    assert (tmp_path / "t2" / "shard-00000.safetensors").read_bytes() == (
        tmp_path / "t" / "shard-00000.safetensors"
    ).read_bytes()


def test_traces_of_another_backbone_do_not_calibrate(
    world: Path, trained: Path, tmp_path: Path, capsys
) -> None:
    other, processor = tiny_llava(layers=4, seed=5)
    other.save_pretrained(tmp_path / "other")
    processor.save_pretrained(tmp_path / "other")
    data, images = str(world / "calibration.json"), str(world / "images")
    trace = [
        "trace", "--model_name_or_path", str(tmp_path / "other"), "--data_path", data,
        "--image_folder", images, "--max_new_tokens", "3", "--output", str(tmp_path / "t"),
    ]  # fmt: skip
    assert main(trace) == 0
    gates = str(trained / "gates")
    assert main(["calibrate", "--gates", gates, "--trace", str(tmp_path / "t"), "--budget", "0.5"]) == 2
    assert "traces of another backbone" in capsys.readouterr().err


def test_dry_run_reads_no_weights(world: Path, tmp_path: Path, capsys) -> None:
    flags = {"--model_name_or_path": str(config_only(world)), "--gate_architecture": "reference"}
    assert main(["train", *options(world, tmp_path / "none", **flags), "--dry-run"]) == 0
    out = capsys.readouterr().out
    assert f"{4 * (64 * 2048 + 2048 * 2):,} parameters" in out
    assert "chosen 36" in out
    assert "a sample 16 visual" in out
    assert not (tmp_path / "none").exists()


def test_script_without_arguments_is_the_embedded_default(tmp_path: Path) -> None:
    done = script(cwd=tmp_path, DRY_LAUNCH="1", NUM_PROCESSES="1")
    assert done.stdout.split()[-4:] == ["dyvte", "train", "--config", str(ROOT / "configs" / "embedded.yaml")]


# --- bad input: one line that names the thing, exit code 2 ---


def bad_data(folder: Path, world: Path, entries) -> dict[str, str]:
    path = folder / "bad.json"
    path.write_text(entries if isinstance(entries, str) else json.dumps(entries))
    return {"--data_path": str(path)}


def gpt_first() -> dict:
    made = conversation("x", "0.png")
    made["conversations"].reverse()
    return made


CASES = {
    "no such model": (lambda f, w: {"--model_name_or_path": str(f / "nowhere")}, "no model folder at"),
    "not json": (lambda f, w: bad_data(f, w, "[{"), "not valid JSON"),
    "not a list": (lambda f, w: bad_data(f, w, {"a": 1}), "JSON list"),
    "starts with gpt": (lambda f, w: bad_data(f, w, [gpt_first()]), "starts with 'gpt'"),
    "missing image": (lambda f, w: bad_data(f, w, [conversation("x", "no.png")]), "sample 'x': image"),
    "image outside": (lambda f, w: bad_data(f, w, [conversation("x", "../0.png")]), "leaves the image"),
    "empty answer": (lambda f, w: bad_data(f, w, [conversation("x", "0.png", answer=" ")]), "is empty"),
    "broken image": (lambda f, w: bad_data(f, w, [conversation("x", "broken.png")]), "cannot be read"),
    "too long": (lambda f, w: {"--model_max_length": "10"}, "the answer would be cut"),
    "unwritable": (lambda f, w: {"--output_dir": str(w / "train.json" / "out")}, "cannot be written"),
    "unknown setting": (lambda f, w: {"--set": "optimizer.learning_rat=1"}, "optimizer.learning_rate"),
    "bad value": (lambda f, w: {"--num_train_epochs": "-1"}, "epochs must be positive"),
    "no such deepspeed file": (lambda f, w: {"--deepspeed": str(f / "no.json")}, "no.json"),
    "gates of another shape": (lambda f, w: {"--gates": str(other_gates(f))}, "5 layers of size 32"),
    "template": (lambda f, w: {"--version": "plain"}, "'plain'"),
}  # fmt: skip


def other_gates(folder: Path) -> Path:
    from dyvte.gates import GateConfig

    GateStack.init(GateConfig(num_layers=5, hidden_size=32)).save_pretrained(folder / "other")
    return folder / "other"


@pytest.mark.parametrize("case", list(CASES))
def test_bad_input_is_named(world: Path, tmp_path: Path, capsys, case: str) -> None:
    (world / "images" / "broken.png").write_bytes(b"\x89PNG broken")
    changed, message = CASES[case]
    code = main(["train", *options(world, tmp_path / "out", **changed(tmp_path, world))])
    assert code == 2
    assert message in capsys.readouterr().err


def test_changed_settings_on_resume_are_listed(world: Path, trained: Path, capsys) -> None:
    flags = {**reference_flags(trained), "--learning_rate": "3e-3", "--seed": "8"}
    assert main(["train", *options(world, trained, **flags)]) == 2
    message = capsys.readouterr().err
    assert "optimizer.learning_rate: 0.01 there, 0.003 now" in message
    assert "seed: 0 there, 8 now" in message
    assert "trace_dir=" in message


def test_init_does_not_overwrite_unasked(world: Path, trained: Path, capsys) -> None:
    words = ["init", "--model", str(world / "backbone"), "--output", str(trained.parent / "init")]
    assert main(words) == 2
    assert "--overwrite" in capsys.readouterr().err
