"""Search a plan: trace every combination of reductions once, judge all plans, choose one for each budget."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

from dyvte.backbones import Backbone
from dyvte.comparison.plans import JudgedPlan, PlanJudge, choose, front, traces_of
from dyvte.errors import DataError
from dyvte.gates import GateStack
from dyvte.teacher import TraceStore

PLANS_FILE = "plans.json"


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

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return {
            "num_samples": self.num_samples,
            "chosen": {str(b): None if one is None else one.row() for b, one in self.chosen.items()},
            "front": [one.row() for one in front(self.judged)],
            "plans": [one.row() for one in self.judged],
        }


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
    """Judge all plans on the traces below ``root``; they must be complete (see `traces_of`).

    Parameters
    ----------
    backbone : the un-pruned one.
    root : folder of the search.
    reductions : combinations, as the command line knows them.
    budgets : shares of the full model's visual compute.
    gates : their thresholds are tried too; None: static schedules alone.

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
    """One judge for each combination of reductions; parameters as for `search_plans`."""
    for text in reductions:
        yield PlanJudge.on_store(backbone, text, TraceStore.open(traces_of(root, text)), gates)


def searched_reductions(root: Path) -> list[str]:
    """The combinations of reductions that a finished search tried, in its order.

    Raises
    ------
    DataError
        ``root`` holds no finished search.
    """
    path = root / PLANS_FILE
    try:
        plans = json.loads(path.read_text(encoding="utf-8"))["plans"]
        return list(dict.fromkeys(plan["reduction"] for plan in plans))
    except OSError as error:
        raise DataError(
            f"no plans at {path} ({error.strerror or error}): run dyvte search-plan --output {root}"
        ) from error
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path} is not what dyvte search-plan writes ({error!r})") from error
