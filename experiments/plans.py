"""Plans that combine methods beside each method alone, on the embedded backbone and held-out scenes.

The plan of every method is chosen on calibration scenes, at 50, 33, 22 and 11 % visual compute: fixed K,
gates, FastV alone, YOPO alone (its layer dropping included), and any combination of them. All may mix two of
their plans, so all spend the same. Then: risk on test scenes, the difference with a 95 % paired bootstrap
over images, mean over the seeds of the gates. Run again it goes on where it stopped.

    python -m dyvte.data.scenes --output data/scenes
    python experiments/plans.py --plot docs/plans.png --json docs/plans.json
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path

from workbench import Workbench, arguments

from dyvte.backbones import Backbone, describe, open_backbone
from dyvte.comparison.compare import PLAN_BUDGETS
from dyvte.comparison.plan_compare import compare_plans
from dyvte.comparison.plans import PlanJudge, folder_name
from dyvte.comparison.records import plain
from dyvte.distributed import own_device
from dyvte.evaluation.latency import machine
from dyvte.files import write_atomically
from dyvte.gates import GateStack
from dyvte.reporting.plans import plan_markdown, plot_plans
from dyvte.teacher import TraceStore
from dyvte.tracing.search import visual_profile

# FastV alone at about these budgets: nothing but its never leaving is of interest.
FASTV_ALONE = ("fastv:4:0.84", "fastv:2:0.84", "fastv:1:0.87")


def combinations(profile: Path) -> list[str]:
    """What is traced; on this backbone FastV before layer 4 loses what nothing later brings back."""
    yopo = [f"neighbours:2+ffn:{share}:{profile}" for share in (0.5, 0.25)]
    return ["none", *yopo, "fastv:4:0.5", f"fastv:4:0.5+{yopo[0]}", *FASTV_ALONE]


def profile_of(bench: Workbench) -> Path:
    """Heads and neurons, measured on training scenes."""
    folder = bench.work / "profile"
    if not folder.is_dir():
        visual_profile(bench.settings("data.limit=100")).save_pretrained(folder)
    return folder


def traced(bench: Workbench, split: str, reduction: str, limit: int) -> TraceStore:
    """Traces of one combination."""
    print(f"[plans] {split}: {reduction}", flush=True)
    every = 1000 if reduction in FASTV_ALONE else 1
    overrides = (
        f"teacher.reductions={json.dumps(reduction)}",
        f"teacher.exit_every={every}",
        f"data.limit={limit}",
    )
    return TraceStore.open(bench.traces(split, *overrides, name=f"{split}-{folder_name(reduction)}"))


def judges(
    backbone: Backbone, stores: dict[str, TraceStore], gates: Sequence[dict[str, GateStack]]
) -> list[list[PlanJudge]]:
    """For every seed of the gates, one judge for each combination; `gates` name the combination they learned
    on, those of "none" serve all others."""
    bare = [PlanJudge.on_store(backbone, text, store) for text, store in stores.items()]
    return [
        [judge.with_gates(of_seed.get(judge.text, of_seed["none"])) for judge in bare] for of_seed in gates
    ]


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--calibration", type=int, default=600, help="calibration questions")
    parser.add_argument("--test", type=int, default=1200, help="test questions")
    parser.add_argument("--gates", type=Path, nargs="+", help="gates of each seed; default: trained here")
    parser.add_argument("--reduction", action="append", help="combinations; default: a set for this backbone")
    parser.add_argument(
        "--retrain", help="train gates on the backbone reduced by this combination too, and use them there"
    )
    parser.add_argument("--train", type=int, default=4000, help="with --retrain: training questions")
    parser.add_argument("--json", help="write all numbers here")
    args = parser.parse_args()
    bench = Workbench.of(args)
    folders = args.gates or list(bench_gates(bench))
    reductions = args.reduction or combinations(profile_of(bench))
    seeds = [{"none": GateStack.from_pretrained(folder).eval()} for folder in folders]
    if args.retrain:
        for of_seed, folder in zip(seeds, retrained(bench, args.retrain, args.train), strict=False):
            of_seed[args.retrain] = GateStack.from_pretrained(folder).eval()
    stores = {
        split: {text: traced(bench, split, text, limit) for text in reductions}
        for split, limit in (("calibration", args.calibration), ("test", args.test))
    }
    backbone = describe(open_backbone(bench.settings().model, own_device())[0])
    found = compare_plans(
        judges(backbone, stores["calibration"], seeds),
        judges(backbone, stores["test"], seeds),
        PLAN_BUDGETS,
        stores["test"]["none"].image_ids(),
        num_draws=args.draws,
    )
    print(f"\n{machine()}\n\n{plan_markdown(found)}\n")
    plot_plans(found, args.plot or args.work / "plans.png")
    if args.json:
        content = {"machine": plain(machine()), "reductions": reductions, **found.to_dict()}
        write_atomically(args.json, json.dumps(content, indent=2) + "\n")


def bench_gates(bench: Workbench) -> list[Path]:
    """Gates that learned without reductions."""
    bench.traces("train")
    return list(bench.gates("plans"))


def retrained(bench: Workbench, reduction: str, limit: int) -> list[Path]:
    """Gates of every seed that learned on the reduced backbone."""
    name = f"train-{folder_name(reduction)}"
    overrides = (f"teacher.reductions={json.dumps(reduction)}", f"data.limit={limit}")
    limited = dataclasses.replace(bench, overrides=(*bench.overrides, *overrides))
    limited.traces("train", name=name)
    return list(limited.gates(f"reduced-{folder_name(reduction)}", trace=name))


if __name__ == "__main__":
    main()
