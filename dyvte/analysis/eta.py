"""VTW Table 5: the bound on the KL, the K it chooses, and the accuracy there."""

from __future__ import annotations

from typing import Any

from dyvte.analysis.findings import Findings, Table
from dyvte.analysis.outcomes import difference_text, outcomes_of
from dyvte.analysis.subject import Subject
from dyvte.formatting import percentage
from dyvte.plotting import COLORS, plain_axes

DEFINITION = (
    "K is the first layer in 1..L-1 whose mean KL(exit || full) at the last prompt position is at most "
    "eta; one pass gives the curve for all eta."
)


def study(subject: Subject) -> Findings:
    """One search; every distinct K is scored once."""
    found = subject.search()
    chosen = {eta: found.within(eta) for eta in sorted(subject.config.etas, reverse=True)}
    results = subject.ask(subject.policies(*(f"fixed:{k}" for k in sorted(set(chosen.values()) - {None}))))
    outcomes = {
        k: outcomes_of(subject, results, {f"fixed-{k}": f"K = {k}"})[0]
        for k in set(chosen.values())
        if k is not None
    }
    rows, table = [], []
    for eta, k in chosen.items():
        one = None if k is None else outcomes[k]
        rows.append({"eta": eta, "k": k, "outcome": None if one is None else one.to_dict()})
        if one is None:
            table.append([f"{eta:g}", "none qualifies", "-", "-", "-", "-"])
            continue
        cells = [one.headline, f"{one.correct:.1f} %", difference_text(one.difference)]
        table.append([f"{eta:g}", str(k), *cells, percentage(one.same_answer)])
    header = ["eta (nats)", "K", subject.benchmark.name, "right answers", "against the full model"]
    return Findings(
        title=f"eta, K and accuracy: {found.num_samples} samples, {subject.num_layers} layers",
        definition=DEFINITION,
        metrics={"kl": found.kl.tolist(), "num_samples": found.num_samples, "rows": rows},
        table=Table([*header, "same answer"], table),
        paint=lambda figure: _paint(figure, rows),
        size=(6.4, 3.4),
    )


def _paint(figure: Any, rows: list[dict[str, Any]]) -> None:
    left, right = figure.subplots(1, 2)
    known = [row for row in rows if row["k"] is not None]
    left.plot([row["eta"] for row in known], [row["k"] for row in known], "o-", color=COLORS[1], ms=4)
    left.set_ylabel("K")
    right.plot(
        [row["eta"] for row in known],
        [row["outcome"]["correct"] for row in known],
        "o-",
        color=COLORS[0],
        ms=4,
    )
    right.set_ylabel("right answers, %")
    for axes in (left, right):
        axes.set_xlabel("eta, nats")
        axes.invert_xaxis()
        plain_axes(axes)
