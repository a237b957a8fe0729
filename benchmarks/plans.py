"""Plans that combine methods beside each method alone, on the embedded backbone and held-out scenes.

The plan of every method is chosen on calibration scenes, at 50, 33, 22 and 11 % visual compute: fixed K,
gates, FastV alone, YOPO alone (its layer dropping included), and any combination of them. All may mix two of
their plans, so all spend the same. Then: risk on test scenes, the difference with a 95 % paired bootstrap
over images, mean over the seeds of the gates. Run again it goes on where it stopped.

    python -m dyvte.data.scenes --output data/scenes
    python benchmarks/plans.py --plot docs/plans.png --json docs/plans.json
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path

from common import write_json
from gate_training import Bench, bench_arguments

from dyvte.backbones import Backbone, describe, open_backbone
from dyvte.backbones.sizes import decoder_shape
from dyvte.comparison.plan_compare import compare_plans, plot_comparison
from dyvte.comparison.plans import PlanJudge, folder_name
from dyvte.distributed import own_device
from dyvte.evaluation.latency import machine
from dyvte.gates import GateStack
from dyvte.reductions import parse_reductions
from dyvte.teacher import TraceStore
from dyvte.tracing.search import visual_profile

BUDGETS = (0.5, 0.33, 0.22, 0.11)
# FastV alone at about these budgets: nothing but its never leaving is of interest.
FASTV_ALONE = ("fastv:4:0.84", "fastv:2:0.84", "fastv:1:0.87")


def combinations(profile: Path) -> list[str]:
    """What is traced; on this backbone FastV before layer 4 loses what nothing later brings back."""
    yopo = [f"neighbours:2+ffn:{share}:{profile}" for share in (0.5, 0.25)]
    return ["none", *yopo, "fastv:4:0.5", f"fastv:4:0.5+{yopo[0]}", *FASTV_ALONE]


def profile_of(bench: Bench) -> Path:
    """Heads and neurons, measured on training scenes."""
    folder = bench.work / "profile"
    if not folder.is_dir():
        visual_profile(bench.settings("data.limit=100")).save_pretrained(folder)
    return folder


def traced(bench: Bench, split: str, reduction: str, limit: int) -> TraceStore:
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
    shape, traces = decoder_shape(backbone.model.config), {}
    for text, store in stores.items():
        accepted = parse_reductions(text)
        for one in accepted:
            one.check_backbone(backbone)
        traces[text] = (accepted, store.trace(), store.manifest.features)
    return [
        [
            PlanJudge(text, accepted, trace, shape, of_seed.get(text, of_seed["none"]), features)
            for text, (accepted, trace, features) in traces.items()
        ]
        for of_seed in gates
    ]


def main() -> None:
    parser = bench_arguments(__doc__)
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
    bench = Bench.of(args)
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
    image_ids = stores["test"]["none"].image_ids()
    found = compare_plans(
        judges(backbone, stores["calibration"], seeds),
        judges(backbone, stores["test"], seeds),
        BUDGETS,
        image_ids,
        draws=args.draws,
    )
    counts = f"{args.calibration} calibration, {args.test} test questions on {len(set(image_ids))} images"
    print(f"\n{machine()}\n{counts}, {len(seeds)} seeds\n\n{found.table()}\n")
    for budget in BUDGETS:
        print(f"{budget:.0%}: {found.verdict(budget)}")
    plot_comparison(found, args.plot or args.work / "plans.png", f"held-out risk; {counts}")
    setting = {"machine": machine(), "calibration": args.calibration, "test": args.test, "seeds": len(seeds)}
    write_json(args.json, {"setting": setting, "reductions": reductions, **found.to_dict()})


def bench_gates(bench: Bench) -> list[Path]:
    """Gates that learned without reductions."""
    bench.traces("train")
    return list(bench.gates("plans"))


def retrained(bench: Bench, reduction: str, limit: int) -> list[Path]:
    """Gates of every seed that learned on the reduced backbone."""
    name = f"train-{folder_name(reduction)}"
    overrides = (f"teacher.reductions={json.dumps(reduction)}", f"data.limit={limit}")
    limited = dataclasses.replace(bench, overrides=(*bench.overrides, *overrides))
    limited.traces("train", name=name)
    return list(limited.gates(f"reduced-{folder_name(reduction)}", trace=name))


if __name__ == "__main__":
    main()
