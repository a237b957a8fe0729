"""Search a plan: trace every combination of reductions once, judge all plans, choose one for each budget."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

from dyvte.backbones import Backbone
from dyvte.backbones.sizes import decoder_shape
from dyvte.comparison.plans import JudgedPlan, PlanJudge, choose, front, traces_of
from dyvte.files import write_atomically
from dyvte.formatting import markdown_table
from dyvte.gates import GateStack
from dyvte.plotting import new_figure
from dyvte.reductions import parse_reductions
from dyvte.teacher import TraceStore

PLANS_FILE, TABLE_FILE, PLOT_FILE = "plans.json", "plans.md", "plans.png"


@dataclass(frozen=True)
class PlanSearch:
    """All plans of a search, judged on its calibration samples, and the choice for each budget."""

    judged: tuple[JudgedPlan, ...]
    budgets: tuple[float, ...]
    num_samples: int

    @property
    def chosen(self) -> dict[float, JudgedPlan | None]:
        """The plan of least risk within each budget."""
        return {budget: choose(self.judged, budget) for budget in self.budgets}

    def table(self) -> str:
        """Markdown: the choice for each budget beside the best single method."""
        rows = []
        for budget, best in self.chosen.items():
            single = choose([one for one in self.judged if one.plan.kind != "combined"], budget)
            for label, one in (("chosen", best), ("best single method", single)):
                rows.append([f"{budget:.0%}", label, *_cells(one)])
        head = ["budget", "", "policy", "reduction", "visual compute", "risk (nats)", "same answer"]
        return markdown_table(head, rows)

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return {
            "num_samples": self.num_samples,
            "chosen": {str(b): None if one is None else one.row() for b, one in self.chosen.items()},
            "front": [one.row() for one in front(self.judged)],
            "plans": [one.row() for one in self.judged],
        }

    def write(self, folder: Path) -> None:
        """plans.json, plans.md, plans.png."""
        write_atomically(folder / PLANS_FILE, json.dumps(self.to_dict(), indent=2) + "\n")
        write_atomically(folder / TABLE_FILE, self.table() + "\n")
        plot_plans(self, folder / PLOT_FILE)


def combinations(num_layers: int, profile: str | None = None, num_heads: int = 0) -> list[str]:
    """Combinations of reductions worth a look: FastV early or later, YOPO mild or strong, and both.

    Parameters
    ----------
    profile
        Folder of a visual profile: heads and neurons are then chosen by it. None: no heads, the first
        neurons.
    """
    early, later = 1, max(2, num_layers // 4)
    fastv = ["none", f"fastv:{early}:0.5", f"fastv:{later}:0.5", f"fastv:{later}:0.75"]
    ranked = "" if profile is None else f":{profile}"
    yopo = ["none", f"ffn:0.5{ranked}", "neighbours:2"]
    if profile is not None and num_heads:
        kept = round(0.75 * num_heads * 2) / 2
        yopo += [f"neighbours:2+heads:{profile}:{kept:g}+ffn:{share}{ranked}" for share in (0.5, 0.25)]
    else:
        yopo += [f"neighbours:2+ffn:{share}{ranked}" for share in (0.5, 0.25)]
    found = []
    for pair in product(fastv, yopo):
        parts = [part for part in pair if part != "none"]
        found.append("+".join(parts) or "none")
    return found


def search_plans(
    backbone: Backbone,
    root: Path,
    reductions: Sequence[str],
    budgets: Sequence[float],
    gates: GateStack | None = None,
) -> PlanSearch:
    """Judge all plans on the traces below `root`; they must be complete (see `traces_of`).

    Raises
    ------
    CheckpointError
        If traces are missing.
    """
    judged: list[JudgedPlan] = []
    num_samples = 0
    for judge in judges(backbone, root, reductions, gates):
        num_samples = len(judge.trace)
        judged += [*judge.fixed(), *judge.learned()]
    return PlanSearch(tuple(judged), tuple(budgets), num_samples)


def judges(
    backbone: Backbone, root: Path, reductions: Sequence[str], gates: GateStack | None = None
) -> Iterator[PlanJudge]:
    """One judge for each combination of reductions."""
    shape = decoder_shape(backbone.model.config)
    for text in reductions:
        store = TraceStore.open(traces_of(root, text))
        accepted = parse_reductions(text)
        for reduction in accepted:
            reduction.check(backbone.num_layers)
            reduction.check_backbone(backbone)
        yield PlanJudge(text, accepted, store.trace(), shape, gates, store.manifest.features)


def plot_plans(found: PlanSearch, path: Path) -> None:
    """Risk over visual compute: every plan, the front, and the front of single methods."""
    figure = new_figure(6.4, 4.4)
    axes = figure.subplots()
    singles = [one for one in found.judged if one.plan.kind != "combined"]
    axes.scatter(
        [one.compute for one in found.judged],
        [one.risk for one in found.judged],
        s=5,
        color="#bbbbbb",
        label="all plans",
    )
    for name, plans, colour in (("single methods", singles, "#1f77b4"), ("all", found.judged, "#d62728")):
        best = front(plans)
        axes.step([p.compute for p in best], [p.risk for p in best], where="post", color=colour, lw=1.4)
        axes.plot([], [], color=colour, label=f"front, {name}")
    for budget in found.budgets:
        axes.axvline(budget, color="#999999", lw=0.6, ls=":")
    axes.set_yscale("symlog", linthresh=1e-3)
    axes.set_ylim(bottom=0)
    axes.set_xlabel("visual compute, share of the full model's")
    axes.set_ylabel("risk, nats")
    axes.set_title(f"{len(found.judged)} plans on {found.num_samples} calibration samples", fontsize=10)
    axes.legend(frameon=False, fontsize=8)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150)


def _cells(one: JudgedPlan | None) -> list[str]:
    if one is None:
        return ["none is cheap enough", "", "", "", ""]
    same = float(one.same_answer_B.mean())
    return [one.plan.policy, one.plan.reduction, f"{one.compute:.1%}", f"{one.risk:.4f}", f"{same:.1%}"]
