#!/usr/bin/env python
"""What the embedded backbone can do, on held-out scenes: accuracy, shuffled images, exits, depth.

Writes <model>/metrics.json and prints the tables of checkpoints/README.md. The traces are the greedy-label
traces of the same data (`dyvte trace`).

    python scripts/measure_tiny_backbone.py --traces runs/quickstart/trace-test
"""

from __future__ import annotations

import argparse
import json
from collections import defaultdict
from pathlib import Path

import numpy as np
import torch

from dyvte.backbones import load_backbone
from dyvte.comparison.oracle import oracle_exits, within_wording_share
from dyvte.comparison.scenes import load_scenes
from dyvte.data import check_defects, open_conversations, select
from dyvte.data.scenes.questions import HARD_TYPES, IMAGE_TYPES, SIMPLE_TYPES, TYPES
from dyvte.teacher import Teacher, TeacherConfig
from dyvte.teacher.exits import exit_logits, positions_before

ROOT = Path(__file__).resolve().parents[1]
LAMBDAS = (1.0, 0.3, 0.1, 0.03, 0.01, 0.003)


def parse_arguments() -> argparse.Namespace:
    """Command line of the script."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path, default=ROOT / "checkpoints/tiny-llava")
    parser.add_argument("--data", type=Path, default=ROOT / "data/scenes/instruct/test.json")
    parser.add_argument("--traces", type=Path, default=ROOT / "runs/quickstart/trace-test")
    parser.add_argument("--batch-size", type=int, default=64)
    return parser.parse_args()


def right_at_every_exit(teacher: Teacher, samples, batch_size: int, shuffle: bool) -> torch.Tensor:
    """(B, L+1) bool: the whole greedy answer equals the data's answer, for exits after 0..L layers.

    `shuffle` gives every question the image of a scene half the data away.
    """
    out = []
    images = [s.image for s in samples]
    if shuffle:
        images = np.roll(np.array(images, dtype=object), len(images) // 2).tolist()
    for start in range(0, len(samples), batch_size):
        part = [
            type(s)(**{**s.__dict__, "image": image})
            for s, image in zip(
                samples[start : start + batch_size], images[start : start + batch_size], strict=True
            )
        ]
        ready = teacher.prepare(part)
        check_defects(ready.defects, 0)
        inputs, answers = ready.inputs, ready.answer_BN
        ids = [s.id for s in part]
        found = exit_logits(
            teacher.model, inputs, predict_BN=positions_before(answers, ids), answer_BN=answers
        )
        labels = torch.zeros(found.valid_BA.shape, dtype=torch.long)
        labels[found.valid_BA] = inputs["input_ids"][answers]
        hit = (found.logits_KBAV.argmax(-1) == labels) | ~found.valid_BA
        out.append(hit.all(-1).T)
    return torch.cat(out)


def per_type(values: torch.Tensor, types: list[str]) -> dict[str, list[float]]:
    """Mean of (B, K) values over the samples of each type, and their mean over types."""
    rows: dict[str, list[int]] = defaultdict(list)
    for i, kind in enumerate(types):
        rows[kind].append(i)
    table = {t: values[rows[t]].double().mean(0).tolist() for t in TYPES if rows[t]}
    table["mean over types"] = np.mean(list(table.values()), axis=0).tolist()
    return table


def markdown(title: str, table: dict[str, list[float]], digits: int) -> str:
    """A table with one row per type and one column per exit layer."""
    width = len(next(iter(table.values())))
    lines = [f"**{title}**", "", "| type | " + " | ".join(map(str, range(width))) + " |"]
    lines.append("|---|" + "---|" * width)
    for name, values in table.items():
        lines.append(f"| {name} | " + " | ".join(f"{v:.{digits}f}" for v in values) + " |")
    return "\n".join(lines) + "\n"


def depth(scenes) -> list[dict]:
    """oracle(lambda): what it keeps, what it spends, and how much of it the wording cannot know."""
    trace, rows = scenes.trace, []
    for lam in LAMBDAS:
        exits = oracle_exits(trace.risk, lam)
        picked = exits[:, None]
        rows.append(
            {
                "lambda": lam,
                "mean_exit": exits.double().mean().item(),
                "same_answer": trace.same_answer.gather(1, picked).mean().item(),
                "risk": trace.risk.gather(1, picked).mean().item(),
                "within_wording_share": within_wording_share(exits, scenes.questions),
            }
        )
    return rows


def main() -> int:
    """Measure and report."""
    args = parse_arguments()
    model, processor = load_backbone(str(args.model), dtype=torch.float32)
    teacher = Teacher(model, processor, TeacherConfig(label_source="data"))
    samples = select(open_conversations(args.data)).samples
    records = json.loads(args.data.read_text(encoding="utf-8"))
    type_of = {r["id"]: r["type"] for r in records}
    types = [type_of[s.id] for s in samples]
    right = right_at_every_exit(teacher, samples, args.batch_size, shuffle=False)
    shuffled = right_at_every_exit(teacher, samples, args.batch_size, shuffle=True)[:, -1:]
    scenes = load_scenes(args.traces, args.data, args.data.parent / "images")
    traced_types = [type_of[i] for i in scenes.trace.sample_ids]

    accuracy = per_type(right, types)
    without = {k: v[0] for k, v in per_type(shuffled, types).items()}
    risk, same = per_type(scenes.trace.risk, traced_types), per_type(scenes.trace.same_answer, traced_types)
    metrics = {
        "samples": len(samples),
        "accuracy_over_k": accuracy,
        "shuffled_images": without,
        "risk_over_k": risk,
        "same_answer_over_k": same,
        "oracle": depth(scenes),
    }
    (args.model / "metrics.json").write_text(json.dumps(metrics, indent=1), encoding="utf-8")
    print("| type | accuracy | with shuffled images |\n|---|---|---|")
    for group in (SIMPLE_TYPES, HARD_TYPES, IMAGE_TYPES, ("mean over types",)):
        for t in group:
            print(f"| {t} | {accuracy[t][-1]:.3f} | {without[t]:.3f} |")
    print()
    print(markdown("Accuracy over the exit layer", accuracy, 2))
    print(markdown("Risk (nats) over the exit layer", risk, 3))
    print(markdown("Same answer over the exit layer", same, 3))
    print("| lambda | oracle's mean exit | same answer | risk | share of variance within one wording |")
    print("|---|---|---|---|---|")
    for row in metrics["oracle"]:
        print(
            f"| {row['lambda']:g} | {row['mean_exit']:.2f} | {row['same_answer']:.3f} | {row['risk']:.4f} "
            f"| {row['within_wording_share']:.2f} |"
        )
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
