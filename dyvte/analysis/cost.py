"""VTW Table 4: memory and latency of the full model, FastV, an exit at K, and a freeze before that exit."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, replace
from typing import Any

import torch

from dyvte.analysis.findings import Findings, Table
from dyvte.analysis.subject import Subject
from dyvte.errors import ConfigError
from dyvte.evaluation.generation import answer, encoded_batches, plan_batches
from dyvte.evaluation.scores import FULL_MODEL
from dyvte.evaluation.settings import NamedPolicy, with_reductions
from dyvte.formatting import number
from dyvte.plotting import COLORS, plain_axes

DEFINITION = (
    "Time to first token holds the vision tower, the prefill and the choice of the token, for a whole "
    "batch; ratios are to the plain model, turn by turn on the same batches. KV: bytes that the layers' "
    "caches hold after the prefill, per question. TFLOPs: prefill of the decoder, VTW's convention. Peak "
    "memory (on a GPU alone): the most that one batch allocates, less the model."
)


def study(subject: Subject) -> Findings:
    """Answer, time and weigh the four."""
    if subject.config.timing_batches < 1:
        raise ConfigError("this study measures times: timing_batches must be at least 1")
    k = subject.layer
    never, fixed, frozen = subject.policies(FULL_MODEL, f"fixed:{k}", f"freeze:{k // 2}:{k}")
    (fastv,) = with_reductions([never], [subject.config.fastv])
    labels = {never.name: "full model", fastv.name: "FastV", fixed.name: f"VTW, K = {k}"}
    labels[frozen.name] = f"frozen after {k // 2}, K = {k}"
    policies, notes = subject.servable([never, fastv, fixed, frozen])
    results = subject.ask(policies, runs="runs-timed", timed=True)
    peaks = peak_memory(subject, policies)
    rows: dict[str, dict[str, Any]] = {}
    for named in policies:
        scores = results[named.name].scores
        timing = scores.timing
        rows[labels[named.name]] = {
            "kv_bytes_per_question": scores.cost.kv_bytes_per_question,
            "prefill_tflops": scores.cost.prefill["vtw"].tflops,
            "peak_bytes_over_model": peaks[named.name],
            **asdict(timing.times),
            "batches": timing.batches,
            "batch_size": timing.batch_size,
            "new_tokens": timing.new_tokens,
            "repeats": timing.repeats,
        }
    machine = asdict(results[never.name].scores.timing.machine)
    return Findings(
        title=f"Memory and latency, K = {subject.layer} of {subject.num_layers}",
        definition=DEFINITION,
        metrics={"layer": subject.layer, "machine": machine, "rows": rows},
        table=_table(rows),
        paint=lambda figure: _paint(figure, rows),
        size=(6.4, 3.0),
        notes=tuple(notes),
    )


def peak_memory(subject: Subject, policies: Sequence[NamedPolicy]) -> dict[str, int | None]:
    """Bytes that answering the longest batch allocates over the model, by policy; None but on a GPU.

    Parameters
    ----------
    subject
        The backbone, its questions and settings.
    policies
        What is answered with.
    """
    if subject.pipeline.device.type != "cuda":
        return {named.name: None for named in policies}
    prompts = subject.prompts(subject.questions)
    plan = plan_batches(subject.pipeline, prompts, subject.config.batch_size)
    (batch,) = encoded_batches(subject.pipeline, subject.questions, prompts, plan, [0])
    peaks: dict[str, int | None] = {}
    for named in policies:
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        # What a question costs that comes alone.
        answer(replace(subject.pipeline, images=None), batch, named.exits())
        peaks[named.name] = torch.cuda.max_memory_allocated() - before
    return peaks


def _table(rows: dict[str, dict[str, Any]]) -> Table:
    full = next(iter(rows.values()))
    header = ["", "KV MB per question", "peak memory over the model, MB", "prefill GFLOPs"]
    header += ["time to first token, ms", "ratio", "time per token, ms", "ratio"]

    def cells(row: dict[str, Any]) -> list[str]:
        peak = row["peak_bytes_over_model"]
        return [
            f"{row['kv_bytes_per_question'] / 1e6:.3g} ({_share(row, full, 'kv_bytes_per_question')})",
            "not measured on a CPU" if peak is None else f"{peak / 1e6:.1f}",
            f"{1e3 * row['prefill_tflops']:.4g} ({_share(row, full, 'prefill_tflops')})",
            number(row["time_to_first_token_ms"], 1),
            number(row["first_token_ratio"]),
            number(row["time_per_token_ms"], 1),
            number(row["per_token_ratio"]),
        ]

    return Table(header, [[label, *cells(row)] for label, row in rows.items()])


def _share(row: dict[str, Any], full: dict[str, Any], key: str) -> str:
    return f"{row[key] / full[key]:.2f}"


def _paint(figure: Any, rows: dict[str, dict[str, Any]]) -> None:
    axes = figure.subplots()
    full = next(iter(rows.values()))
    keys = {
        "KV cache": "kv_bytes_per_question",
        "prefill FLOPs": "prefill_tflops",
        "time to first token": "first_token_ratio",
    }
    groups = {name: [row[key] / full[key] for row in rows.values()] for name, key in keys.items()}
    width = 0.8 / len(rows)
    for place, label in enumerate(rows):
        heights = [values[place] for values in groups.values()]
        axes.bar(
            [x + place * width for x in range(len(groups))], heights, width, label=label, color=COLORS[place]
        )
    axes.set_xticks([x + 0.4 - width / 2 for x in range(len(groups))], list(groups))
    axes.set_ylabel("share of the full model's")
    axes.legend(frameon=False, fontsize=8)
    plain_axes(axes)
