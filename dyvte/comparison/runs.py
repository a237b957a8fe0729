"""Exit rules compared by real generation on the benchmarks: what the table of a comparison holds.

Gates are run first; VTW's mixture and the question-only router are then run at the visual compute that the
gates really spent on these questions. For curves, the first questions are asked at every fixed K: an answer
depends on the exit layer alone, so the answers of any rule can be read off.

Shape letters: B questions, L decoder layers, K = L+1 exit layers.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dyvte.calibration.operating_points import OperatingPoints, fixed_points
from dyvte.comparison.baselines import GateContender
from dyvte.comparison.probe import probe_gates
from dyvte.comparison.router import oracle_points
from dyvte.comparison.scenes import TracedScenes
from dyvte.comparison.traces import ORACLE_LAMS, Pair
from dyvte.evaluation.generation import Asker
from dyvte.evaluation.run_log import Answer, texts
from dyvte.evaluation.runner import EvalConfig, PolicyResult, prompts_of, run_policies
from dyvte.evaluation.scores import FULL_MODEL
from dyvte.evaluation.settings import NamedPolicy, given_exits, learned, parse_named
from dyvte.policies import LearnedPolicy
from dyvte.tasks.base import Benchmark, Predictions, Question


@dataclass
class BenchmarkRuns:
    """All runs on one benchmark, by policy name; seeds of one rule share a stem (``gates/seed``)."""

    benchmark: Benchmark
    questions: list[Question]
    dialect: str
    results: dict[str, PolicyResult] = field(default_factory=dict)
    policies: dict[str, NamedPolicy] = field(default_factory=dict)

    @property
    def num_layers(self) -> int:
        """L."""
        return self.results[FULL_MODEL].scores.cost.num_layers

    @property
    def num_visual_B(self) -> Tensor:
        """(B,) visual tokens per question."""
        return torch.tensor([a.num_visual for a in self.results[FULL_MODEL].answers])

    def hits(self, name: str) -> list[bool]:
        """Right or wrong per question."""
        predictions = Predictions(texts(self.results[name].answers))
        return self.benchmark.correct(self.questions, predictions, self.dialect)

    def same_B(self, name: str) -> np.ndarray:
        """Whole answer equal to the full model's, per question."""
        pairs = zip(self.results[name].answers, self.results[FULL_MODEL].answers, strict=True)
        return np.array([a.prediction == b.prediction for a, b in pairs], dtype=np.float64)

    def run(self, asker: Asker, policies: Sequence[NamedPolicy], config: EvalConfig, label: str) -> None:
        """Ask what is not answered yet."""
        found = run_policies(asker, self.benchmark, self.questions, policies, config, description=label)
        self.results.update((result.name, result) for result in found)
        self.policies.update((named.name, named) for named in policies)


def run_benchmark(
    asker: Asker,
    benchmark: Benchmark,
    root: Path,
    calibration: TracedScenes,
    pairs: Sequence[Pair],
    config: EvalConfig,
    *,
    fixed_layers: Sequence[int],
) -> BenchmarkRuns:
    """The full model, VTW at ``fixed_layers``, gates, and the rivals at the gates' compute."""
    config = dataclasses.replace(
        config, benchmark=benchmark.name, data=root, output=config.output / benchmark.name
    )
    runs = BenchmarkRuns(benchmark, benchmark.load(root, config.limit), config.dialect)
    label = f"mini-{benchmark.name.upper()}"
    first = [parse_named(FULL_MODEL), *(parse_named(f"fixed:{k}") for k in sorted(set(fixed_layers)))]
    first += [_gates(pair.gates, gates_name(pair)) for pair in pairs]
    runs.run(asker, first, config, f"{label}: full model, VTW, gates")
    runs.run(asker, _at_gates_budget(runs, calibration, pairs, config), config, f"{label}: rivals")
    return runs


def gates_name(pair: Pair) -> str:
    """Folder of the gates of one seed."""
    return f"gates-{pair.gates.name}"


def mixture_name(pair: Pair) -> str:
    """Folder of VTW's mixture at that seed's budget."""
    return f"vtw-mixture-{pair.gates.name}"


def router_name(pair: Pair) -> str:
    """Folder of the router at that seed's budget."""
    return f"router-{pair.gates.name}"


def _gates(contender: GateContender, name: str) -> NamedPolicy:
    policy = LearnedPolicy(contender.gates, contender.threshold, contender.min_layer, contender.fallback)
    return learned(name, policy)


def _at_gates_budget(
    runs: BenchmarkRuns, calibration: TracedScenes, pairs: Sequence[Pair], config: EvalConfig
) -> list[NamedPolicy]:
    """VTW's mixture and the router, drawn per question, at the visual compute of each seed's gates."""
    ids = [q.id for q in runs.questions]
    prompts = prompts_of(runs.benchmark, runs.questions, config.question_suffix)
    fixed = fixed_points(calibration.trace.risk, runs.num_visual_B)
    named = []
    for pair in pairs:
        compute = runs.results[gates_name(pair)].scores.cost.visual_compute
        router = pair.router.points(prompts, runs.num_visual_B)
        for name, points in ((mixture_name(pair), fixed), (router_name(pair), router)):
            exits_B = points.draw(points.at_compute(compute), ids, config.seed)
            named.append(given_exits(name, dict(zip(ids, exits_B.tolist()))))
    return named


def accuracy_curves(
    asker: Asker, runs: BenchmarkRuns, pairs: Sequence[Pair], config: EvalConfig, num_questions: int
) -> dict[str, Any]:
    """Score over visual compute of every rule on the first questions (GQA: accuracy in percent)."""
    sweep = BenchmarkRuns(runs.benchmark, runs.questions[:num_questions], runs.dialect)
    config = dataclasses.replace(config, output=config.output / f"{runs.benchmark.name}-sweep")
    names = [*(f"fixed-{k}" for k in range(runs.num_layers)), FULL_MODEL]
    policies = [*(parse_named(f"fixed:{k}") for k in range(runs.num_layers)), parse_named(FULL_MODEL)]
    sweep.run(asker, policies, config, f"mini-{runs.benchmark.name.upper()}: every fixed layer")
    hits_BK = torch.tensor([sweep.hits(name) for name in names], dtype=torch.float64).T
    same_BK = torch.tensor(np.stack([sweep.same_B(name) for name in names], axis=1))
    prompts = prompts_of(sweep.benchmark, sweep.questions, config.question_suffix)
    stacks = [pair.gates.gates for pair in pairs]
    logits = probe_gates(asker, sweep.questions, prompts, stacks, config.batch_size)
    visual_B = sweep.num_visual_B
    oracle = oracle_points(1.0 - same_BK, visual_B, ORACLE_LAMS)
    curves: dict[str, Any] = {
        "num_questions": len(sweep.questions),
        "fixed": _curve(_every_layer(runs.num_layers, visual_B), hits_BK, same_BK),
        "oracle": _curve(oracle, hits_BK, same_BK),
        "gates": {},
        "router": {},
        "lookup_agreement": {},
    }
    table = [texts(sweep.results[name].answers) for name in names]
    for pair, logits_BL in zip(pairs, logits, strict=True):
        name = pair.gates.name
        curves["gates"][name] = _curve(pair.gates.points(logits_BL, visual_B), hits_BK, same_BK)
        curves["router"][name] = _curve(pair.router.points(prompts, visual_B), hits_BK, same_BK)
        answers = runs.results[gates_name(pair)].answers[:num_questions]
        curves["lookup_agreement"][name] = _lookup_agreement(answers, table)
    return curves


def _every_layer(num_layers: int, num_visual_B: Tensor) -> OperatingPoints:
    layers = torch.arange(num_layers + 1)
    exits_SB = layers[:, None].expand(-1, len(num_visual_B))
    return OperatingPoints("fixed K", tuple(map(float, layers)), exits_SB, num_visual_B, num_layers)


def _curve(points: OperatingPoints, hits_BK: Tensor, same_BK: Tensor) -> dict[str, list[float]]:
    return {
        "setting": list(points.settings_S),
        "compute": points.compute_S.tolist(),
        "accuracy": (100 * points.means_S(hits_BK)).tolist(),
        "same_answer": points.means_S(same_BK).tolist(),
    }


def _lookup_agreement(answers: Sequence[Answer], table: Sequence[dict[str, str]]) -> float:
    """Share of the gates' own answers equal to the fixed-K run's at their exit layer (1 up to rounding)."""
    return sum(a.prediction == table[a.exit_layer][a.question_id] for a in answers) / len(answers)
