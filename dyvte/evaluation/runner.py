"""Run a benchmark: several policies on one loaded model, resumable, with scores and cost side by side.

Several processes (torchrun, accelerate) share the batches; the first of them times, scores and writes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import torch

from dyvte.backbones import get_template, open_backbone
from dyvte.config import dump_config, to_dict
from dyvte.distributed import Processes, join_processes, own_device
from dyvte.errors import ConfigError, DataError
from dyvte.evaluation.askable import unaskable
from dyvte.evaluation.asking import Asking, ask_missing
from dyvte.evaluation.checks import check_ids, defects_of, refuse
from dyvte.evaluation.earlier import check_earlier, take_over
from dyvte.evaluation.fitting import before_weights, check_named
from dyvte.evaluation.generation import (
    GenerationSettings,
    Pipeline,
    plan_batches,
    shown_by,
)
from dyvte.evaluation.given import Asked, ask_given, is_given
from dyvte.evaluation.identity import identity, identity_of
from dyvte.evaluation.latency import PLAIN, even_batches, machine, measure_generation
from dyvte.evaluation.masks import open_segmenter
from dyvte.evaluation.metrics import cost_metrics, same_answer
from dyvte.evaluation.questions import load_questions, prompts_of
from dyvte.evaluation.run_log import Answer, AnswerLog, texts
from dyvte.evaluation.scores import FULL_MODEL, TIMED_IMAGES, RunIdentity, RunScores, Timing
from dyvte.evaluation.settings import NO_REDUCTION, NamedPolicy, parse_policies, with_reductions
from dyvte.policies import POLICIES
from dyvte.reductions import REDUCTIONS
from dyvte.tasks.base import (
    DIALECTS,
    TASKS,
    Benchmark,
    Predictions,
    Question,
    check_dialect,
    get_benchmark,
)

CONFIG_FILE = "config.yaml"


@dataclass(frozen=True, kw_only=True)
class EvalConfig(GenerationSettings):
    """Settings of ``dyvte eval``; a YAML file may hold any of them, the command line the rest."""

    benchmark: str = field(metadata={"choices": TASKS})
    """Which benchmark."""
    data: Path
    """Root of the benchmark, in any known format (docs/benchmarks.md)."""
    output: Path
    """Each policy with each reduction gets a folder below."""
    policies: tuple[str, ...] = field(default=("never",), metadata={"forms": POLICIES})
    """When visual tokens leave; several."""
    reductions: tuple[str, ...] = field(default=(NO_REDUCTION,), metadata={"forms": REDUCTIONS})
    """What is spent on them before, several joined by "+", or none; every policy is run with every entry."""
    question_suffix: str | None = None
    """Appended to every question; null: the benchmark's short-answer request, as LLaVA does."""
    dialect: str = field(default="original", metadata={"choices": DIALECTS})
    """Whose rule reads the answers: the benchmark's own tool's, lmms-eval's or VLMEvalKit's."""
    max_new_tokens: int | None = None
    """Tokens of an answer at most; null: as many as the benchmark's answers need."""
    limit: int | None = None
    """Ask about this many questions only (whole images where questions are paired)."""
    timing_batches: int = 3
    """Batches on which every policy is timed after the answers; 0 for none."""
    timing_rows: int = 16
    """Questions of a timed batch at most."""
    timing_repeats: int = 3
    """How often each of them is timed."""
    timing_tokens: int = 8
    """Tokens generated when timed: the first gives the time to first token, the others that per token."""
    timing_images: str = field(default="fresh", metadata={"choices": TIMED_IMAGES})
    """fresh: each timed question computes its image, as where it comes alone; shared: a batch's questions
    compute each of their images once."""
    overwrite: bool = False
    """Start anew where the output folder holds a run."""
    earlier: tuple[Path, ...] = ()
    """Outputs of earlier runs: what was asked there in the same way is taken from there."""
    mask_head: str | None = None
    """Folder of what makes masks, for benchmarks whose answers hold one; null: segmentation/ below the
    model's."""

    def __post_init__(self) -> None:
        needed = TASKS.get(self.benchmark).max_new_tokens
        if self.max_new_tokens is None:
            object.__setattr__(self, "max_new_tokens", needed)
        super().__post_init__()
        for name in ("timing_rows", "timing_repeats", "timing_tokens"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1, found {getattr(self, name)}")
        if not self.policies:
            raise ConfigError("no policy given; for the full model: never")
        if not self.reductions:
            raise ConfigError(f"no reduction given; without any: {NO_REDUCTION}")


@dataclass(frozen=True)
class PolicyResult:
    """Answers of one policy, in the order of the questions, and what ``scores.json`` holds."""

    name: str
    folder: Path
    answers: list[Answer]
    scores: RunScores


def load_pipeline(
    config: GenerationSettings, device: torch.device | None = None, policies: Sequence[NamedPolicy] = ()
) -> Pipeline:
    """The backbone of a configuration, ready to be asked; on ``device`` unless it names one.

    Parameters
    ----------
    config
        Of the backbone.
    device
        None: the process's own.
    policies
        That it will be asked with; one that cannot serve it is found before weights are read.
    """
    check = before_weights(policies, config.template)
    model, processor = open_backbone(config.model, device or own_device(), before_weights=check)
    template = get_template(config.template, processor)
    return Pipeline(
        model,
        processor,
        template,
        config.max_new_tokens,
        config.num_frames,
        config.frame_sampling,
        config.new_store(),
    )


def evaluate(config: EvalConfig) -> list[PolicyResult]:
    """What ``dyvte eval`` does; an empty list on all processes but the first."""
    benchmark = get_benchmark(config.benchmark)
    check_dialect(config.dialect, getattr(benchmark, "dialects", DIALECTS), benchmark.name)
    check_earlier(config.earlier)
    policies = with_reductions(parse_policies(config.policies, config.seed), config.reductions)
    questions = load_questions(benchmark, config.data, config.limit, config.max_bad_samples)
    with join_processes() as processes:
        pipeline = load_pipeline(config, processes.device, policies)
        return run_policies(pipeline, benchmark, questions, policies, config, processes=processes)


def run_policies(
    pipeline: Pipeline,
    benchmark: Benchmark,
    questions: Sequence[Question],
    policies: Sequence[NamedPolicy],
    config: EvalConfig,
    *,
    description: str | None = None,
    processes: Processes | None = None,
    known: Mapping[Asked, Answer] | None = None,
) -> list[PolicyResult]:
    """Ask, time, score and write; a finished or half-finished run below ``config.output`` is taken up.

    The policies take turns on each encoded batch. Of several processes, the first returns the results and the
    others an empty list.

    Parameters
    ----------
    pipeline
        The backbone and how it answers.
    benchmark
        Asks and scores.
    questions
        What is asked.
    policies
        With their reductions; each gets a folder.
    config
        Of the evaluation.
    description
        Of the progress bar; None: the benchmark's name.
    processes
        That share the batches; None: this one alone.
    known
        Answers of other policies to these questions. Policies that are given by question id then share the
        answers at equal schedules, among themselves and with these; None: each is asked by itself.
    """
    processes = processes or Processes()
    where = f"{benchmark.name} ({config.data})"
    check_ids(questions, where)
    if benchmark.wants_masks and pipeline.segmenter is None:
        pipeline = replace(pipeline, segmenter=open_segmenter(pipeline.model, config))
    prompts = prompts_of(benchmark, questions, config.question_suffix)
    shown = shown_by(questions)
    if len(policies) == 1 and len(set(shown)) == len(questions):
        pipeline = replace(pipeline, images=None)  # no image would be met again
    plan = plan_batches(pipeline, prompts, config.batch_size, shown)
    check_named(pipeline.model, pipeline.processor, policies)
    answers_depend_on = identity(pipeline, benchmark, questions, prompts, config)
    ids = [[questions[i].id for i in rows] for rows in plan]

    def open_log(named: NamedPolicy) -> AnswerLog:
        folder, own = config.output / named.name, identity_of(named, answers_depend_on)
        if processes.first and not config.overwrite:
            take_over(folder, own, config.earlier)
        return AnswerLog(folder, own, ids, overwrite=config.overwrite, rank=processes.rank)

    def open_logs() -> list[AnswerLog]:
        return [open_log(named) for named in policies]

    # The first process tidies up what a kill left; only then may the others look.
    logs = processes.first_alone(open_logs) or open_logs()
    processes.barrier()
    missing = sorted(i for at in set().union(*(log.missing() for log in logs)) for i in plan[at])

    def find_unaskable() -> dict[str, str]:
        kept = {one.question_id: one.problem for log in logs for one in log.answers.values() if one.problem}
        found = unaskable(
            pipeline,
            [questions[i] for i in missing],
            [prompts[i] for i in missing],
            where,
            config.max_bad_samples,
        )
        refuse(defects_of(kept | found, where), len(questions), where, config.max_bad_samples)
        return kept | found

    problems = processes.from_first(processes.first_alone(find_unaskable))
    asking = Asking(pipeline, questions, prompts, plan, problems)
    _ask(asking, policies, logs, known, description or benchmark.name, processes)
    processes.barrier()

    def conclude() -> list[PolicyResult]:
        timing = _timing(asking, policies, logs, config)
        answers = [log.finish([q.id for q in questions]) for log in logs]
        named_answers = zip(policies, answers, strict=True)
        reference = next((a for named, a in named_answers if named.name == FULL_MODEL), None)
        results = []
        for named, log, given in zip(policies, logs, answers, strict=True):
            found = benchmark.score(questions, Predictions(texts(given)), config.dialect)
            scores = RunScores(
                scores=found,
                headline=benchmark.headline(found),
                cost=cost_metrics(pipeline.model.config, given, named.reductions),
                same_answer_as_never=None if reference is None else same_answer(given, reference),
                timing=timing.get(named.name),
                run=RunIdentity(identity_of(named, answers_depend_on), named.name, config.model.path),
                config=to_dict(config),
                unanswered={one.question_id: one.problem for one in given if one.problem},
            )
            dump_config(config, log.folder / CONFIG_FILE)
            benchmark.write_submission(log.folder, questions, Predictions(texts(given)))
            scores.write(log.folder)
            results.append(PolicyResult(named.name, log.folder, given, scores))
        return results

    return processes.first_alone(conclude) or []


def _ask(
    asking: Asking,
    policies: Sequence[NamedPolicy],
    logs: Sequence[AnswerLog],
    known: Mapping[Asked, Answer] | None,
    description: str,
    processes: Processes,
) -> None:
    """What is missing; with ``known``, one answer for all given policies of equal schedule."""
    given = [known is not None and is_given(named) for named in policies]
    for ask, wanted in ((ask_missing, False), (partial(ask_given, known=known), True)):
        chosen = [n for n, one in enumerate(given) if one is wanted]
        if chosen:
            own = [policies[n] for n in chosen], [logs[n] for n in chosen]
            ask(asking, *own, description=description, processes=processes)


def _timing(
    asking: Asking,
    policies: Sequence[NamedPolicy],
    logs: Sequence[AnswerLog],
    config: EvalConfig,
) -> dict[str, Timing]:
    """Times of all policies; those of an earlier run where everything was already there."""
    kept = {}
    for named, log in zip(policies, logs, strict=True):
        if log.finished and (timing := _earlier_timing(log.folder)) is not None:
            kept[named.name] = timing
    if config.timing_batches < 1 or len(kept) == len(policies):
        return kept
    chosen = even_batches(len(asking.plan), config.timing_batches)
    timed = replace(asking, plan=[rows[: config.timing_rows] for rows in asking.plan])
    batches = [batch for batch in timed.batches(chosen) if batch.question_ids]
    if not batches:
        return kept
    store = config.new_store if config.timing_images == "shared" else None
    measured = measure_generation(
        asking.pipeline, batches, policies, config.timing_repeats, config.timing_tokens, store
    )
    plain, here = measured.pop(PLAIN), machine()
    return {
        name: Timing(
            times=times,
            plain=plain,
            batches=len(batches),
            batch_size=min(config.batch_size, config.timing_rows),
            new_tokens=config.timing_tokens,
            repeats=config.timing_repeats,
            machine=here,
            images=config.timing_images,
        )
        for name, times in measured.items()
    }


def _earlier_timing(folder: Path) -> Timing | None:
    """Times that a finished run's scores hold; None without, or where another version wrote them."""
    try:
        return RunScores.read(folder).timing
    except DataError:
        return None
