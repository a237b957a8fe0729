"""Rules compared by real generation on a benchmark: what the table of a comparison holds.

Gates are run first; VTW's mixture and the question-only router are then run at the visual compute that the
gates really spent on these questions.

Shape letters: B questions, L decoder layers.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dyvte.calibration.operating_points import fixed_points, static_points
from dyvte.calibration.path import Labels
from dyvte.comparison.bootstrap import PairedDifference
from dyvte.comparison.hard import HardSubset, hard_subset, is_pooled
from dyvte.comparison.records import RuleCurves, plain
from dyvte.comparison.scenes import TracedScenes
from dyvte.comparison.significance import graded, score_difference, score_value
from dyvte.comparison.traces import Pair
from dyvte.comparison.tuned_gates import TunedGates
from dyvte.distributed import Processes
from dyvte.evaluation.generation import Pipeline
from dyvte.evaluation.given import Asked, known_answers
from dyvte.evaluation.run_log import Answer
from dyvte.evaluation.runner import EvalConfig, PolicyResult, prompts_of, run_policies
from dyvte.evaluation.scores import FULL_MODEL, RunScores
from dyvte.evaluation.settings import NamedPolicy, given_exits, learned, parse_named, with_reductions
from dyvte.policies import LearnedPolicy
from dyvte.tasks.base import Benchmark, Question


@dataclass
class BenchmarkRuns:
    """All runs on one benchmark, by policy name; seeds of one rule share a stem (``gates-seed``).

    Attributes
    ----------
    benchmark : its rules.
    title : what it is called in tables and plots.
    questions : all or the first of it.
    dialect : whose rule reads the answers.
    unaskable : questions that cannot be asked, by id, and why; they are none of ``questions``, nor are others
        about their images.
    results, policies : by name.
    processes : that share the batches; each of them gets all results.
    known : answers to these questions that need not be asked for again.
    """

    benchmark: Benchmark
    title: str
    questions: list[Question]
    dialect: str
    unaskable: Mapping[str, str] = field(default_factory=dict)
    results: dict[str, PolicyResult] = field(default_factory=dict)
    policies: dict[str, NamedPolicy] = field(default_factory=dict)
    processes: Processes = field(default_factory=Processes)
    known: Mapping[Asked, Answer] = field(default_factory=dict)

    @property
    def num_layers(self) -> int:
        """L."""
        return self.results[FULL_MODEL].scores.cost.num_layers

    @property
    def num_visual_B(self) -> Tensor:
        """(B,) visual tokens per question."""
        return torch.tensor([a.num_visual for a in self.results[FULL_MODEL].answers])

    def hits(self, name: str) -> list[float] | None:
        """What each question is worth, 0 to 1; None where nothing can be graded here."""
        return graded(self.benchmark, self.questions, self.results[name].answers, self.dialect)

    def value(self, hits: Sequence[float]) -> float:
        """The score that intervals are of, from what each question is worth."""
        return score_value(self.benchmark, self.questions, hits)

    def same_B(self, name: str) -> np.ndarray:
        """Whole answer equal to the full model's, per question."""
        pairs = zip(self.results[name].answers, self.results[FULL_MODEL].answers, strict=True)
        return np.array([a.prediction == b.prediction for a, b in pairs], dtype=np.float64)

    def answered(self) -> dict[Asked, Answer]:
        """All answers of policies without reductions so far, by question and schedule."""
        whole = [name for name, named in self.policies.items() if not named.reductions]
        return known_answers(one for name in whole for one in self.results[name].answers)

    def run(
        self, pipeline: Pipeline, policies: Sequence[NamedPolicy], config: EvalConfig, label: str
    ) -> None:
        """Answer what is not answered yet.

        Parameters
        ----------
        pipeline
            The backbone and how it answers.
        policies
            What is answered with.
        config
            Of the evaluation.
        label
            Of the progress bar.
        """
        found = run_policies(
            pipeline,
            self.benchmark,
            self.questions,
            policies,
            config,
            description=f"{self.title}: {label}",
            processes=self.processes,
            known={**self.known, **self.answered()},
        )
        found = self.processes.from_first(found)
        self.results.update((result.name, result) for result in found)
        self.policies.update((named.name, named) for named in policies)


@dataclass(frozen=True)
class KindLayers:
    """Mean layers that update and that read the visual tokens of one type of question, over seeds."""

    questions: int
    updated: float
    read: float


@dataclass(frozen=True)
class BenchmarkComparison:
    """Scores of every rule on one benchmark, and what the gates are ahead or behind.

    Attributes
    ----------
    benchmark, title : its name and what it is called.
    score_name, unit : what values are, and what was resampled.
    num_questions : answered.
    unaskable : those that cannot be asked, by id, and why.
    runs : scores and costs by run.
    values : the score that intervals are of, by run; None where nothing can be graded here.
    gates_minus : mean of the gates' seeds less a baseline's, by baseline; empty where nothing can be graded.
    kinds : layers that update and read the visual tokens under gates with a freeze head, by question type,
        most frequent first; empty without.
    curves : scores over visual compute; None unless they were asked for.
    hard : by pooled control, questions that it fails and the full model solves.
    """

    benchmark: str
    title: str
    score_name: str
    unit: str
    num_questions: int
    unaskable: dict[str, str]
    runs: dict[str, RunScores]
    values: dict[str, float | None]
    gates_minus: dict[str, PairedDifference]
    kinds: dict[str, KindLayers]
    curves: ScoreCurves | None
    hard: tuple[HardSubset, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready; identity and settings of the runs are in their own folders."""
        values = {name: plain(value) for name, value in vars(self).items() if name not in ("runs", "curves")}
        omitted = ("run", "timing", "config")
        runs = {
            name: {key: value for key, value in scores.to_dict().items() if key not in omitted}
            for name, scores in self.runs.items()
        }
        curves = {} if self.curves is None else {"curves": self.curves.to_dict()}
        return {**values, "runs": runs, **curves}


@dataclass(frozen=True)
class ScoreCurves:
    """Curves of every rule on the first questions of a benchmark.

    Attributes
    ----------
    num_questions : how many.
    rules : metrics "score" and "same_answer" over visual compute.
    lookup_agreement : by seed, the share of the gates' own answers that equal those of the runs at the same
        schedules: an answer depends on its schedule alone, so 1 up to rounding.
    """

    num_questions: int
    rules: RuleCurves
    lookup_agreement: dict[str, float]

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return {
            "num_questions": self.num_questions,
            **self.rules.to_dict(),
            "lookup_agreement": dict(self.lookup_agreement),
        }


def run_benchmark(
    pipeline: Pipeline,
    runs: BenchmarkRuns,
    calibration: TracedScenes,
    pairs: Sequence[Pair],
    config: EvalConfig,
    *,
    fixed_layers: Sequence[int],
    controls: Sequence[str] = (),
) -> None:
    """The full model, VTW at ``fixed_layers``, gates, and the baselines at the gates' compute.

    Parameters
    ----------
    pipeline : the backbone.
    runs : takes the results.
    calibration : what the mixture of fixed layers is chosen on.
    pairs : gates and routers.
    config : of the evaluation.
    fixed_layers : VTW's K.
    controls : reductions of the full model without an exit.
    """
    first = [parse_named(FULL_MODEL), *(parse_named(f"fixed:{k}") for k in sorted(set(fixed_layers)))]
    first += [_learned(pair.gates, gates_name(pair)) for pair in pairs]
    runs.run(pipeline, first, config, "full model, VTW, gates")
    if controls:
        reduced = with_reductions([parse_named(FULL_MODEL)], controls)
        runs.run(pipeline, reduced, config, "controls")
    runs.run(pipeline, _at_gates_budget(runs, calibration, pairs, config), config, "baselines")


def gates_name(pair: Pair) -> str:
    """Folder of the gates of one seed."""
    return f"gates-{pair.name}"


def mixture_name(pair: Pair) -> str:
    """Folder of VTW's mixture at that seed's budget."""
    return f"vtw-mixture-{pair.name}"


def static_name(pair: Pair) -> str:
    """Folder of the mixture of static schedules at that seed's budget."""
    return f"static-{pair.name}"


def router_name(pair: Pair) -> str:
    """Folder of the router at that seed's budget."""
    return f"router-{pair.name}"


def _learned(gates: TunedGates, name: str) -> NamedPolicy:
    return learned(name, LearnedPolicy(gates.gates, gates.threshold, gates.min_layer, gates.fallback))


def _at_gates_budget(
    runs: BenchmarkRuns, calibration: TracedScenes, pairs: Sequence[Pair], config: EvalConfig
) -> list[NamedPolicy]:
    """VTW's mixture, that of static schedules where gates choose them, and the router, drawn per question, at
    the visual compute of each seed's gates."""
    ids = [q.id for q in runs.questions]
    prompts = prompts_of(runs.benchmark, runs.questions, config.question_suffix)
    visual_B, trace = runs.num_visual_B, calibration.trace
    shared = {mixture_name: fixed_points(trace.risk, visual_B)}
    if pairs[0].gates.freezes:
        shared[static_name] = static_points(Labels.of(trace, "risk"), visual_B, trace.grid.kv_share)
    named = []
    for pair in pairs:
        compute = runs.results[gates_name(pair)].scores.cost.visual_compute
        rules = {**shared, router_name: pair.router.points(prompts, visual_B)}
        for name, points in rules.items():
            chosen = points.draw(points.at_compute(compute), ids, config.seed)
            exits = dict(zip(ids, chosen.exit_layers_B.tolist()))
            freezes = None
            if points.freezes_SB is not None:
                freezes = dict(zip(ids, chosen.freeze_layers_B.tolist()))
            named.append(given_exits(name(pair), exits, freezes))
    return named


def benchmark_comparison(
    runs: BenchmarkRuns,
    pairs: Sequence[Pair],
    curves: ScoreCurves | None,
    *,
    num_draws: int = 2000,
    seed: int = 0,
) -> BenchmarkComparison:
    """What the runs say.

    Parameters
    ----------
    runs : of one benchmark.
    pairs : gates and routers that were run.
    curves : on the first questions; None without.
    num_draws, seed : of the paired bootstrap.
    """
    hits = {name: runs.hits(name) for name in runs.results}
    gates_minus = {}
    if hits[FULL_MODEL] is not None:
        compared = {"vtw_mixture": [hits[mixture_name(pair)] for pair in pairs]}
        if pairs[0].gates.freezes:
            compared["static"] = [hits[static_name(pair)] for pair in pairs]
        compared |= {"router": [hits[router_name(pair)] for pair in pairs], "full": [hits[FULL_MODEL]]}
        ours = [hits[gates_name(pair)] for pair in pairs]
        gates_minus = {
            name: score_difference(
                runs.benchmark, runs.questions, ours, theirs, num_draws=num_draws, seed=seed
            )
            for name, theirs in compared.items()
        }
    return BenchmarkComparison(
        benchmark=runs.benchmark.name,
        title=runs.title,
        score_name=runs.benchmark.score_name,
        unit=runs.benchmark.unit,
        num_questions=len(runs.questions),
        unaskable=dict(runs.unaskable),
        runs={name: result.scores for name, result in runs.results.items()},
        values={name: None if one is None else runs.value(one) for name, one in hits.items()},
        gates_minus=gates_minus,
        kinds=_layers_of_gates(runs, pairs) if pairs[0].gates.freezes else {},
        curves=curves,
        hard=tuple(_hard_subsets(runs, hits, num_draws, seed)),
    )


def _hard_subsets(
    runs: BenchmarkRuns, hits: Mapping[str, list[float] | None], num_draws: int, seed: int
) -> Iterator[HardSubset]:
    """One for each pooled control; none where nothing can be graded here."""
    known = {name: one for name, one in hits.items() if one is not None}
    how = {"num_draws": num_draws, "seed": seed}
    for name, policy in runs.policies.items():
        if FULL_MODEL in known and is_pooled(str(policy.identity.get("policy")), policy.reduction):
            found = hard_subset(runs.questions, known, FULL_MODEL, name, policy.reduction, **how)
            if found is not None:
                yield found


def _layers_of_gates(runs: BenchmarkRuns, pairs: Sequence[Pair]) -> dict[str, KindLayers]:
    return layers_by_kind(runs.questions, [runs.results[gates_name(pair)].answers for pair in pairs])


def layers_by_kind(questions: Sequence[Question], seeds: Sequence[Sequence[Answer]]) -> dict[str, KindLayers]:
    """Layers that update and read visual tokens, by question type, most frequent first.

    Parameters
    ----------
    questions : of a benchmark.
    seeds : answers to them, of one or several seeds of one rule.
    """
    rows: dict[str, list[int]] = defaultdict(list)
    for row, question in enumerate(questions):
        rows[question.kind].append(row)
    found = {}
    for kind, own in sorted(rows.items(), key=lambda item: (-len(item[1]), item[0])):
        seeing = [answers[row] for answers in seeds for row in own if answers[row].exit_layer >= 0]
        if seeing:
            updated = sum(one.updated_layers for one in seeing) / len(seeing)
            read = sum(one.exit_layer for one in seeing) / len(seeing)
            found[kind] = KindLayers(len(own), updated, read)
    return found
