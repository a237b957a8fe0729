#!/usr/bin/env python
"""Train the embedded backbone (checkpoints/tiny-llava) from scratch on synthetic scenes.

Two stages on CPU: vision pre-training of the tower on dense labels, then language training of projector
and decoder. Resumable: start the same command again.

    python scripts/train_tiny_backbone.py --work runs/backbone --output checkpoints/tiny-llava
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from datetime import timedelta
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "scripts"))


def parse_arguments() -> argparse.Namespace:
    """Command line of the script."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--work", type=Path, default=ROOT / "runs/backbone", help="state, log, resume point")
    parser.add_argument(
        "--output", type=Path, default=ROOT / "checkpoints/tiny-llava", help="the finished model"
    )
    parser.add_argument("--vision-steps", type=int, default=1200, help="batches of 64 scenes for the tower")
    parser.add_argument(
        "--steps", type=int, default=2000, help="batches of 16 scenes x 24 questions a process"
    )
    parser.add_argument(
        "--random-exit-share",
        type=float,
        default=0.0,
        help="share of the steps, at the end, in which questions lose the visual tokens after a random layer",
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--processes", type=int, default=2, help="one-thread processes that share each step")
    return parser.parse_args()


def main() -> int:
    """Start the processes; one thread each beats one process with spinning threads."""
    args = parse_arguments()
    args.work.mkdir(parents=True, exist_ok=True)
    import torch

    rendezvous = args.work.resolve() / f".rendezvous-{time.time_ns()}"
    torch.multiprocessing.spawn(work, (args, rendezvous), nprocs=args.processes)
    rendezvous.unlink(missing_ok=True)
    return 0


def work(rank: int, args: argparse.Namespace, rendezvous: Path) -> None:
    """One process: vision stage on rank 0 alone, language stage on all, export by rank 0."""
    import torch

    from dyvte.data.scenes.processor import build_processor
    from tiny_backbone.language import LanguageConfig, LanguageTrainer
    from tiny_backbone.model import build_model
    from tiny_backbone.vision import pretrain

    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    torch.distributed.init_process_group(
        "gloo",
        init_method=rendezvous.as_uri(),
        rank=rank,
        world_size=args.processes,
        timeout=timedelta(hours=2),
    )
    log_file = (args.work / "log.jsonl").open("a", encoding="utf-8")
    began = time.time()

    def log(record: dict) -> None:
        if rank:
            return
        record = {k: round(v, 5) if isinstance(v, float) else v for k, v in record.items()}
        record["seconds"] = round(time.time() - began, 1)
        log_file.write(json.dumps(record) + "\n")
        log_file.flush()
        print(record, flush=True)

    processor = build_processor()
    model = build_model(processor.tokenizer, args.seed)
    tower, tower_path = model.model.vision_tower, args.work / "tower.pt"
    if not tower_path.exists() and rank == 0:
        # scenes far from those of the language stage, so that no image is used twice
        pretrain(tower, steps=args.vision_steps, batch=64, seed=args.seed, first=10_000_000, log=log)
        torch.save({k: v.float() for k, v in tower.state_dict().items()}, tower_path)
    torch.distributed.barrier()
    tower.load_state_dict(torch.load(tower_path, weights_only=True))

    config = LanguageConfig(steps=args.steps, seed=args.seed, random_exit_share=args.random_exit_share)
    trainer = LanguageTrainer(model, processor.tokenizer, config, rank, args.processes)
    resumed = trainer.resume(args.work)
    log({"stage": "language", "resumed": resumed, "step": trainer.step})
    natural = int((1 - config.random_exit_share) * config.steps)
    milestones = sorted({config.steps // 5, 2 * config.steps // 5, natural, config.steps})
    for until in milestones:
        if until < trainer.step:
            continue
        trainer.train(until, args.work, log)
        if rank:
            continue  # rank 0 measures; the others wait for it in the next step
        log({"stage": "validation", "step": trainer.step, **trainer.measure("validation", 256)})
        if until in (natural, config.steps):
            for k in range(trainer.num_layers + 1):
                log(
                    {
                        "stage": "validation",
                        "step": until,
                        "exit_layer": k,
                        **trainer.measure("validation", 128, k),
                    }
                )
            log(
                {
                    "stage": "shuffled images",
                    "step": until,
                    **trainer.measure("validation", 256, shuffle=True),
                }
            )

    if rank:
        return
    export(model, processor, args.output)
    log({"stage": "done", "output": str(args.output)})


def export(model, processor, output: Path) -> None:
    """Write model and processor in half precision, for stock `from_pretrained`."""
    import torch

    model.model.language_model.config._attn_implementation = "sdpa"
    model.to(torch.float16).save_pretrained(output)
    processor.save_pretrained(output)


if __name__ == "__main__":
    raise SystemExit(main())
