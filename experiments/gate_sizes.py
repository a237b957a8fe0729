"""Size against quality of gates: architectures and widths on the embedded backbone, counted for a 7B model.

All are trained with the same objective, samples, order and steps, over three seeds; the reference's shape has
the published ratio of width to hidden size (2048 / 4096) and the better of two learning rates, chosen on
calibration scenes. Judged on held-out scenes at eight budgets; differences by bootstrap over images. Shares
its work folder with budgets.py; run again it goes on where it stopped.

    python experiments/gate_sizes.py --plot docs/gate_sizes.png
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from workbench import BUDGETS, Workbench, arguments, hidden_size

from dyvte.comparison.bootstrap import PairedDifference, paired_bootstrap
from dyvte.comparison.budgets import Rule
from dyvte.comparison.records import plain
from dyvte.comparison.scenes import TracedScenes
from dyvte.comparison.tuned_gates import TunedGates
from dyvte.evaluation.latency import machine
from dyvte.formatting import difference_text, markdown_table
from dyvte.gates import GateConfig, GateStack
from dyvte.plotting import new_figure, plain_axes

SMALL = (("compact", 4), ("compact", 16), ("shared", 16), ("shared", 64), ("shared", 256))
REFERENCE_RATES = (1e-3, 5e-3)
LAYERS_7B, HIDDEN_7B, WIDTH_7B = 32, 4096, 2048
SHOWN = (1, 3, 5)  # budgets of the table: 33.6, 50.7 and 67.9 %


def parameters_7b(architecture: str, width: int) -> int:
    """Parameters of such gates for a LLaMA-7B decoder; nothing is allocated."""
    config = GateConfig(
        num_layers=LAYERS_7B, hidden_size=HIDDEN_7B, architecture=architecture, gate_hidden_size=width
    )
    with torch.device("meta"):
        return sum(parameter.numel() for parameter in GateStack(config).parameters())


def name_of(architecture: str, width: int) -> str:
    """Work folder stem; a default width goes by the architecture alone, as in budgets.py."""
    default = GateConfig(num_layers=1, hidden_size=1, architecture=architecture).gate_hidden_size
    return architecture if width == default else f"{architecture}-{width}"


def reference_gates(bench: Workbench, width: int, calibration: TracedScenes) -> list[TunedGates]:
    """The reference's shape under our objective, at its better learning rate."""
    shape = ("gates.architecture=reference", f"gates.hidden_size={width}")
    tried = {
        f"reference-shape-{rate:g}": (*shape, f"optimizer.learning_rate={rate}") for rate in REFERENCE_RATES
    }
    return bench.best(tried, calibration).gates


def judged(gates: Sequence[TunedGates], test: TracedScenes) -> dict[str, Tensor]:
    """Risk and same answer on the test scenes, each (C, R, B): budgets, seeds, samples."""
    rule = Rule.of("", *(one.points_on(test) for one in gates))
    return {
        metric: torch.stack([rule.values_RB(getattr(test.trace, metric), budget) for budget in BUDGETS])
        for metric in ("risk", "same_answer")
    }


def row_of(
    architecture: str, width: int, gates: Sequence[TunedGates], test: TracedScenes, base: Tensor | None
) -> tuple[dict[str, Any], Tensor]:
    """One line of the table, and the risk by budget, seed and sample; ``base`` is the reference's."""
    values = judged(gates, test)
    risk_CRB = values["risk"]
    by_seed = risk_CRB.mean((0, 2))
    at_7b = WIDTH_7B if architecture == "reference" else width
    row: dict[str, Any] = {
        "architecture": architecture,
        "width": width,
        "parameters": gates[0].num_parameters,
        "parameters_7b": parameters_7b(architecture, at_7b),
        "width_7b": at_7b,
        "risk": float(by_seed.mean()),
        "risk_std": float(by_seed.std()) if len(by_seed) > 1 else 0.0,
        "risk_at": [float(risk_CRB[c].mean()) for c in SHOWN],
        "same_answer_at": [float(values["same_answer"][c].mean()) for c in SHOWN],
    }
    if base is not None:
        ids = test.image_ids
        found = [paired_bootstrap(a, b, ids) for a, b in zip(risk_CRB.mean(1), base.mean(1), strict=True)]
        overall = paired_bootstrap(risk_CRB.mean((0, 1)), base.mean((0, 1)), ids)
        row["minus_reference"] = plain(overall)
        row["worst_upper_bound"] = max(d.high for d in found)
        row["strictly_better"] = sum(d.high < 0 for d in found)
    return row, risk_CRB


def table(rows: Sequence[dict[str, Any]]) -> str:
    """The rows as Markdown."""
    shown = [f"{BUDGETS[c]:.0%}" for c in SHOWN]
    head = ["gates", "parameters at 7B", "of the reference's", "mean risk"]
    head += [f"risk at {share}" for share in shown] + [f"same answer at {share}" for share in shown]
    head += ["risk minus reference's shape", "worst upper bound", "strictly better"]
    whole = parameters_7b("reference", WIDTH_7B)
    lines = []
    for row in rows:
        line = [
            f"{row['architecture']}, width {row['width_7b']}",
            f"{row['parameters_7b'] / 1e6:.2f} M",
            f"{row['parameters_7b'] / whole:.2%}",
            f"{row['risk']:.4f} ± {row['risk_std']:.4f}",
            *(f"{value:.4f}" for value in row["risk_at"]),
            *(f"{value:.1%}" for value in row["same_answer_at"]),
        ]
        if "minus_reference" in row:
            found = PairedDifference(**row["minus_reference"])
            line += [difference_text(found, 4), f"{row['worst_upper_bound']:+.4f}"]
            line.append(f"{row['strictly_better']} of {len(BUDGETS)}")
        else:
            line += ["", "", ""]
        lines.append(line)
    return markdown_table(head, lines)


def plot(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Mean risk over parameters at 7B, with the deviation over seeds."""
    figure = new_figure(6.2, 4.2)
    axes = figure.subplots()
    colors = {"reference": "#4d4d4d", "compact": "#1f77b4", "shared": "#d62728"}
    for architecture, color in colors.items():
        mine = [row for row in rows if row["architecture"] == architecture]
        axes.errorbar(
            [row["parameters_7b"] for row in mine],
            [row["risk"] for row in mine],
            [row["risk_std"] for row in mine],
            fmt="o-", color=color, capsize=3, label=architecture,
        )  # fmt: skip
        for row in mine:
            place = (row["parameters_7b"], row["risk"])
            axes.annotate(f"{row['width_7b']}", place, (4, 5), textcoords="offset points", fontsize=8)
    axes.axvline(0.01 * parameters_7b("reference", WIDTH_7B), color="#999999", lw=0.8, ls=":")
    axes.set_xscale("log")
    axes.set_xlabel("gate parameters at 7B (number: width; dotted: 1 % of the reference)")
    axes.set_ylabel("mean risk over eight budgets, nats")
    axes.legend(frameon=False)
    plain_axes(axes)
    figure.savefig(path, dpi=130)


def main() -> None:
    """Train, judge, write table and plot."""
    args = arguments(__doc__).parse_args()
    bench = Workbench.of(args)
    width = hidden_size(bench.traces("train")) // 2
    calibration, test = bench.load("calibration"), bench.load("test")
    first, base = row_of("reference", width, reference_gates(bench, width, calibration), test, None)
    rows = [first]
    for architecture, small in SMALL:
        name = name_of(architecture, small)
        shape = [f"gates.architecture={architecture}"]
        shape += [] if name == architecture else [f"gates.hidden_size={small}"]
        gates = bench.best({name: shape}, calibration).gates
        rows.append(row_of(architecture, small, gates, test, base)[0])
    (args.work / "gate_sizes.json").write_text(json.dumps(rows, indent=2) + "\n", encoding="utf-8")
    plot(rows, args.plot or args.work / "gate_sizes.png")
    print(table(rows))
    print(f"\n{len(test.questions)} samples about {len(set(test.image_ids))} images; {machine()}")


if __name__ == "__main__":
    main()
