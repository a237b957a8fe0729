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
from dyvte.evaluation.generation import question_images
from dyvte.files import write_atomically
from dyvte.reporting.hard import HARD_HEADER, hard_note, hard_rows, hard_subsets
from dyvte.reporting.lengths import length_table
from dyvte.reporting.page import Example, Heading, Image, Page, Table, Text
from dyvte.reporting.plots import Plot, draw_section
from dyvte.reporting.section_tables import cost_table, score_table, summary_tables
from dyvte.reporting.sections import ReportedRun, Section, WorstExample, read_sections, worst_examples
from dyvte.reporting.tables import unanswered_note
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
        metrics = json.dumps([section_metrics(section) for section in sections], indent=2)
        write_atomically(config.output / "report.json", metrics + "\n")
    except OSError as error:
        raise ConfigError(f"cannot write to {config.output}: {error.strerror or error}") from error
    return config.output / "report.html"


def _opening(sections: Sequence[Section], unfinished: Sequence[Path]) -> list[Any]:
    versions = sections[0].runs[0].scores.run.values
    made = ", ".join(f"{name} {versions.get(name)}" for name in ("torch", "transformers"))
    blocks: list[Any] = [
        Text(
            f"dyvte {dyvte.__version__}; runs made with dyvte {versions.get('dyvte')}, {made}. "
            "Visual compute: what is spent on visual tokens, as a share of the full model's. Prefill: FLOPs "
            "of the decoder layers as VTW and DyVTE count (two per multiply-add, all prompt tokens), and of "
            "visual tokens alone as PyramidDrop does (one per multiply-add). Times are those of a whole "
            "batch; their ratio is to the model without anything installed, in turns."
        )
    ]
    if unfinished:
        names = ", ".join(str(path) for path in unfinished)
        blocks.append(Text(f"Not finished, and not in this report: {names}."))
    if len(sections) > 1:
        blocks += [Heading("Summary"), *summary_tables(sections)]
        blocks.append(
            Text(
                "In brackets: share of the full model's score. Compute, FLOPs and time to the first token: "
                "shares of the full model, means of benchmarks."
            )
        )
    return blocks


def _section_blocks(section: Section, config: ReportConfig, prefix: str) -> list[Any]:
    blocks: list[Any] = [
        Heading(section.title),
        Text(f"{len(section.questions)} questions; backbone {section.backbone}."),
        score_table(section),
        cost_table(section),
    ]
    if unanswered := {name for run in section.runs for name in run.scores.unanswered}:
        blocks.append(Text(unanswered_note(sorted(unanswered))))
    if any(_differs(section.value(run), run.scores.headline) for run in section.runs):
        blocks.append(
            Text(
                f"The {section.title} column is the benchmark's own headline; what is kept, and the "
                f"differences, are of: {section.benchmark.score_name}."
            )
        )
    if section.full is None:
        blocks.append(
            Text("No run of the full model (--policy never without a reduction): nothing to compare with.")
        )
    elif len(section.runs) > 1:
        blocks.append(
            Text(
                "Same answer: exactly the full model's. Lost, won: questions that only the full model, only "
                f"this run, answers rightly. Intervals: paired bootstrap over {section.benchmark.unit}s."
            )
        )
    if (by_length := length_table(section)) is not None:
        blocks.append(Text("Same answer by the length of the full model's (how many such questions):"))
        blocks.append(by_length)
    for found in hard_subsets(section, num_draws=config.num_draws, seed=config.seed):
        blocks += [Table(HARD_HEADER, hard_rows(found)), Text(hard_note(found, section.benchmark.unit))]
    drawn = draw_section(section, config.output / "plots", prefix)
    blocks += [Heading("Plots", 3), *(Image(plot.png, _caption(plot)) for plot in drawn)] if drawn else []
    examples = worst_examples(section, config.num_examples)
    if examples:
        blocks += [Heading("Examples, worst disagreements with the full model first", 3)]
        folder = config.output / "images"
        blocks += [_example(section, one, folder, f"{prefix}-{n}") for n, one in enumerate(examples, start=1)]
    return blocks


def _differs(value: float | None, headline: str) -> bool:
    """Whether the score that intervals are of is another than the one shown."""
    try:
        return value is not None and abs(value - float(headline)) > 0.051
    except ValueError:
        return True


def _caption(plot: Plot) -> str:
    return f"{plot.caption} Also as {plot.stem.name}.svg and .pdf."


def _example(section: Section, chosen: WorstExample, folder: Path, name: str) -> Example:
    question = section.questions[chosen.index]
    lines = [f"{question.kind} · {question.id}" if question.kind else question.id, question.text]
    lines.append("gold: not public" if question.answer is None else f"gold: {_cut(str(question.answer))}")
    rows = []
    for run in section.runs:
        answer = run.answers[chosen.index]
        worth = "-" if run.hits is None else _worth(run.hits[chosen.index])
        layer = "no image" if answer.exit_layer < 0 else str(answer.exit_layer)
        if answer.freeze_layer is not None:
            layer = f"{layer}, frozen after {answer.freeze_layer}"
        rows.append([run.name, _cut(answer.prediction), worth, layer])
    image = _thumbnail(question, section.num_frames, folder, name)
    return Example(image, lines, Table(["policy", "answer", "right", "exit layer"], rows))


def _worth(hit: float) -> str:
    return {0.0: "no", 1.0: "yes"}.get(hit, f"{hit:.2f}")


def _cut(text: str) -> str:
    return text if len(text) <= _LONGEST_ANSWER else text[: _LONGEST_ANSWER - 1] + "…"


def _thumbnail(question: Question, num_frames: int, folder: Path, name: str) -> Path | None:
    """The question's first image, or its video's first frame, small."""
    shown = question_images(question, num_frames)
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


def section_metrics(section: Section) -> dict[str, Any]:
    """Every metric of a section, JSON-ready."""
    return {
        "benchmark": section.benchmark.name,
        "backbone": section.backbone,
        "num_questions": len(section.questions),
        "runs": {run.name: _run_metrics(section, run) for run in section.runs},
    }


def _run_metrics(section: Section, run: ReportedRun) -> dict[str, Any]:
    against, scores = section.against.get(run.name), run.scores.to_dict()
    probabilities_BL = run.gate_probabilities_BL
    return {
        "folder": str(run.folder),
        "family": run.family,
        "headline": run.scores.headline,
        "value": section.value(run),
        "against_full": None if against is None else dataclasses.asdict(against),
        **{key: scores[key] for key in ("mean_exit_layer", "visual_compute", "prefill", "timing")},
        **({"mean_freeze_layer": scores["mean_freeze_layer"]} if run.freezes else {}),
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
