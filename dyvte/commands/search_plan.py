"""Choose a policy and reductions for a budget of visual compute, by held-out risk on calibration data.

Each combination of reductions is traced once, against the un-pruned model. From that every static schedule
is judged, a freeze layer F and an exit layer K (--policy freeze:F:K, fixed:K), and every threshold of the
gates. Freeze layers are thinned to about eight unless --freeze-every or --teacher.freeze-layers say which;
--exits-only leaves them away: every schedule then freezes where it leaves.

The same command started again goes on where it stopped. Written to --output: plans.json, plans.md, plans.png,
and the traces. The choice is then named on other command lines.
"""

from __future__ import annotations

import argparse

from dyvte.commands.training_options import add_tracing, tracing_config_of

EXAMPLES = """
dyvte profile --config configs/embedded.yaml \\
    --data_path data/scenes/instruct/train.json --output runs/profile
dyvte search-plan --config configs/embedded.yaml --data_path data/scenes/instruct/calibration.json \\
    --gates runs/quickstart/seed0/gates --profile runs/profile --budget 0.5 --budget 0.33 \\
    --output runs/plans
dyvte eval --config configs/eval_embedded.yaml --policy freeze:3:9 --reduction neighbours:2
"""

ABOUT_FREEZES = 8


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of ``dyvte search-plan``."""
    from dyvte.reductions import REDUCTIONS

    parser.add_argument(
        "--budget",
        type=float,
        action="append",
        required=True,
        help="share of the full model's visual compute; several (required)",
    )
    parser.add_argument("--gates", help="gates checkpoint; without it static schedules alone are tried")
    parser.add_argument("--profile", help="folder that dyvte profile wrote")
    parser.add_argument(
        "--reduction",
        action="append",
        help="combination to try, such as fastv:2:0.5+neighbours:2; several; default: a set for it. "
        f"Forms: {' | '.join(REDUCTIONS.usages())}",
    )
    parser.add_argument("--output", required=True, help="folder for traces and results (required)")
    parser.add_argument(
        "--exits-only", action="store_true", help="no freeze layers: every schedule freezes where it leaves"
    )
    parser.add_argument("--dry-run", action="store_true", help="list what would be traced, and exit")
    add_tracing(parser, omit=("teacher.reductions",))


def run(args: argparse.Namespace) -> int:
    """Trace, judge, choose; print the choice."""
    from dataclasses import replace
    from pathlib import Path

    from dyvte.backbones import describe, open_backbone, read_model_config
    from dyvte.backbones.sizes import decoder_shape
    from dyvte.comparison.plan_search import combinations, search_plans
    from dyvte.comparison.plans import traces_of
    from dyvte.distributed import own_device
    from dyvte.errors import ConfigError
    from dyvte.gates import GateStack
    from dyvte.reductions import parse_reductions
    from dyvte.reporting.plans import search_table, write_search
    from dyvte.tracing import trace_data

    cfg = tracing_config_of(args)
    root = Path(args.output)
    shape = decoder_shape(read_model_config(cfg.model))
    teacher = cfg.teacher
    if args.exits_only:
        teacher = replace(teacher, freeze_every=None, freeze_layers=())
    elif teacher.freeze_every is None and not teacher.freeze_layers:
        teacher = replace(teacher, freeze_every=max(1, round(shape.num_layers / ABOUT_FREEZES)))
    schedules = teacher.schedules(shape.num_layers)
    given = args.reduction or combinations(shape.num_layers, args.profile, shape.num_heads)
    reductions = list(dict.fromkeys(["none", *given]))
    if wrong := [budget for budget in args.budget if not 0 < budget <= 1]:
        raise ConfigError(
            f"budget {wrong[0]}: expected a share of the full model's visual compute, above 0 to 1"
        )
    # Before hours of tracing, not after.
    for text in reductions:
        for reduction in parse_reductions(text):
            reduction.check(shape.num_layers)
    if args.dry_run:
        at = f"{len(schedules.exits)} exits"
        at += f" behind {len(schedules.freezes)} freeze layers" if schedules.freezes else ""
        print(f"{len(reductions)} combinations of reductions, each traced once at {at}:")
        print("\n".join(f"  {text}" for text in reductions))
        return 0
    for index, text in enumerate(reductions):
        print(f"[{index + 1}/{len(reductions)}] {text}", flush=True)
        trace_data(replace(cfg, teacher=replace(teacher, reductions=text)), traces_of(root, text))
    gates = GateStack.from_pretrained(args.gates).eval() if args.gates else None
    model, _ = open_backbone(cfg.model, own_device())
    found = search_plans(describe(model), root, reductions, args.budget, gates)
    write_search(found, root)
    print(search_table(found))
    print(f"written: {root}")
    return 0
