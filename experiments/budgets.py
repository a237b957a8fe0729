"""Risk of the gates at eight budgets beside fixed K, a question-only router and the reference's rule.

On the embedded backbone and held-out scenes, three seeds: trains what is compared, then asks `dyvte compare`
for the tables. Everything is chosen on calibration scenes: the gates' shape, thresholds, the hull of fixed K,
the router's kind, objective and learning rate (for every budget anew), and the learning rate of the
reference's rule. Run again it goes on where it stopped.

    python -m dyvte.data.scenes --output data/scenes --test 2400
    python experiments/budgets.py --plot docs/budgets.png
"""

from __future__ import annotations

from pathlib import Path

from reference import reference_rules
from workbench import Workbench, arguments

from dyvte.comparison.compare import compare
from dyvte.comparison.config import CompareConfig
from dyvte.comparison.scenes import TracedScenes
from dyvte.reporting.budgets import budget_markdown, plot_budgets
from dyvte.reporting.comparison import write_comparison

OUR_SHAPES = ("compact", "shared")


def our_gates(bench: Workbench, calibration: TracedScenes) -> list[Path]:
    """Gates of the configuration, in the shape that does better on the calibration scenes."""
    best = bench.best({shape: (f"gates.architecture={shape}",) for shape in OUR_SHAPES}, calibration)
    print(f"[budgets] our gates: {best.label}", flush=True)
    return best.folders


def main() -> None:
    """Train, compare, write tables and plot."""
    args = arguments(__doc__).parse_args()
    bench = Workbench.of(args)
    splits = ("train", "calibration", "test")
    traces = {f"traces_{split}": bench.traces(split) for split in splits}
    calibration = bench.load("calibration")
    ours, rules = our_gates(bench, calibration), reference_rules(bench, calibration)
    config = CompareConfig(
        model=bench.settings().model,
        gates=tuple(map(str, ours)),
        baselines=tuple(f"{name}={folder}" for name, folders in rules.items() for folder in folders),
        budgets="0.25:0.85",
        output=bench.work / "budgets",
        image_folder=bench.scenes / "images",
        num_draws=args.draws,
        **traces,
        **{f"data_{split}": bench.scenes / f"{split}.json" for split in splits},
    )
    found = compare(config)
    print(f"report: {write_comparison(found, config.output)}")
    if args.plot is not None:
        plot_budgets(found.budgets, args.plot)
    print(budget_markdown(found.budgets))
    print(f"\n{found.budgets.num_samples} samples about {found.budgets.num_images} images; {found.machine}")


if __name__ == "__main__":
    main()
