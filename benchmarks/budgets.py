"""Risk of the gates at eight budgets beside fixed K, a question-only router and the reference's rule.

On the embedded backbone and held-out scenes, three seeds. Everything is chosen on calibration scenes: the
gates' shape, thresholds, the hull of fixed K, the router's kind, objective and learning rate (for every
budget anew), and the learning rate of the reference's rule. Run again it goes on where it stopped.

    python -m dyvte.data.scenes --output data/scenes --test 2400
    python benchmarks/budgets.py --plot docs/budgets.png
"""

from __future__ import annotations

import json
from collections.abc import Sequence

from gate_training import Bench, bench_arguments, hidden_size, mean_risk

from dyvte.calibration.operating_points import fixed_points
from dyvte.comparison.baselines import (
    GateContender,
    best_router,
    train_router_candidates,
    training_settings,
)
from dyvte.comparison.budget_plot import plot_budgets
from dyvte.comparison.budgets import BUDGETS, Rule, budget_markdown, budget_report
from dyvte.comparison.question_features import router_features
from dyvte.comparison.router import oracle_points, router_steps
from dyvte.comparison.scenes import TracedScenes
from dyvte.comparison.traces import ORACLE_LAMS
from dyvte.evaluation.latency import machine
from dyvte.evaluation.runner import EvalConfig, load_asker
from dyvte.progress import progress

OUR_SHAPES = ("compact", "shared")
REFERENCE = "objective.name=reference_label"


def gates_rule(name: str, gates: Sequence[GateContender], test: TracedScenes) -> Rule:
    """Gates of all seeds on the test scenes."""
    return Rule.of(name, *(one.points_on(test) for one in gates))


def our_gates(bench: Bench, calibration: TracedScenes) -> list[GateContender]:
    """Gates of the configuration, in the shape that does better on the calibration scenes."""
    tried = {
        shape: bench.contenders(shape, calibration, f"gates.architecture={shape}") for shape in OUR_SHAPES
    }
    best = min(tried, key=lambda shape: mean_risk(tried[shape], calibration, BUDGETS))
    print(f"[budgets] our gates: {best}", flush=True)
    return tried[best]


def reference_rules(bench: Bench, calibration: TracedScenes, test: TracedScenes) -> list[Rule]:
    """The published rule on the data's answers: its own schedule and shape, and a stronger variant.

    The published rule leaves where p > 0.5; here its threshold is swept as ours is, which is its strongest
    form. Its learning rate is the better of two, by mean risk on the calibration scenes; the variant has
    that of the configuration.
    """
    store = bench.traces("train", "teacher.label_source=data", name="train-data")
    width = hidden_size(store) // 2  # 2048 of 4096
    data = "teacher.label_source=data"
    own = (REFERENCE, "objective.one_layer_per_step=true", "gates.architecture=reference")
    variants = {
        "reference rule": ((1e-3, 5e-3), (data, *own, f"gates.hidden_size={width}")),
        "reference rule, all layers, compact": (
            (bench.settings().optimizer.learning_rate,),
            (data, REFERENCE, "gates.architecture=compact"),
        ),
    }
    rules = []
    for name, (rates, overrides) in variants.items():
        tried = {}
        for rate in rates:
            label = f"{name.replace(', ', '-').replace(' ', '-')}-{rate:g}"
            tried[rate] = bench.contenders(
                label, calibration, *overrides, f"optimizer.learning_rate={rate}", trace="train-data"
            )
        best = min(tried, key=lambda rate: mean_risk(tried[rate], calibration, BUDGETS))
        print(f"[budgets] {name}: learning rate {best:g}", flush=True)
        rules.append(gates_rule(name, tried[best], test))
    return rules


def router_rule(
    bench: Bench,
    ours: Sequence[GateContender],
    train: TracedScenes,
    calibration: TracedScenes,
    test: TracedScenes,
) -> Rule:
    """The question-only router, the best candidate for each budget."""
    asker = load_asker(
        EvalConfig(model=bench.settings().model, benchmark="gqa", data=bench.scenes, output=bench.work)
    )
    features = router_features(asker, train.questions)
    tuned = [training_settings(one.gates, len(train.questions)) for one in ours]
    steps = len(features) * sum(router_steps(len(train.questions), settings) for settings in tuned)
    seeds = []
    with progress(steps, "question-only routers", "step") as advance:
        for settings in tuned:
            candidates = train_router_candidates(features, train, calibration, settings, advance)
            seeds.append(
                lambda budget, c=candidates: best_router(c, budget).points(
                    test.questions, test.trace.num_visual
                )
            )
    return Rule("question-only router", tuple(seeds))


def main() -> None:
    """Train, compare, write tables and plot."""
    args = bench_arguments(__doc__).parse_args()
    bench = Bench.of(args)
    train, calibration, test = (bench.load(split) for split in ("train", "calibration", "test"))
    ours = our_gates(bench, calibration)
    rivals = [
        Rule.of("fixed K", fixed_points(calibration.trace.risk, test.trace.num_visual)),
        router_rule(bench, ours, train, calibration, test),
        *reference_rules(bench, calibration, test),
    ]
    oracle = oracle_points(test.trace.risk, test.trace.num_visual, ORACLE_LAMS)
    report = budget_report(test, gates_rule("gates", ours, test), rivals, oracle, num_draws=args.draws)
    report["machine"] = dict(machine())
    (args.work / "budgets.json").write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    text = budget_markdown(report)
    (args.work / "budgets.md").write_text(text + "\n", encoding="utf-8")
    plot_budgets(report, args.plot or args.work / "budgets.png")
    print(text)
    print(f"\n{report['num_samples']} samples about {report['num_images']} images; {report['machine']}")


if __name__ == "__main__":
    main()
