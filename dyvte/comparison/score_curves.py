"""Scores of every rule over visual compute, from answers at every fixed layer.

The first questions of a benchmark are answered at every fixed K. An answer depends on the exit layer alone,
so the answers of any rule can be read off.

Shape letters: B questions, L decoder layers, K = L+1 exit layers, S settings.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from dyvte.calibration.operating_points import OperatingPoints
from dyvte.comparison.oracle import oracle_points
from dyvte.comparison.probe import probe_gates
from dyvte.comparison.records import Curve, RuleCurves
from dyvte.comparison.runs import BenchmarkRuns, ScoreCurves, gates_name
from dyvte.comparison.traces import Pair
from dyvte.evaluation.generation import Pipeline
from dyvte.evaluation.run_log import Answer, texts
from dyvte.evaluation.runner import EvalConfig, prompts_of
from dyvte.evaluation.scores import FULL_MODEL
from dyvte.evaluation.settings import parse_named


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
    sweep = BenchmarkRuns(runs.benchmark, runs.title, runs.questions[:num_questions], runs.dialect)
    config = dataclasses.replace(config, output=config.output.with_name(f"{config.output.name}-sweep"))
    policies = [parse_named(f"fixed:{k}") for k in range(runs.num_layers)] + [parse_named(FULL_MODEL)]
    sweep.run(pipeline, policies, config, "every fixed layer")
    names = [named.name for named in policies]
    hits = [sweep.hits(name) for name in names]
    if any(one is None for one in hits):
        return None
    hits_BK = torch.tensor(hits, dtype=torch.float64).T
    same_BK = torch.tensor(np.stack([sweep.same_B(name) for name in names], axis=1))
    prompts = prompts_of(sweep.benchmark, sweep.questions, config.question_suffix)
    visual_B = sweep.num_visual_B
    stacks = [pair.gates.gates for pair in pairs]
    logits = probe_gates(pipeline, sweep.questions, prompts, stacks, config.batch_size)

    def curve(points: OperatingPoints) -> Curve:
        return _curve(points, hits_BK, same_BK, sweep.value)

    table = [texts(sweep.results[name].answers) for name in names]
    return ScoreCurves(
        num_questions=len(sweep.questions),
        rules=RuleCurves(
            fixed=curve(_every_layer(runs.num_layers, visual_B)),
            oracle=curve(oracle_points(1.0 - same_BK, visual_B)),
            gates={
                pair.name: curve(pair.gates.points(logits_BL, visual_B))
                for pair, logits_BL in zip(pairs, logits, strict=True)
            },
            router={pair.name: curve(pair.router.points(prompts, visual_B)) for pair in pairs},
        ),
        lookup_agreement={
            pair.name: _lookup_agreement(runs.results[gates_name(pair)].answers[:num_questions], table)
            for pair in pairs
        },
    )


def _every_layer(num_layers: int, num_visual_B: Tensor) -> OperatingPoints:
    layers = torch.arange(num_layers + 1)
    exits_SB = layers[:, None].expand(-1, len(num_visual_B))
    return OperatingPoints("fixed K", tuple(map(float, layers)), exits_SB, num_visual_B, num_layers)


def _curve(
    points: OperatingPoints,
    hits_BK: Tensor,
    same_BK: Tensor,
    value: Callable[[Sequence[float]], float],
) -> Curve:
    scores = [value(hits_B.tolist()) for hits_B in points.values_SB(hits_BK)]
    same = points.means_S(same_BK).tolist()
    compute = tuple(points.compute_S.tolist())
    return Curve(points.settings_S, compute, {"score": tuple(scores), "same_answer": tuple(same)})


def _lookup_agreement(answers: Sequence[Answer], table: Sequence[dict[str, str]]) -> float:
    """Share of the gates' own answers equal to the fixed-K run's at their exit layer."""
    return sum(a.prediction == table[a.exit_layer][a.question_id] for a in answers) / len(answers)
