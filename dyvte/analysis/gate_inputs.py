"""DyVTE Tables 4 and 7: what the gates should read, all choices trained from one trace."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from dyvte.analysis.findings import Findings, Table
from dyvte.analysis.outcomes import outcomes_of
from dyvte.analysis.subject import Subject
from dyvte.config import load_config
from dyvte.errors import ConfigError
from dyvte.formatting import difference_text, number, percentage
from dyvte.gates import DEFAULT_FEATURES, FEATURES, check_features
from dyvte.plotting import COLORS, plain_axes
from dyvte.training import TrainConfig, train

PAPER_SETS = (
    "mean_visual",
    "last_visual",
    "mean_prompt",
    "last_prompt",
    "mean_visual+last_visual",
    "mean_prompt+mean_visual",
    "last_prompt+mean_visual",
    "mean_prompt+last_visual",
    "last_prompt+last_visual",
    "mean_prompt+last_prompt",
    "mean_prompt+last_prompt+mean_visual+last_visual",
)
"""The eleven choices of the paper."""

DEFINITION = (
    "The model is traced once with all four inputs; each choice trains its gates from that trace with the "
    "same settings and seed. Scores are with threshold 0.5, as the paper's; the last two columns are "
    "held-out samples of the trace at the budget nearest to half of the visual compute."
)


def study(subject: Subject) -> Findings:
    """Trace once, train each choice, answer with each."""
    settings, chosen = _settings(subject), subject.config.feature_sets or PAPER_SETS
    trained = {text: train(_of(settings, text)) for text in chosen}
    policies = subject.policies(*(f"gates:{one.gates}" for one in trained.values()))
    results = subject.ask(policies)
    names = [named.name for named in policies]
    outcomes = outcomes_of(subject, results, dict(zip(names, chosen, strict=True)))
    rows = []
    for outcome, one in zip(outcomes, trained.values(), strict=True):
        half = min(one.summary.budgets, key=lambda row: abs(row.budget - 0.5), default=None)
        held_out = {"held_out_at_half": half and asdict(half), "held_out_samples": one.summary.num_judged}
        rows.append({"features": outcome.label, **outcome.to_dict(), **held_out})
    header = ["gates read", subject.benchmark.name, "right answers", "against the full model", "same answer"]
    header += ["mean exit layer", "visual compute", "held-out visual compute", "held-out same answer"]
    return Findings(
        title=f"Inputs of the gates, {subject.num_layers} layers",
        definition=DEFINITION,
        metrics={"rows": rows},
        table=Table(header, [_cells(outcome, row) for outcome, row in zip(outcomes, rows, strict=True)]),
        paint=lambda figure: _paint(figure, rows),
        size=(8.0, 4.0),
    )


def _settings(subject: Subject) -> TrainConfig:
    if subject.config.training is None:
        raise ConfigError(
            "this study trains gates: give --training CONFIG.yaml, such as configs/embedded.yaml"
        )
    folder = Path(subject.config.output) / "gate_inputs"
    cfg = load_config(TrainConfig, subject.config.training, [f"output_dir={folder}"])
    traces = cfg.trace_dir or folder / "trace"
    teacher = replace(cfg.teacher, features=FEATURES)
    return replace(cfg, trace_dir=traces, teacher=teacher, tracking=replace(cfg.tracking, report_to=()))


def _of(cfg: TrainConfig, text: str) -> TrainConfig:
    features = check_features(text.split("+"))
    return replace(cfg, gates=replace(cfg.gates, features=features), output_dir=cfg.output_dir / text)


def _cells(outcome: Any, row: dict[str, Any]) -> list[str]:
    half = row["held_out_at_half"]
    cells = [
        outcome.label,
        outcome.headline,
        f"{outcome.correct:.1f} %",
        difference_text(outcome.difference, 1),
    ]
    cells += [percentage(outcome.same_answer), number(outcome.exit_layer), percentage(outcome.visual_compute)]
    return [*cells, *(percentage(half and half[key]) for key in ("visual_compute", "same_answer"))]


def _paint(figure: Any, rows: list[dict[str, Any]]) -> None:
    axes = figure.subplots()
    for place, row in enumerate(rows):
        color = COLORS[0] if row["features"] == "+".join(DEFAULT_FEATURES) else COLORS[2]
        axes.barh(place, row["exit_layer"], color=color, height=0.6, alpha=0.8)
        text = f"{100 * row['same_answer']:.1f} %"
        axes.annotate(text, (row["exit_layer"], place), (4, 0), textcoords="offset points", va="center")
    axes.set_yticks(range(len(rows)), [row["features"].replace("+", " + ") for row in rows], fontsize=8)
    axes.invert_yaxis()
    axes.set_xlabel("mean exit layer; beside the bar: same answer as the full model")
    axes.margins(x=0.12)
    plain_axes(axes)
