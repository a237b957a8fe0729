"""``dyvte report``: what stands in the report, in which order."""

from __future__ import annotations

import dataclasses
import io
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

import dyvte
from dyvte.errors import ConfigError
from dyvte.evaluation.generation import pictures
from dyvte.files import write_atomically
from dyvte.formatting import number, percentage
from dyvte.reporting.page import Case, Heading, Page, Picture, Table, Text
from dyvte.reporting.plots import Plot, draw_section
from dyvte.reporting.runs import Example, ReportedRun, Section, read_sections, worst_examples
from dyvte.tasks.base import Question

THUMBNAIL = 256
"""Longest side of an example's image, in pixels."""

_LONGEST_ANSWER = 300


@dataclass(frozen=True)
class ReportConfig:
    """Settings of ``dyvte report``."""

    runs: tuple[Path, ...]
    output: Path
    data: Mapping[str, Path]
    num_examples: int = 12
    num_draws: int = 2000
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("num_examples", "num_draws"):
            if getattr(self, name) < (name == "num_draws"):
                raise ConfigError(f"{name} must not be {getattr(self, name)}")


def write_report(config: ReportConfig) -> Path:
    """Write report.html, report.md, report.json, plots and example images; the path of the page."""
    sections, unfinished = read_sections(
        config.runs, config.data, num_draws=config.num_draws, seed=config.seed
    )
    try:
        config.output.mkdir(parents=True, exist_ok=True)
        page = Page("dyvte report", _opening(sections, unfinished))
        for index, section in enumerate(sections):
            prefix = f"{index + 1}-{section.benchmark.name}"
            page.blocks.extend(_section_blocks(section, config, prefix))
        write_atomically(config.output / "report.html", page.html())
        write_atomically(config.output / "report.md", page.markdown(config.output))
        figures = json.dumps([section_figures(section) for section in sections], indent=2)
        write_atomically(config.output / "report.json", figures + "\n")
    except OSError as error:
        raise ConfigError(f"cannot write to {config.output}: {error.strerror or error}") from error
    return config.output / "report.html"


def _opening(sections: Sequence[Section], unfinished: Sequence[Path]) -> list[Any]:
    versions = sections[0].runs[0].scores.run.values
    made = ", ".join(f"{name} {versions.get(name)}" for name in ("torch", "transformers"))
    blocks: list[Any] = [
        Text(
            f"dyvte {dyvte.__version__}; runs made with dyvte {versions.get('dyvte')}, {made}. "
            "Visual compute: what is spent on visual tokens, as a share of the full model's. TFLOPs: prefill "
            "of the decoder layers, as VTW and DyVTE count (two per multiply-add, all prompt tokens) and, "
            "behind the stroke, as PyramidDrop does (one per multiply-add, visual tokens alone). Times are "
            "those of a whole batch; their ratio is to the model without anything installed, in turns."
        )
    ]
    if unfinished:
        names = ", ".join(str(path) for path in unfinished)
        blocks.append(Text(f"Not finished, and not in this report: {names}."))
    if len(sections) > 1:
        blocks += [Heading("Summary"), _summary(sections)]
        blocks.append(
            Text(
                "Compute, TFLOPs and time to the first token: shares of the full model, means of benchmarks."
            )
        )
    return blocks


def _summary(sections: Sequence[Section]) -> Table:
    """Policies by benchmarks: score and share of the full model's; means of costs over the benchmarks."""
    names = list(dict.fromkeys(run.name for section in sections for run in section.runs))
    header = ["policy"]
    for section in sections:
        header += [section.title, "kept"]
    rows = []
    for name in names:
        row, found = [name], []
        for section in sections:
            run = next((run for run in section.runs if run.name == name), None)
            against = section.against.get(name)
            row += ["-" if run is None else run.scores.headline]
            row += [percentage(None if against is None else against.kept)]
            found += [] if run is None else [run.scores]
        times = [scores.timing.times.first_token_ratio for scores in found if scores.timing]
        row.append(percentage(_mean([scores.cost.visual_compute for scores in found])))
        row.append(percentage(_mean([scores.cost.prefill["vtw"].ratio for scores in found])))
        rows.append([*row, number(_mean(times))])
    return Table([*header, "visual compute", "TFLOPs", "first token"], rows)


def _mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None


def _section_blocks(section: Section, config: ReportConfig, prefix: str) -> list[Any]:
    blocks: list[Any] = [
        Heading(section.title),
        Text(f"{len(section.questions)} questions; backbone {section.backbone}."),
        comparison_table(section),
    ]
    if any(_differs(section.value(run), run.scores.headline) for run in section.runs):
        blocks.append(
            Text(
                f"The {section.title} column is the benchmark's own figure; what is kept, and the "
                f"differences, are of {section.unit} over single questions."
            )
        )
    if section.full is None:
        blocks.append(
            Text("No run of the full model (--policy never without a reduction): nothing to compare with.")
        )
    elif len(section.runs) > 1:
        blocks += [Heading("Agreement with the full model", 3), agreement_table(section)]
    drawn = draw_section(section, config.output / "plots", prefix)
    blocks += [Heading("Plots", 3), *(Picture(plot.png, _caption(plot)) for plot in drawn)] if drawn else []
    examples = worst_examples(section, config.num_examples)
    if examples:
        blocks += [Heading("Examples, worst disagreements with the full model first", 3)]
        folder = config.output / "images"
        blocks += [_case(section, one, folder, f"{prefix}-{n}") for n, one in enumerate(examples, start=1)]
    return blocks


def _differs(value: float | None, headline: str) -> bool:
    """Whether the score that intervals are of is another than the one shown."""
    try:
        return value is not None and abs(value - float(headline)) > 0.051
    except ValueError:
        return True


def comparison_table(section: Section) -> Table:
    """One row per policy and reduction: score, what is kept, compute, time, memory."""
    header = [
        *("policy", section.title, "kept", "difference [95 %]", "mean exit layer", "visual compute"),
        *("TFLOPs", "first token, ms", "ratio", "per token, ms", "KV MB"),
    ]
    return Table(header, [_row(section, run) for run in section.runs])


def _row(section: Section, run: ReportedRun) -> list[str]:
    cost, against = run.scores.cost, section.against.get(run.name)
    times = None if run.scores.timing is None else run.scores.timing.times
    return [
        run.name,
        run.scores.headline,
        percentage(None if against is None else against.kept),
        _difference(section, run),
        number(cost.mean_exit_layer),
        percentage(cost.visual_compute),
        f"{cost.prefill['vtw'].tflops:.3g} / {cost.prefill['pyramiddrop'].tflops:.3g}",
        number(times and times.time_to_first_token_ms, 1),
        number(times and times.first_token_ratio),
        number(times and times.time_per_token_ms, 1),
        f"{cost.kv_bytes_per_question / 1e6:.3g}",
    ]


def _difference(section: Section, run: ReportedRun) -> str:
    against = section.against.get(run.name)
    if run.is_full or against is None or against.difference is None:
        return "-"
    found = against.difference
    return f"{found.difference:+.2f} [{found.low:+.2f}, {found.high:+.2f}]"


def agreement_table(section: Section) -> Table:
    """How far each run's answers are the full model's, and which right answers were lost and won."""
    header = ["policy", "same answer", "right answers lost", "right answers won"]
    rows = []
    for run in section.runs:
        if run.is_full:
            continue
        one = section.against[run.name]
        counts = ["-" if count is None else str(count) for count in (one.lost, one.won)]
        rows.append([run.name, percentage(one.same_answer), *counts])
    return Table(header, rows)


def _caption(plot: Plot) -> str:
    return f"{plot.caption} Also as {plot.stem.name}.svg and .pdf."


def _case(section: Section, example: Example, folder: Path, name: str) -> Case:
    question = section.questions[example.index]
    lines = [f"{question.kind} · {question.id}" if question.kind else question.id, question.text]
    lines.append("gold: not public" if question.answer is None else f"gold: {_cut(str(question.answer))}")
    rows = []
    for run in section.runs:
        answer = run.answers[example.index]
        worth = "-" if run.hits is None else _worth(run.hits[example.index])
        layer = "no image" if answer.exit_layer < 0 else str(answer.exit_layer)
        rows.append([run.name, _cut(answer.prediction), worth, layer])
    image = _thumbnail(question, section.num_frames, folder, name)
    return Case(image, lines, Table(["policy", "answer", "right", "exit layer"], rows))


def _worth(hit: float) -> str:
    return {0.0: "no", 1.0: "yes"}.get(hit, f"{hit:.2f}")


def _cut(text: str) -> str:
    return text if len(text) <= _LONGEST_ANSWER else text[: _LONGEST_ANSWER - 1] + "…"


def _thumbnail(question: Question, num_frames: int, folder: Path, name: str) -> Path | None:
    """The question's first image, or its video's first frame, small."""
    shown = pictures(question, num_frames)
    if not shown:
        return None
    folder.mkdir(parents=True, exist_ok=True)
    image = shown[0].copy()
    image.thumbnail((THUMBNAIL, THUMBNAIL))
    content = io.BytesIO()
    image.convert("RGB").save(content, "JPEG", quality=82)
    path = folder / f"{re.sub(r'[^a-z0-9-]+', '-', name)}.jpg"
    write_atomically(path, content.getvalue())
    return path


def section_figures(section: Section) -> dict[str, Any]:
    """Every figure of a section, JSON-ready."""
    return {
        "benchmark": section.benchmark.name,
        "backbone": section.backbone,
        "num_questions": len(section.questions),
        "runs": {run.name: _run_figures(section, run) for run in section.runs},
    }


def _run_figures(section: Section, run: ReportedRun) -> dict[str, Any]:
    against, scores = section.against.get(run.name), run.scores.to_dict()
    probabilities_BL = run.gate_probabilities_BL
    return {
        "folder": str(run.folder),
        "family": run.family,
        "headline": run.scores.headline,
        "value": section.value(run),
        "against_full": None if against is None else dataclasses.asdict(against),
        **{key: scores[key] for key in ("mean_exit_layer", "visual_compute", "prefill", "timing")},
        "exit_shares": run.exit_shares().tolist(),
        "exit_shares_per_kind": {
            kind: run.exit_shares([q.kind == kind for q in section.questions]).tolist()
            for kind in section.kinds
        },
        "mean_gate_probability": None if probabilities_BL is None else _means(probabilities_BL),
    }


def _means(values_BL: np.ndarray) -> list[float | None]:
    """Mean of every column over its finite entries; None for a column without any."""
    columns = (column[np.isfinite(column)] for column in values_BL.T)
    return [float(column.mean()) if len(column) else None for column in columns]
