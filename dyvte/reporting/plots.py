"""Plots of a report: scores over visual compute, exit layers, gate probabilities; png for pages, svg and pdf.

Shape letters: L decoder layers, Q question types.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from dyvte.comparison.runs import KindLayers, layers_by_kind
from dyvte.plotting import COLORS, new_figure, plain_axes
from dyvte.reporting.sections import ReportedRun, Section
from dyvte.reporting.states import MOST_KINDS as MOST_STATES
from dyvte.reporting.states import paint_states

MARKERS = "os^Dv"
FORMATS = ("png", "svg", "pdf")
MOST_KINDS = 14


@dataclass(frozen=True)
class Plot:
    """A drawn figure: its files end in :data:`FORMATS`."""

    stem: Path
    caption: str

    @property
    def png(self) -> Path:
        """The image that pages show."""
        return self.stem.with_name(f"{self.stem.name}.png")


def draw_section(section: Section, folder: Path, prefix: str) -> list[Plot]:
    """All plots of a section, their files below ``folder`` with names that start with ``prefix``.

    Raises
    ------
    ConfigError
        matplotlib is not installed.
    """
    folder.mkdir(parents=True, exist_ok=True)
    plots = []
    if any(run.hits is not None for run in section.runs):
        caption = (
            f"{section.title}: score over visual compute. Bars: 95 % interval of the difference from the "
            "full model, paired bootstrap over {section.benchmark.unit}s."
        )
        plots.append(draw(folder / f"{prefix}-curve", caption, (6.4, 4.2), lambda f: _curve(f, section)))
    for run in section.runs:
        if not run.exits_vary:
            continue
        name = f"{prefix}-{re.sub(r'[^A-Za-z0-9.+-]+', '-', run.name)}"
        if run.freezes:
            by_kind = layers_by_kind(section.questions, [run.answers])
            caption = (
                f"{section.title}, {run.name}: decoder layers that update the visual tokens, only read them, "
                "and no longer have them; means per question type."
            )
            size = (6.4, 1.4 + 0.26 * min(len(by_kind), MOST_STATES))
            plots.append(
                draw(folder / f"{name}-states", caption, size, lambda f, r=run, k=by_kind: _states(f, r, k))
            )
        kinds = section.kinds[:MOST_KINDS]
        shown = "" if len(kinds) == len(section.kinds) else f" (the {MOST_KINDS} most frequent)"
        caption = (
            f"{section.title}, {run.name}: exit layers, over all questions and per question type{shown}."
        )
        size = (7.2, 2.4 + 0.24 * len(kinds))
        plots.append(
            draw(folder / f"{name}-exits", caption, size, lambda f, r=run, q=kinds: _exits(f, section, r, q))
        )
        if run.gate_probabilities_BL is not None:
            caption = (
                f"{section.title}, {run.name}: probability to leave that each gate states, over the "
                "questions that reach it: median, quartiles and 5 to 95 %."
            )
            plots.append(draw(folder / f"{name}-gates", caption, (6.4, 3.2), lambda f, r=run: _gates(f, r)))
    return plots


def draw(stem: Path, caption: str, size: tuple[float, float], paint: Callable[[Any], None]) -> Plot:
    """Let ``paint`` fill a figure of ``size`` inches, and write it as ``stem`` with all :data:`FORMATS`.

    Parameters
    ----------
    stem
        Path without ending.
    caption
        What is seen.
    size
        Width and height.
    paint
        Fills the figure.

    Raises
    ------
    ConfigError
        matplotlib is not installed.
    """
    figure = new_figure(*size)
    import matplotlib

    # Names come from folders and data: never formulas. Fixed ids and no date keep files the same.
    with matplotlib.rc_context({"svg.hashsalt": "dyvte", "text.parse_math": False}):
        paint(figure)
        for kind in FORMATS:
            metadata = {"svg": {"Date": None}, "pdf": {"CreationDate": None}}.get(kind)
            figure.savefig(stem.with_name(f"{stem.name}.{kind}"), dpi=130, metadata=metadata)
    return Plot(stem, caption)


def _curve(figure: Any, section: Section) -> None:
    axes = figure.subplots()
    families: dict[str, list[ReportedRun]] = {}
    for run in section.runs:
        if run.hits is not None:
            families.setdefault(run.family, []).append(run)
    full = section.full
    for number, (family, runs) in enumerate(families.items()):
        color = COLORS[number % len(COLORS)]
        runs = sorted(runs, key=lambda run: run.scores.cost.visual_compute)
        compute = [100 * run.scores.cost.visual_compute for run in runs]
        values = [section.value(run) for run in runs]
        marker = MARKERS[number // len(COLORS) % len(MARKERS)]
        label = family if len(runs) > 1 else runs[0].name
        axes.plot(compute, values, f"{marker}-", ms=4, lw=1.2, color=color, label=label)
        for run, x, value in zip(runs, compute, values, strict=True):
            _interval(axes, section, run, x, value, color)
            if len(runs) > 1:
                label = f"{run.scores.cost.mean_exit_layer:.3g}"
                axes.annotate(
                    label, (x, value), (3, 5), textcoords="offset points", fontsize=7, color="#777777"
                )
    if full is not None and full.hits is not None:
        axes.axhline(section.value(full), color="#999999", lw=0.8, ls="--", zorder=0)
    axes.set_xlabel("visual compute, % of the full model (small numbers: mean exit layer)")
    axes.set_ylabel(f"{section.title}: {section.benchmark.score_name}")
    axes.set_xlim(0, 103)
    plain_axes(axes)
    axes.legend(frameon=False, fontsize=8)


def _interval(axes: Any, section: Section, run: ReportedRun, x: float, value: float, color: str) -> None:
    against = section.against.get(run.name)
    if against is None or against.difference is None or run.is_full:
        return
    base = against.difference.mean_b
    ends = [base + against.difference.low, base + against.difference.high]
    axes.plot([x, x], ends, "-", color=color, lw=1, alpha=0.7)
    axes.plot([x, x], ends, "_", color=color, ms=5, alpha=0.7)


def _exits(figure: Any, section: Section, run: ReportedRun, kinds: Sequence[str]) -> None:
    top, bottom = figure.subplots(
        2, 1, sharex=True, gridspec_kw={"height_ratios": [1.6, max(1.0, 0.24 * len(kinds))]}
    )
    layers = np.arange(run.scores.cost.num_layers + 1)
    top.bar(layers, 100 * run.exit_shares(), color=COLORS[0], width=0.8)
    top.set_ylabel("questions, %")
    plain_axes(top)
    shares_QL = np.stack([run.exit_shares([q.kind == kind for q in section.questions]) for kind in kinds])
    bottom.imshow(100 * shares_QL, aspect="auto", cmap="Reds", vmin=0, interpolation="nearest")
    bottom.set_yticks(range(len(kinds)), [_short(kind) for kind in kinds], fontsize=7)
    bottom.set_xlabel("exit layer (the last: never)")
    bottom.set_xticks(layers if len(layers) <= 20 else layers[:: max(1, len(layers) // 16)])


def _states(figure: Any, run: ReportedRun, kinds: Mapping[str, KindLayers]) -> None:
    axes = figure.subplots()
    paint_states(axes, kinds, run.scores.cost.num_layers)
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=3, fontsize=8)


def _gates(figure: Any, run: ReportedRun) -> None:
    axes = figure.subplots()
    probabilities_BL = run.gate_probabilities_BL
    asked = [k for k in range(probabilities_BL.shape[1]) if np.isfinite(probabilities_BL[:, k]).any()]
    levels = np.array([np.nanpercentile(probabilities_BL[:, k], [5, 25, 50, 75, 95]) for k in asked]).T
    layers = [k + 1 for k in asked]
    axes.fill_between(layers, levels[0], levels[4], color=COLORS[0], alpha=0.12, lw=0)
    axes.fill_between(layers, levels[1], levels[3], color=COLORS[0], alpha=0.25, lw=0)
    axes.plot(layers, levels[2], "o-", ms=3, color=COLORS[0])
    threshold = run.scores.run.threshold
    if threshold is not None:
        axes.axhline(threshold, color="#4d4d4d", lw=0.8, ls="--")
    axes.set_xlabel("after layer")
    axes.set_ylabel("probability to leave")
    axes.set_ylim(-0.02, 1.02)
    plain_axes(axes)


def _short(text: str, length: int = 28) -> str:
    return text if len(text) <= length else text[: length - 1] + "…"
