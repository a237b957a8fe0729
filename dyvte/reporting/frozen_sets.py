"""Tables and plots of a search for frozen layers: sets of every size, by every rule."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from dyvte.calibration.frozen_sets import RULES, Effect
from dyvte.costs.visual import frozen_share
from dyvte.files import write_atomically
from dyvte.formatting import markdown_table, percentage
from dyvte.plotting import COLORS, log_axis_with_zero, new_figure, plain_axes
from dyvte.reductions import FrozenLayers
from dyvte.tracing.frozen_search import RECORD_FILE, FoundSets

TABLE_FILE, PLOT_FILE = "frozen-sets.md", "frozen-sets.png"
_COLOR = {"answer": COLORS[0], "shortv": COLORS[2], "last": COLORS[1]}


def write_frozen_sets(found: FoundSets, folder: Path, keep: Iterable[float]) -> None:
    """Write frozen-sets.json, frozen-sets.md and frozen-sets.png.

    Parameters
    ----------
    found
        The search.
    folder
        Where to.
    keep
        Shares of answers that shall stay the same: the largest sets that keep them are named.

    Raises
    ------
    ConfigError
        matplotlib is not installed.
    """
    keep = list(keep)
    write_atomically(folder / RECORD_FILE, json.dumps(frozen_record(found, keep), indent=2) + "\n")
    parts = [frozen_table(found), choices_table(found, keep), contributions_text(found)]
    write_atomically(folder / TABLE_FILE, "\n\n".join(parts) + "\n")
    plot_frozen_sets(found, folder / PLOT_FILE)


def frozen_record(found: FoundSets, keep: Iterable[float]) -> dict[str, Any]:
    """JSON-ready: the sets of every rule, what they do and cost, and the choices."""

    def rows(effects: Sequence[Effect]) -> list[dict[str, Any]]:
        return [_row(one, found) for one in effects]

    record = {
        "num_layers": found.search.num_layers,
        "num_samples": len(found.search.num_visual_B),
        "objective": found.search.objective,
        "contributions": list(found.search.contributions),
        "sets": {rule: rows(effects) for rule, effects in found.search.sets.items()},
        "chosen": {
            str(share): {
                rule: None if (one := found.search.largest(rule, share)) is None else reduction_of(one)
                for rule in found.search.sets
            }
            for share in keep
        },
    }
    if found.held_out is not None:
        record["held_out"] = {rule: rows(effects) for rule, effects in found.held_out.items()}
        record["num_held_out"] = len(_any(found.held_out).risk_B)
    return record


def frozen_table(found: FoundSets) -> str:
    """Markdown: one row for every size; each rule's set, its risk in nats and share of same answers."""
    head = ["frozen", "visual compute"]
    for rule in found.search.sets:
        head += [f"{_short(rule)}: layers"] if rule != "last" else []
        head += [f"{_short(rule)}: risk, same answer"]
        head += ["held out"] if found.held_out is not None else []
    rows = []
    for index, first in enumerate(next(iter(found.search.sets.values()))):
        row = [str(len(first.layers)), percentage(frozen_share(found.shape, first.layers))]
        for rule, effects in found.search.sets.items():
            one = effects[index]
            row += [reduction_of(one).partition(":")[2]] if rule != "last" else []
            shown = [one] if found.held_out is None else [one, found.held_out[rule][index]]
            row += [f"{each.risk:.4f}, {percentage(each.same_answer)}" for each in shown]
        rows.append(row)
    return markdown_table(head, rows)


def choices_table(found: FoundSets, keep: Iterable[float]) -> str:
    """Markdown: the largest set of each rule that keeps each share of the answers, as a command takes it."""
    held_out = found.held_out
    head = ["keeps", "rule", "visual compute", "same answer"]
    head += ["held out", "--reduction"] if held_out is not None else ["--reduction"]
    rows = []
    for share in keep:
        for rule, effects in found.search.sets.items():
            one = found.search.largest(rule, share)
            if one is None:
                rows.append([percentage(share), RULES[rule], "no set does", *[""] * (len(head) - 3)])
                continue
            row = [percentage(share), RULES[rule], percentage(frozen_share(found.shape, one.layers))]
            row += [percentage(one.same_answer)]
            if held_out is not None:
                row += [percentage(held_out[rule][list(effects).index(one)].same_answer)]
            rows.append([*row, f"`{reduction_of(one)}`"])
    return markdown_table(head, rows)


def contributions_text(found: FoundSets) -> str:
    """ShortV's layer contributions, one after the other."""
    values = ", ".join(f"{index}: {value:.4f}" for index, value in enumerate(found.search.contributions))
    return f"Layer contributions, KL(full || frozen) at the last prompt position, nats: {values}."


def reduction_of(one: Effect) -> str:
    """A set as `--reduction` takes it."""
    return repr(FrozenLayers(one.layers))


def plot_frozen_sets(found: FoundSets, path: Path) -> None:
    """Risk and changed answers over visual compute, a curve for each rule; on held-out samples if any."""
    figure = new_figure(9.2, 4.2)
    shown = found.search.sets if found.held_out is None else found.held_out
    where = "of the search" if found.held_out is None else "held out"
    count = len(_any(shown).risk_B)
    for axes, name in zip(figure.subplots(1, 2), ("risk", "changed"), strict=True):
        for rule, effects in shown.items():
            x = [1.0, *(frozen_share(found.shape, one.layers) for one in effects)]
            y = [0.0, *(one.risk if name == "risk" else 100 * (1 - one.same_answer) for one in effects)]
            axes.plot(x, y, "o-", ms=3, lw=1.4, color=_COLOR[rule], label=RULES[rule])
        log_axis_with_zero(axes, 1e-3 if name == "risk" else 1.0)
        axes.set_xlabel("visual compute, share of the full model's")
        axes.set_ylabel("risk, nats" if name == "risk" else "answers that change, %")
        plain_axes(axes)
    axes.legend(frameon=False, fontsize=8)
    figure.suptitle(f"static sets of frozen layers; {count} samples, {where}", fontsize=10)
    figure.savefig(path, dpi=150)


def _row(one: Effect, found: FoundSets) -> dict[str, Any]:
    return {
        "reduction": reduction_of(one),
        "visual_compute": frozen_share(found.shape, one.layers),
        "risk": one.risk,
        "same_answer": one.same_answer,
    }


def _any(sets: Mapping[str, Sequence[Effect]]) -> Effect:
    return next(iter(sets.values()))[0]


def _short(rule: str) -> str:
    return {"answer": "answer", "shortv": "ShortV", "last": "last layers"}[rule]
