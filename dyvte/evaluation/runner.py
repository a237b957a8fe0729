"""Run a benchmark: several policies on one loaded model, resumable, with scores and cost side by side.

Shape letters: B questions.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch

import dyvte
from dyvte.backbones import (
    check_image_padding,
    describe,
    fingerprint,
    get_template,
    image_padding,
    load_backbone,
    weights_digest,
)
from dyvte.calibration.decisions import visual_compute
from dyvte.config import dump_config
from dyvte.errors import ConfigError, DataError
from dyvte.evaluation import cost
from dyvte.evaluation.asking import Asker, answer, encoded_batches, plan_batches, questions_digest
from dyvte.evaluation.base import DIALECTS, Benchmark, Predictions, Question, benchmark_names, get_benchmark
from dyvte.evaluation.policies import NamedPolicy, parse_policies
from dyvte.evaluation.records import Answer, AnswerLog, texts, write_atomically
from dyvte.evaluation.timing import machine, measure_prefill, spread_batches


@dataclass(frozen=True, kw_only=True)
class EvalConfig:
    """Settings of ``dyvte eval``; a YAML file may hold any of them, the command line the rest."""

    model: str = field(metadata={"path": True})
    """Backbone: folder or hub id."""
    adapter: str | None = field(default=None, metadata={"path": True})
    """PEFT adapter to put on the backbone: folder or hub id."""
    benchmark: str
    """gqa or mme."""
    data: Path
    """Root of the benchmark's own layout."""
    output: Path
    """Each policy gets a folder below."""
    policies: tuple[str, ...] = ("never",)
    """In the forms of `dyvte.policies.USAGE`."""
    question_suffix: str | None = None
    """Appended to every question; None: the benchmark's short-answer request, as LLaVA does."""
    template: str = "auto"
    """Prompt template: v1, chat or auto."""
    image_padding: Literal["auto", "square", "none"] = "auto"
    """Pad images to a square as LLaVA-1.5 does; auto: where the backbone is a LLaVA-1.5."""
    dialect: str = "original"
    """Whose rule reads the answers: original, lmms or vlmevalkit."""
    batch_size: int = 16
    max_new_tokens: int = 16
    dtype: str = "auto"
    """auto: as stored on a GPU, float32 on a CPU."""
    attn_implementation: str = "sdpa"
    device: str | None = None
    trust_remote_code: bool = False
    limit: int | None = None
    """Ask about this many questions only (whole images where questions are paired)."""
    timing_batches: int = 3
    """Batches on which the prefill is timed after the answers; 0 for none."""
    timing_repeats: int = 5
    seed: int = 0
    overwrite: bool = False

    def __post_init__(self) -> None:
        if self.benchmark not in benchmark_names():
            raise ConfigError(f"unknown benchmark {self.benchmark!r}; known: {', '.join(benchmark_names())}")
        if self.dialect not in DIALECTS:
            raise ConfigError(f"unknown scoring dialect {self.dialect!r}; known: {', '.join(DIALECTS)}")
        for name in ("batch_size", "max_new_tokens", "timing_repeats"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1, found {getattr(self, name)}")
        if not self.policies:
            raise ConfigError("no policy given; for the full model: never")


@dataclass(frozen=True)
class PolicyResult:
    """Answers of one policy, in the order of the questions, and what ``scores.json`` holds."""

    name: str
    folder: Path
    answers: list[Answer]
    scores: dict[str, Any] = field(default_factory=dict)


def load_asker(config: EvalConfig) -> Asker:
    """The backbone of a configuration, ready to be asked."""
    device = config.device or ("cuda" if torch.cuda.is_available() else "cpu")
    # half precision is slow on a CPU, and rounds differently from one batch shape to the next
    dtype = "float32" if config.dtype == "auto" and device == "cpu" else config.dtype
    model, processor = load_backbone(
        config.model,
        dtype=dtype,
        attn_implementation=config.attn_implementation,
        device=device,
        trust_remote_code=config.trust_remote_code,
        adapter=config.adapter,
        image_padding=config.image_padding,
    )
    return Asker(model, processor, get_template(config.template, processor), config.max_new_tokens)


def evaluate(config: EvalConfig) -> list[PolicyResult]:
    """What ``dyvte eval`` does."""
    benchmark = get_benchmark(config.benchmark)
    policies = parse_policies(config.policies, config.seed)
    questions = benchmark.load(config.data, config.limit)
    return run_policies(load_asker(config), benchmark, questions, policies, config)


def prompts_of(benchmark: Benchmark, questions: Sequence[Question], suffix: str | None) -> list[str]:
    """Prompt text of every question."""
    extra = {} if suffix is None else {"suffix": suffix}
    return [benchmark.prompt(question, **extra) for question in questions]


def run_policies(
    asker: Asker,
    benchmark: Benchmark,
    questions: Sequence[Question],
    policies: Sequence[NamedPolicy],
    config: EvalConfig,
    *,
    description: str | None = None,
) -> list[PolicyResult]:
    """Ask, time, score and write; a finished or half-finished run below ``config.output`` is taken up.

    The policies take turns on each encoded batch.
    """
    prompts = prompts_of(benchmark, questions, config.question_suffix)
    plan = plan_batches(asker, prompts, config.batch_size)
    shape = describe(asker.model)
    for named in policies:
        named.policy.check(shape.num_layers, shape.hidden_size)
        gates = getattr(named.policy, "gates", None)
        trained = None if gates is None else gates.config.backbone.get("image_padding")
        check_image_padding(trained, image_padding(asker.processor), f"policy {named.name}")
    identity = _identity(asker, benchmark, questions, prompts, config)
    ids = [[questions[i].id for i in rows] for rows in plan]
    logs = [
        AnswerLog(config.output / named.name, {**identity, **named.identity}, ids, overwrite=config.overwrite)
        for named in policies
    ]
    _ask_missing(asker, questions, prompts, plan, policies, logs, description or benchmark.name)
    timing = _timing(asker, questions, prompts, plan, policies, logs, config)
    answers = [log.finish([q.id for q in questions]) for log in logs]
    reference = next((a for named, a in zip(policies, answers, strict=True) if named.name == "never"), None)
    results = []
    for named, log, given in zip(policies, logs, answers, strict=True):
        scores = _scores(asker, benchmark, questions, given, reference, config)
        scores["timing"] = timing.get(named.name)
        scores["run"] = {**identity, **named.identity, "name": named.name, "backbone": config.model}
        benchmark.write_submission(log.folder, questions, Predictions(texts(given)))
        write_atomically(log.folder / "scores.json", json.dumps(scores, indent=2) + "\n")
        dump_config(config, log.folder / "config.yaml")
        results.append(PolicyResult(named.name, log.folder, given, scores))
    return results


def _ask_missing(
    asker: Asker,
    questions: Sequence[Question],
    prompts: Sequence[str],
    plan: Sequence[Sequence[int]],
    policies: Sequence[NamedPolicy],
    logs: Sequence[AnswerLog],
    description: str,
) -> None:
    from tqdm import tqdm

    missing = [set(log.missing()) for log in logs]
    wanted = sorted(set().union(*missing))
    total = sum(len(plan[index]) for one in missing for index in one)
    with tqdm(total=total, desc=description, unit="answer", disable=total == 0) as progress:
        for batch in encoded_batches(asker, questions, prompts, plan, wanted):
            for named, log, still in zip(policies, logs, missing, strict=True):
                if batch.index in still:
                    log.append(batch.index, answer(asker, batch, named.policy))
                    progress.update(len(batch.question_ids))


def _timing(
    asker: Asker,
    questions: Sequence[Question],
    prompts: Sequence[str],
    plan: Sequence[Sequence[int]],
    policies: Sequence[NamedPolicy],
    logs: Sequence[AnswerLog],
    config: EvalConfig,
) -> dict[str, Any]:
    """Prefill times of all policies; those of an earlier run where everything was already there."""
    kept = {}
    for named, log in zip(policies, logs, strict=True):
        path = log.folder / "scores.json"
        if log.finished and path.is_file():
            timing = json.loads(path.read_text(encoding="utf-8")).get("timing")
            if timing is not None:
                kept[named.name] = timing
    if config.timing_batches < 1 or len(kept) == len(policies):
        return kept
    chosen = spread_batches(len(plan), config.timing_batches)
    batches = list(encoded_batches(asker, questions, prompts, plan, chosen))
    measured = measure_prefill(asker, batches, policies, config.timing_repeats)
    plain = measured.pop("plain")["prefill_ms_per_question"]
    about = {
        "plain_ms_per_question": plain,
        "batches": len(batches),
        "batch_size": config.batch_size,
        "repeats": config.timing_repeats,
        "machine": machine(),
    }
    return {name: {**values, **about} for name, values in measured.items()}


def _scores(
    asker: Asker,
    benchmark: Benchmark,
    questions: Sequence[Question],
    answers: Sequence[Answer],
    reference: Sequence[Answer] | None,
    config: EvalConfig,
) -> dict[str, Any]:
    scores = benchmark.score(questions, Predictions(texts(answers)), config.dialect)
    return {"scores": scores, "headline": benchmark.headline(scores), **_costs(asker, answers, reference)}


def _costs(asker: Asker, answers: Sequence[Answer], reference: Sequence[Answer] | None) -> dict[str, Any]:
    """Exit layers, compute and memory, as means over the questions with an image."""
    num_layers = describe(asker.model).num_layers
    exits_B = torch.tensor([a.exit_layer for a in answers])
    visual_B = torch.tensor([a.num_visual for a in answers])
    text_B = torch.tensor([a.num_text for a in answers])
    has_image_B = exits_B >= 0
    if not bool(has_image_B.any()):
        raise DataError("no question had visual tokens: nothing to exit from")
    shape = cost.decoder_shape(asker.model.config)
    vision = getattr(asker.model.config, "vision_config", None)
    return {
        "num_layers": num_layers,
        "mean_exit_layer": exits_B[has_image_B].double().mean().item(),
        "exit_layer_counts": {
            str(k): int((exits_B == k).sum()) for k in range(-1, num_layers + 1) if bool((exits_B == k).any())
        },
        "visual_compute": visual_compute(exits_B, visual_B, num_layers),
        "prefill": cost.mean_prefill_tflops(shape, text_B, visual_B, exits_B),
        "vision_tower_flops_per_image": None if vision is None else cost.vision_tower_flops(vision),
        "output_head_flops_per_token": cost.head_flops(shape),
        "kv_bytes_per_question": sum(a.kv_bytes for a in answers) / len(answers),
        "same_answer_as_never": None if reference is None else same_answer(answers, reference),
        "mean_new_tokens": sum(a.num_new_tokens for a in answers) / len(answers),
    }


def same_answer(answers: Sequence[Answer], reference: Sequence[Answer]) -> float:
    """Share of questions whose whole answer equals the reference's."""
    pairs = list(zip(answers, reference, strict=True))
    return sum(a.prediction == b.prediction for a, b in pairs) / len(pairs)


def _identity(
    asker: Asker,
    benchmark: Benchmark,
    questions: Sequence[Question],
    prompts: Sequence[str],
    config: EvalConfig,
) -> Mapping[str, Any]:
    """All that answers depend on beside the policy; a folder with another identity is never taken up."""
    import transformers

    return {
        "benchmark": benchmark.name,
        "questions": len(questions),
        "questions_sha256": questions_digest(questions, prompts),
        "backbone_fingerprint": fingerprint(asker.model),
        "backbone_weights": weights_digest(asker.model),
        "template": asker.template.version,
        "image_padding": image_padding(asker.processor),
        "batch_size": config.batch_size,
        "max_new_tokens": config.max_new_tokens,
        "dtype": str(asker.model.dtype),
        "attn_implementation": config.attn_implementation,
        "device": asker.device.type,
        "dyvte": dyvte.__version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
