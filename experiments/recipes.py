"""Which training of a trace is best? The candidates of `dyvte train --target-alpha`, and what is kept.

For gates with two heads and for gates of exits alone: a target's candidates are trained on the same traces
and images, with several seeds, and judged on held-out scenes: by the measure that the choice is made by,
by the visual compute that 98 and 99 % same answers need, and by the mean risk at eight budgets. What was
trained for `freezing.py` with the same settings is used again.

    python experiments/recipes.py --config configs/embedded_states.yaml --work runs/recipes
    python experiments/recipes.py --config configs/smol.yaml --scenes data/smol/instruct --work runs/smol
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from workbench import BUDGETS, Workbench, arguments

from dyvte.calibration.operating_points import compute_to_reach
from dyvte.calibration.path import Labels
from dyvte.comparison.records import Spread, plain
from dyvte.comparison.scenes import TracedScenes
from dyvte.comparison.tuned_gates import load_gates
from dyvte.evaluation.latency import machine
from dyvte.files import write_atomically
from dyvte.formatting import markdown_table, spread_text
from dyvte.training.candidates import FOLDER, Choice, value_of
from dyvte.training.target import TargetConfig

KINDS: Mapping[str, tuple[str, ...]] = {"states": (), "exits-answer": ("gates.freeze_head=false",)}
"""Gates with two heads, and of exits alone; named as `freezing.py` names them."""
CHOSEN = "what is kept"
TARGETS = (0.98, 0.99)


def judged(
    folders: Mapping[str, Sequence[Path]],
    calibration: TracedScenes,
    test: TracedScenes,
    target: TargetConfig,
) -> dict[str, dict[str, Spread]]:
    """Of each training, over its seeds: what its gates are worth on the test scenes.

    Parameters
    ----------
    folders
        Gates of every seed, by training.
    calibration
        Their thresholds come from here.
    test
        What they are judged on.
    target
        What they are wanted for.
    """
    found = {}
    same, risk = (Labels.of(test.trace, metric) for metric in ("same_answer", "risk"))
    for name, seeds in folders.items():
        columns: dict[str, list[float]] = {key: [] for key in ("measure", *map(str, TARGETS), "risk")}
        for folder in seeds:
            tuned = load_gates(folder, name, calibration)
            points = tuned.points_on(test)
            columns["measure"].append(value_of(tuned.gates, test.trace, target))
            for share in TARGETS:
                columns[str(share)].append(compute_to_reach(points.compute_S, points.means_S(same), share))
            at_budgets = [points.mixed_values(risk, points.at_compute(budget)) for budget in BUDGETS]
            columns["risk"].append(float(torch.stack(at_budgets).mean()))
        found[name] = {key: Spread.of(values) for key, values in columns.items()}
    return found


def table(found: Mapping[str, Mapping[str, Spread]], alpha: float) -> str:
    """One row for each training."""
    head = [
        "training",
        f"compute around {alpha:.0%} loss",
        *(f"compute at {t:.0%}" for t in TARGETS),
        "mean risk",
    ]
    rows = [
        [
            name,
            *(f"{spread_text(one[key], 1, scale=100.0)} %" for key in ("measure", *map(str, TARGETS))),
            spread_text(one["risk"], 4),
        ]
        for name, one in found.items()
    ]
    return markdown_table(head, rows)


def main() -> None:
    """Trace, train, judge; print a table for each kind of gates."""
    parser = arguments(__doc__)
    parser.add_argument("--alpha", type=float, default=0.02, help="answers that may change")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument("--json", type=Path, help="write all numbers here")
    args = parser.parse_args()
    args.set.append(f"target.alpha={args.alpha}")
    bench = Workbench.of(args)
    _, calibration, test = (bench.load(split) for split in ("train", "calibration", "test"))
    target, content = TargetConfig(alpha=args.alpha), {"machine": machine(), "samples": len(test.trace)}
    print(f"{machine()}\n{len(test.trace)} test samples, {len(set(test.image_ids))} images")
    for kind in args.kinds:
        kept = list(bench.gates(kind, *KINDS[kind]))
        names = [one.name for one in sorted((kept[0].parent / FOLDER).iterdir())]
        folders = {name: [gates.parent / FOLDER / name / "gates" for gates in kept] for name in names}
        found = judged({**folders, CHOSEN: kept}, calibration, test, target)
        choices: list[Any] = [Choice.read(gates.parent) for gates in kept]
        content[kind] = {"trainings": found, "choices": [one.chosen for one in choices]}
        chosen = "; ".join("+".join(one.chosen) for one in choices)
        print(f"\n{kind}; kept: {chosen}\n\n{table(found, args.alpha)}", flush=True)
    write_atomically(args.json or bench.work / "recipes.json", json.dumps(plain(content), indent=2) + "\n")


if __name__ == "__main__":
    main()
