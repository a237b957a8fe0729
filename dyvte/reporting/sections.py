"""Finished runs read back, grouped by benchmark, and every metric that a report shows of them.

Shape letters: B questions, L decoder layers.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from dyvte.comparison.bootstrap import PairedDifference
from dyvte.comparison.significance import graded, score_difference, score_value
from dyvte.config import load_config
from dyvte.errors import DataError
from dyvte.evaluation.metrics import same_answer
from dyvte.evaluation.questions import questions_digest
from dyvte.evaluation.run_log import RUN_FILE, Answer, read_answers
from dyvte.evaluation.runner import CONFIG_FILE, EvalConfig, load_questions, prompts_of
from dyvte.evaluation.scores import FULL_MODEL, SCORES_FILE, RunScores
from dyvte.evaluation.settings import NO_REDUCTION
from dyvte.formatting import name_some
from dyvte.tasks.base import Benchmark, Question, get_benchmark

_SECTION_KEYS = ("benchmark", "questions_sha256", "backbone_weights", "max_new_tokens")


@dataclass(frozen=True)
class ReportedRun:
    """One policy with its reductions on one benchmark, as ``dyvte eval`` left it."""

    folder: Path
    name: str
    scores: RunScores
    answers: list[Answer] = field(repr=False)
    hits: list[float] | None = None
    """What each question is worth, 0..1; None where nothing can be graded here."""

    @property
    def is_full(self) -> bool:
        """The full model: no exit, no reduction."""
        return self.scores.run.is_full_model

    @property
    def family(self) -> str:
        """Runs that differ in one setting only, and are joined to a curve: fixed layers; one set of gates."""
        run = self.scores.run
        kind = run.policy.partition(":")[0]
        if kind == "gates":
            kind = f"gates {(run.gates_sha256 or '')[:6]}"
        kind = {"fixed": "fixed K", FULL_MODEL: "full model", "given": self.name}.get(kind, kind)
        return kind if run.reduction == NO_REDUCTION else f"{kind} + {run.reduction}"

    @property
    def exits_vary(self) -> bool:
        """Whether questions leave, or freeze, at different layers."""
        return len({(a.updated_layers, a.exit_layer) for a in self.answers if a.exit_layer >= 0}) > 1

    @property
    def freezes(self) -> bool:
        """Whether visual tokens were read without being updated."""
        return self.scores.cost.mean_freeze_layer is not None

    @cached_property
    def gate_probabilities_BL(self) -> np.ndarray | None:
        """(B, L) chance to leave that each gate stated; nan where it was not asked. None without gates."""
        rows = [answer.gate_probabilities for answer in self.answers if answer.gate_probabilities]
        return np.array(rows, dtype=np.float64) if rows else None

    def exit_shares(self, chosen_B: Sequence[bool] | None = None) -> np.ndarray:
        """(L+1,) share of the chosen questions with an image that leave after layer 0..L."""
        exits = [a.exit_layer for n, a in enumerate(self.answers) if chosen_B is None or chosen_B[n]]
        counts = np.bincount([k for k in exits if k >= 0], minlength=self.scores.cost.num_layers + 1)
        return counts / max(1, counts.sum())


@dataclass(frozen=True)
class Against:
    """A run beside the full model on the same questions.

    Attributes
    ----------
    difference : score minus the full model's, in the score's points, paired bootstrap over images; None where
        nothing can be graded here.
    kept : share of the full model's score.
    same_answer : share of questions with exactly the full model's answer.
    lost, won : questions that only the full model, only this run, answers rightly.
    """

    difference: PairedDifference | None
    kept: float | None
    same_answer: float
    lost: int | None
    won: int | None


@dataclass(frozen=True)
class Section:
    """All runs on the same questions with the same backbone."""

    benchmark: Benchmark
    backbone: str
    questions: list[Question] = field(repr=False)
    runs: list[ReportedRun]
    against: dict[str, Against]
    """By run name; empty without the full model's run."""
    num_frames: int = 8

    @property
    def title(self) -> str:
        """Name of the benchmark as its authors write it."""
        return self.benchmark.title

    def run(self, name: str) -> ReportedRun | None:
        """The run of that name; None where there is none."""
        return next((run for run in self.runs if run.name == name), None)

    @property
    def full(self) -> ReportedRun | None:
        """The full model's run."""
        return next((run for run in self.runs if run.is_full), None)

    @property
    def kinds(self) -> list[str]:
        """Question types, most frequent first."""
        counts: dict[str, int] = defaultdict(int)
        for question in self.questions:
            counts[question.kind] += 1
        return sorted(counts, key=lambda kind: (-counts[kind], kind))

    def value(self, run: ReportedRun) -> float | None:
        """The score that intervals are of: the benchmark's statistic, each unit drawn once."""
        if run.hits is None:
            return None
        return score_value(self.benchmark, self.questions, run.hits)


def read_sections(
    paths: Sequence[Path],
    data: Mapping[str, Path] | None = None,
    *,
    num_draws: int = 2000,
    seed: int = 0,
) -> tuple[list[Section], list[Path]]:
    """Sections of a report from run folders, or folders of them; and runs that are not finished.

    Parameters
    ----------
    paths : run folders, or folders above them.
    data : where a benchmark's data lies now, by benchmark name, if it has moved since the run.
    num_draws, seed : of the paired bootstrap.

    Raises
    ------
    DataError
        No finished run; a benchmark's data is gone or is not what the run was asked; two runs of one name.
    """
    folders, unfinished = _find_runs(paths)
    groups: dict[tuple[Any, ...], list[tuple[Path, RunScores]]] = defaultdict(list)
    for folder in folders:
        scores = RunScores.read(folder)
        groups[tuple(scores.run.values.get(key) for key in _SECTION_KEYS)].append((folder, scores))
    sections = [_section(group, data or {}, num_draws, seed) for group in groups.values()]
    return sections, unfinished


def _find_runs(paths: Sequence[Path]) -> tuple[list[Path], list[Path]]:
    finished, unfinished = [], []
    for path in map(Path, paths):
        if not path.is_dir():
            raise DataError(f"no run folder at {path}: expected a folder that dyvte eval wrote")
        marks = [path] if (path / RUN_FILE).is_file() else [m.parent for m in sorted(path.rglob(RUN_FILE))]
        if not marks:
            raise DataError(f"{path} holds no run of dyvte eval ({RUN_FILE} and {SCORES_FILE})")
        for folder in marks:
            (finished if (folder / SCORES_FILE).is_file() else unfinished).append(folder)
    finished = list(dict.fromkeys(folder.resolve() for folder in finished))
    if not finished:
        raise DataError(
            f"none of the runs is finished ({name_some(map(str, unfinished))}): start dyvte eval again"
        )
    return finished, unfinished


def _section(
    found: Sequence[tuple[Path, RunScores]], data: Mapping[str, Path], num_draws: int, seed: int
) -> Section:
    runs = [ReportedRun(folder, scores.run.name, scores, read_answers(folder)) for folder, scores in found]
    names = [run.name for run in runs]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise DataError(f"two runs on the same questions are called {name_some(twice)}: report them apart")
    config = load_config(EvalConfig, runs[0].folder / CONFIG_FILE)
    if config.benchmark in data:
        config = replace(config, data=Path(data[config.benchmark]))
    benchmark = get_benchmark(config.benchmark)
    questions = _questions(benchmark, config, runs[0])
    runs = [
        replace(
            run, hits=graded(benchmark, questions, run.answers, run.scores.scores.get("dialect", "original"))
        )
        for run in runs
    ]
    runs.sort(key=lambda run: (not run.is_full, run.family, run.scores.cost.visual_compute, run.name))
    section = Section(
        benchmark,
        runs[0].scores.run.backbone,
        questions,
        runs,
        {},
        config.num_frames,
    )
    if section.full is not None:
        section.against.update((run.name, _against(section, run, num_draws, seed)) for run in runs)
    return section


def _questions(benchmark: Benchmark, config: EvalConfig, run: ReportedRun) -> list[Question]:
    hint = f"say where it lies with --data {benchmark.name}=FOLDER"
    if not config.data.exists():
        raise DataError(f"the data of {benchmark.name} is no longer at {config.data}: {hint}")
    questions = load_questions(benchmark, config.data, config.limit, config.max_bad_samples)
    asked = questions_digest(questions, prompts_of(benchmark, questions, config.question_suffix))
    if asked != run.scores.run.questions_sha256:
        raise DataError(f"{config.data} does not hold the questions that {run.folder} was asked: {hint}")
    return questions


def _against(section: Section, run: ReportedRun, num_draws: int, seed: int) -> Against:
    full = section.full
    same = same_answer(run.answers, full.answers)
    if run.hits is None or full.hits is None:
        return Against(None, None, same, None, None)
    difference = score_difference(
        section.benchmark, section.questions, [run.hits], [full.hits], num_draws=num_draws, seed=seed
    )
    kept = difference.mean_a / difference.mean_b if difference.mean_b else None
    pairs = list(zip(run.hits, full.hits, strict=True))
    return Against(difference, kept, same, sum(a < b for a, b in pairs), sum(a > b for a, b in pairs))


@dataclass(frozen=True)
class WorstExample:
    """One question with the answers of all runs; ``lost`` runs get wrong what the full model gets right."""

    index: int
    lost: int
    differing: int


def worst_examples(section: Section, wanted: int) -> list[WorstExample]:
    """Questions on which runs part most from the full model: lost answers first, then differing ones.

    Of equals, those whose images have not been shown yet come first, then the order of the benchmark.
    Questions that could not be asked have no image to show.

    Parameters
    ----------
    section
        The runs on one benchmark.
    wanted
        How many at most.
    """
    full = section.full
    asked = [
        index
        for index in range(len(section.questions))
        if not any(run.answers[index].problem for run in section.runs)
    ]
    if full is None:
        return [WorstExample(index, 0, 0) for index in asked[:wanted]]
    others = [run for run in section.runs if not run.is_full]
    ranked = []
    for index in asked:
        reference = full.answers[index]
        differing = sum(run.answers[index].prediction != reference.prediction for run in others)
        graded = full.hits is not None
        lost = sum(run.hits[index] < full.hits[index] for run in others) if graded else 0
        ranked.append(WorstExample(index, lost, differing))
    ranked.sort(key=lambda one: (-one.lost, -one.differing, one.index))
    seen: dict[str, int] = defaultdict(int)
    turns = []
    for one in ranked:
        image = section.questions[one.index].image_id
        turns.append((-one.lost, -one.differing, seen[image], one.index, one))
        seen[image] += 1
    return [turn[-1] for turn in sorted(turns, key=lambda turn: turn[:-1])[:wanted]]
