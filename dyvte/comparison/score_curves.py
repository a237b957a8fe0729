"""Scores of every rule over visual compute, from answers at every fixed layer.

The first questions of a benchmark are answered at every fixed K. An answer depends on the schedule alone, so
the answers of any rule of exits can be read off. Where gates choose schedules (f, k), each question is also
answered at those that some rule gives it.

Shape letters: B questions, L decoder layers, K = L+1 exit layers, S settings.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from dyvte.calibration.operating_points import OperatingPoints
from dyvte.calibration.path import Labels
from dyvte.comparison.oracle import oracle_points
from dyvte.comparison.probe import probe_gates
from dyvte.comparison.records import Curve, RuleCurves
from dyvte.comparison.runs import BenchmarkRuns, ScoreCurves, gates_name
from dyvte.comparison.traces import Pair
from dyvte.evaluation.generation import Pipeline
from dyvte.evaluation.run_log import Answer
from dyvte.evaluation.runner import EvalConfig, prompts_of
from dyvte.evaluation.scores import FULL_MODEL
from dyvte.evaluation.settings import given_exits, parse_named

SWEEP_SETTINGS = 8
"""Settings of a rule of schedules that are answered."""


def score_curves(
    pipeline: Pipeline,
    runs: BenchmarkRuns,
    pairs: Sequence[Pair],
    config: EvalConfig,
    num_questions: int,
) -> ScoreCurves | None:
    """Score and same answer of every rule at every setting of its knob.

    Parameters
    ----------
    pipeline : the backbone.
    runs : the benchmark, with the gates' own answers.
    pairs : gates and routers.
    config : of the evaluation.
    num_questions : how many of the first questions are answered at every K.

    Returns
    -------
    ScoreCurves or None
        None where nothing can be graded here.
    """
    processes = runs.processes
    sweep = BenchmarkRuns(
        runs.benchmark,
        runs.title,
        runs.questions[:num_questions],
        runs.dialect,
        processes=processes,
        known=runs.answered(),
    )
    config = dataclasses.replace(config, output=config.output.with_name(f"{config.output.name}-sweep"))
    policies = [parse_named(f"fixed:{k}") for k in range(runs.num_layers)] + [parse_named(FULL_MODEL)]
    sweep.run(pipeline, policies, config, "every fixed layer")
    names = [named.name for named in policies]
    if any(sweep.hits(name) is None for name in names):
        return None
    prompts = prompts_of(sweep.benchmark, sweep.questions, config.question_suffix)
    visual_B = sweep.num_visual_B
    stacks = [pair.gates.gates for pair in pairs]
    # What is answered next hangs on them: they must be the same on every process.
    logits = processes.from_first(
        processes.first_alone(
            lambda: probe_gates(pipeline, sweep.questions, prompts, stacks, config.batch_size)
        )
    )
    gates = {pair.name: pair.gates.points(one, visual_B) for pair, one in zip(pairs, logits, strict=True)}
    router = {pair.name: pair.router.points(prompts, visual_B) for pair in pairs}
    given: dict[tuple[int, int, int], str] = {}
    if pairs[0].gates.freezes:
        gates, router = ({name: _thinned(one) for name, one in rule.items()} for rule in (gates, router))
        own = [pair.gates.operating_point(one, visual_B) for pair, one in zip(pairs, logits, strict=True)]
        given = _answer_schedules(pipeline, sweep, [*gates.values(), *router.values(), *own], config)
    hits, same = _tables(sweep, names, given)

    def curve(points: OperatingPoints) -> Curve:
        return _curve(points, hits, same, sweep.value)

    return ScoreCurves(
        num_questions=len(sweep.questions),
        rules=RuleCurves(
            fixed=curve(_every_layer(runs.num_layers, visual_B)),
            oracle=curve(oracle_points(1.0 - same.values_BGL1[:, -1], visual_B)),
            gates={name: curve(points) for name, points in gates.items()},
            router={name: curve(points) for name, points in router.items()},
        ),
        lookup_agreement={
            pair.name: _lookup_agreement(runs.results[gates_name(pair)].answers, sweep, names, given)
            for pair in pairs
        },
    )


def _thinned(points: OperatingPoints) -> OperatingPoints:
    """A few settings, evenly over the logarithm of what they spend: each costs answers, and little changes
    where much is spent."""
    compute_S = points.compute_S
    wanted = np.geomspace(max(compute_S[0], 0.01), compute_S[-1], SWEEP_SETTINGS)
    chosen = sorted({int(np.abs(compute_S - budget).argmin()) for budget in wanted})
    return dataclasses.replace(
        points,
        settings_S=tuple(points.settings_S[i] for i in chosen),
        exits_SB=points.exits_SB[chosen],
        freezes_SB=points.freezes_SB[chosen],
    )


def _answer_schedules(
    pipeline: Pipeline, sweep: BenchmarkRuns, rules: Sequence[OperatingPoints], config: EvalConfig
) -> dict[tuple[int, int, int], str]:
    """Answer each question at the schedules f < k that the rules give it; the run of (question, f, k).

    In the r-th run each question has the r-th of its own schedules, or the last.
    """
    ids = [question.id for question in sweep.questions]
    wanted: list[list[tuple[int, int]]] = []
    for row in range(len(ids)):
        pairs = {
            (int(f), int(k))
            for points in rules
            for f, k in zip(points.freezes_SB[:, row], points.exits_SB[:, row], strict=True)
        }
        own = sorted((f, k) for f, k in pairs if f < k)
        wanted.append(own or [(sweep.num_layers, sweep.num_layers)])
    runs, found = [], {}
    for turn in range(max(map(len, wanted))):
        now = [own[min(turn, len(own) - 1)] for own in wanted]
        runs.append(
            given_exits(
                f"schedules-{turn}",
                {i: k for i, (_, k) in zip(ids, now, strict=True)},
                {i: f for i, (f, _) in zip(ids, now, strict=True)},
            )
        )
        found.update({(row, *pair): runs[-1].name for row, pair in enumerate(now)})
    sweep.run(pipeline, runs, config, "schedules of the rules")
    return found


def _tables(
    sweep: BenchmarkRuns, names: Sequence[str], given: Mapping[tuple[int, int, int], str]
) -> tuple[Labels, Labels]:
    """What each question is worth, and whether its answer is the full model's, at every schedule that was
    answered; nan elsewhere."""
    freezes = tuple(sorted({f for _, f, k in given if f < k}))
    shape = (len(sweep.questions), len(freezes) + 1, len(names))
    found = []
    for of in (sweep.hits, sweep.same_B):
        values_BGK = torch.full(shape, math.nan, dtype=torch.float64)
        for k, name in enumerate(names):
            values_BGK[:, -1, k] = torch.as_tensor(of(name), dtype=torch.float64)
        runs = {name: of(name) for name in set(given.values())}
        for (row, f, k), name in given.items():
            if f < k:
                values_BGK[row, freezes.index(f), k] = float(runs[name][row])
        found.append(Labels(values_BGK, freezes))
    return found[0], found[1]


def _every_layer(num_layers: int, num_visual_B: Tensor) -> OperatingPoints:
    layers = torch.arange(num_layers + 1)
    exits_SB = layers[:, None].expand(-1, len(num_visual_B))
    return OperatingPoints("fixed K", tuple(map(float, layers)), exits_SB, num_visual_B, num_layers)


def _curve(
    points: OperatingPoints, hits: Labels, same: Labels, value: Callable[[Sequence[float]], float]
) -> Curve:
    scores = [value(hits_B.tolist()) for hits_B in points.values_SB(hits)]
    kept = points.means_S(same).tolist()
    compute = tuple(points.compute_S.tolist())
    return Curve(points.settings_S, compute, {"score": tuple(scores), "same_answer": tuple(kept)})


def _lookup_agreement(
    answers: Sequence[Answer],
    sweep: BenchmarkRuns,
    names: Sequence[str],
    given: Mapping[tuple[int, int, int], str],
) -> float:
    """Share of the gates' own answers equal to those of the runs at their schedules."""
    same = []
    for row in range(len(sweep.questions)):
        one = answers[row]
        f, k = one.updated_layers, one.exit_layer
        name = names[k] if f == k else given.get((row, f, k))
        if name is not None:
            same.append(one.prediction == sweep.results[name].answers[row].prediction)
    return sum(same) / len(same) if same else math.nan
