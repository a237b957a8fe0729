#!/usr/bin/env python
"""Measure the embedded 30-layer backbone: a training state, or the checkpoint in this repository.

python scripts/measure_smol_llava.py --work runs/smol --scenes 40          # a state, validation scenes
python scripts/measure_smol_llava.py --split test --scenes 200 --output checkpoints/smol-llava/metrics.json
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "scripts"), str(ROOT)]


def parse_arguments() -> argparse.Namespace:
    """Command line of the script."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--work", type=Path, help="folder of a training state; default: the checkpoint")
    parser.add_argument("--checkpoint", type=Path, default=ROOT / "checkpoints/smol-llava")
    parser.add_argument("--caches", type=Path, help="where the dequantised decoder is kept; default: --work")
    parser.add_argument("--split", default="validation", choices=("train", "validation", "test"))
    parser.add_argument("--scenes", type=int, default=40, help="scenes of 24 questions")
    parser.add_argument("--exit-scenes", type=int, help="scenes for the exits; default: a quarter")
    parser.add_argument("--exits", default="0,2,4,6,8", help="exit layers, comma separated")
    parser.add_argument("--kinds", help="question types, comma separated; default: all that were trained")
    parser.add_argument("--compute", choices=("auto", "fp32", "bf16"), default="auto")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--output", type=Path, help="json file of the figures")
    return parser.parse_args()


def main() -> int:
    """Load, measure, print."""
    args = parse_arguments()
    import torch

    torch.set_num_threads(args.threads)
    from smol_llava import evaluation
    from smol_llava.loading import compute_type, network_of_checkpoint, trainer_of_state
    from smol_llava.trainer import ALL_KINDS

    compute = compute_type(args.compute)
    with tempfile.TemporaryDirectory() as temporary:
        if args.work is not None:
            trainer = trainer_of_state(args.work, args.caches or args.work, compute)
            network, step = trainer.network, trainer.step
        else:
            network, recipe = network_of_checkpoint(args.checkpoint, args.caches or Path(temporary), compute)
            step = recipe["training"]["step"]
        kinds = args.kinds.split(",") if args.kinds else ALL_KINDS
        exits = [int(k) for k in args.exits.split(",") if k]
        depth = len(network.decoder.layers)
        some = args.exit_scenes or max(1, args.scenes // 4)

        def score(count: int, **options) -> dict:
            return evaluation.accuracy(network, args.split, count, kinds, **options)

        full = score(args.scenes)[depth]
        shuffled = score(args.scenes, shuffle=True)[depth]
        unseen = score(args.scenes, unseen=True)[depth]
        by_exit = score(some, exits=exits) if exits else {}
        english = evaluation.perplexity(network)
    figures = {
        "step": step,
        "split": args.split,
        "scenes": args.scenes,
        "accuracy": full,
        "shuffled_images": shuffled,
        "unseen_wordings": unseen,
        "exit_scenes": some,
        "by_exit": by_exit,
        "perplexity": english,
        "required": evaluation.verdict(full, shuffled, unseen, by_exit, english),
    }
    if args.output:
        args.output.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
    print("| type | accuracy | shuffled images | unseen wordings |\n|---|---|---|---|")
    for kind in full:
        print(f"| {kind} | {full[kind]:.3f} | {shuffled[kind]:.3f} | {unseen.get(kind, float('nan')):.3f} |")
    for k, scores in by_exit.items():
        print(f"exit layer {k}: {evaluation.mean_over_types(scores):.3f}")
    print(json.dumps(figures["required"], indent=1))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
