"""What is analysed: a backbone and the questions of a benchmark, with the two ways of looking at them.

Accuracy studies ask questions through the evaluation (:meth:`Subject.ask`); the others look at prompts
(:meth:`Subject.batches`).
"""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import dyvte
from dyvte.backbones import Backbone, describe, fingerprint, weights_digest
from dyvte.calibration import LayerSearch, search_exit_layer
from dyvte.errors import ConfigError, UnsupportedBackboneError
from dyvte.evaluation.askable import without_unaskable
from dyvte.evaluation.fitting import check_named
from dyvte.evaluation.generation import Batch, Pipeline, encoded_batches, plan_batches, shown_by
from dyvte.evaluation.runner import (
    EvalConfig,
    PolicyResult,
    load_pipeline,
    load_questions,
    prompts_of,
    run_policies,
)
from dyvte.evaluation.scores import FULL_MODEL
from dyvte.evaluation.settings import NamedPolicy, parse_policies
from dyvte.progress import progress
from dyvte.tasks.base import Benchmark, Question, get_benchmark

_MOST_LAYERS = 12


@dataclass(frozen=True, kw_only=True)
class AnalysisConfig(EvalConfig):
    """Settings of ``dyvte analyze``: those of ``dyvte eval`` (a study chooses its own policies), and more."""

    samples: int = 20
    """Questions that attention and KL are measured on, drawn at random."""
    layer: int | None = None
    """K of the studies of one exit; None: half of the layers."""
    layers: tuple[int, ...] = ()
    """K of the curves; empty: all of a shallow model, nine of a deep one."""
    etas: tuple[float, ...] = (0.006, 0.005, 0.004, 0.003, 0.002, 0.001)
    """Bounds on the KL in nats; VTW's."""
    tokens: int = 256
    """drift: length of the forced continuation."""
    schedules: tuple[str, ...] = ()
    """drift: policies, such as fixed:16 or freeze:8:16; empty: the exit at ``layer``, also frozen at half of
    it, and the gates given."""
    fastv: str = "fastv:2:0.5"
    """The FastV that is put beside."""
    gates: tuple[str, ...] = ()
    """Gates checkpoints, for the studies of gates."""
    training: Path | None = None
    """gate_inputs: the training configuration (YAML)."""
    feature_sets: tuple[str, ...] = ()
    """gate_inputs: what to compare, names joined by "+"; empty: DyVTE's eleven."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if tuple(self.policies) != (FULL_MODEL,) or len(self.reductions) != 1:
            raise ConfigError("a study chooses its own policies and reductions: omit these settings")
        if self.samples < 1:
            raise ConfigError(f"samples must be at least 1, found {self.samples}")
        if self.tokens < 1:
            raise ConfigError(f"tokens must be at least 1, found {self.tokens}")
        if not self.etas or min(self.etas) <= 0:
            raise ConfigError(f"etas must be one or more positive numbers, found {self.etas}")

    def for_evaluation(self, output: Path, **changes: Any) -> EvalConfig:
        """The settings of an evaluation on the same backbone and questions.

        No bad sample is allowed in it: they were excluded before.

        Parameters
        ----------
        output
            Folder of its runs.
        changes
            Other fields of `EvalConfig`, by name.
        """
        names = [one.name for one in dataclasses.fields(EvalConfig)]
        settings = {name: getattr(self, name) for name in names}
        return EvalConfig(**{**settings, "output": output, "max_bad_samples": 0, **changes})


@dataclass(frozen=True)
class Subject:
    """A loaded backbone, the questions put to it, and the settings.

    Attributes
    ----------
    config
        As the command was given them.
    pipeline
        The backbone with its processor and template.
    benchmark
        Whose questions they are; it reads and scores answers.
    questions
        All that can be asked, in their order.
    """

    config: AnalysisConfig
    pipeline: Pipeline
    benchmark: Benchmark
    questions: Sequence[Question]
    unaskable: Mapping[str, str] = field(default_factory=dict)
    """Questions that cannot be asked, by id, and why; they are none of ``questions``."""
    _memory: dict[str, Any] = field(default_factory=dict, repr=False)

    @cached_property
    def backbone(self) -> Backbone:
        """The model and its parts."""
        return describe(self.pipeline.model)

    @property
    def num_layers(self) -> int:
        """L."""
        return self.backbone.num_layers

    @property
    def layer(self) -> int:
        """K of the studies of one exit."""
        layer = self.num_layers // 2 if self.config.layer is None else self.config.layer
        if not 1 <= layer < self.num_layers:
            raise ConfigError(f"layer {layer}: expected 1..{self.num_layers - 1} for this backbone")
        return layer

    @property
    def layers(self) -> list[int]:
        """K of the curves, ascending."""
        if self.config.layers:
            layers = sorted(set(self.config.layers))
            if not 0 <= layers[0] <= layers[-1] <= self.num_layers:
                raise ConfigError(f"layers {layers}: expected 0..{self.num_layers} for this backbone")
            return layers
        steps = self.num_layers if self.num_layers <= _MOST_LAYERS else 8
        return sorted({round(step * self.num_layers / steps) for step in range(steps + 1)})

    @cached_property
    def sampled(self) -> list[Question]:
        """The questions that attention and KL are measured on."""
        rng = random.Random(self.config.seed)
        chosen = sorted(rng.sample(range(len(self.questions)), min(self.config.samples, len(self.questions))))
        return [self.questions[index] for index in chosen]

    def prompts(self, questions: Sequence[Question]) -> list[str]:
        """Text asked for each question.

        Parameters
        ----------
        questions
            Of the benchmark.
        """
        return prompts_of(self.benchmark, questions, self.config.question_suffix)

    def batches(self, questions: Sequence[Question] | None = None) -> Iterator[Batch]:
        """Encoded prompts, of the sampled questions if none are given.

        Parameters
        ----------
        questions
            None: the sampled ones, as many as ``samples`` says.
        """
        questions = self.sampled if questions is None else questions
        prompts = self.prompts(questions)
        plan = plan_batches(self.pipeline, prompts, self.config.batch_size, shown_by(questions))
        with progress(len(questions), "prompts", "question") as advance:
            for batch in encoded_batches(self.pipeline, questions, prompts, plan, range(len(plan))):
                yield batch
                advance(len(batch.question_ids))

    def policies(self, *texts: str) -> list[NamedPolicy]:
        """Policies from their command line forms.

        Parameters
        ----------
        texts
            Such as ``fixed:16``; random ones without a seed take the configured one.
        """
        return _policies(texts, self.config.seed)

    def servable(self, policies: Sequence[NamedPolicy]) -> tuple[list[NamedPolicy], list[str]]:
        """Those that can serve the backbone, and why the others cannot.

        Parameters
        ----------
        policies
            Each is entered once on the backbone.
        """
        good, notes = [], []
        for named in policies:
            try:
                check_named(self.pipeline.model, self.pipeline.processor, [named])
                with named.exits()(self.pipeline.model):
                    pass
                good.append(named)
            except (UnsupportedBackboneError, ConfigError) as error:
                notes.append(f"{named.name}: {error}")
        return good, notes

    def ask(
        self,
        policies: Sequence[NamedPolicy],
        questions: Sequence[Question] | None = None,
        runs: str = "runs",
        *,
        timed: bool = False,
    ) -> dict[str, PolicyResult]:
        """Results by name, always with the full model; runs below ``output/runs`` are taken up.

        Studies on the same questions share their runs: nothing is asked twice.

        Parameters
        ----------
        policies
            What is answered with, beside the full model.
        questions
            What is asked; None: all of the subject's.
        runs
            Folder of the runs, below the output folder.
        timed
            Measure times too.
        """
        full = self.policies(FULL_MODEL)
        others = [named for named in policies if named.name != FULL_MODEL]
        changes = {} if timed else {"timing_batches": 0}
        results = run_policies(
            self.pipeline,
            self.benchmark,
            self.questions if questions is None else questions,
            [*full, *others],
            self.config.for_evaluation(self.config.output / runs, **changes),
            description=runs,
        )
        return {result.name: result for result in results}

    def search(self) -> LayerSearch:
        """Mean KL(exit at k || full) on the last prompt position of the sampled questions, one pass; kept."""
        if "search" not in self._memory:
            inputs = (batch.inputs for batch in self.batches())
            self._memory["search"] = search_exit_layer(self.pipeline.model, inputs)
        return self._memory["search"]

    def about(self) -> dict[str, Any]:
        """What the findings belong to."""
        model = self.config.model
        adapter = {} if model.adapter is None else {"adapter": model.adapter}
        return {
            "backbone": model.path,
            **adapter,
            "fingerprint": fingerprint(self.pipeline.model),
            "weights": weights_digest(self.pipeline.model),
            "layers": self.num_layers,
            "benchmark": self.benchmark.name,
            "questions": len(self.questions),
            **({"unaskable": dict(self.unaskable)} if self.unaskable else {}),
            "sampled": len(self.sampled),
            "seed": self.config.seed,
            "dyvte": dyvte.__version__,
        }


def open_subject(config: AnalysisConfig, *, transfers: bool = False) -> Subject:
    """Load questions and backbone; questions that cannot be asked are excluded, with all about their images,
    where ``max_bad_samples`` allows for them.

    Parameters
    ----------
    config
        Backbone, benchmark and limits.
    transfers
        Will gates of other backbones be looked at? Without, they are refused before weights are read.

    Raises
    ------
    GateMismatchError
        Gates are another backbone's.
    DataError
        The questions cannot be read, or more of them than ``max_bad_samples`` cannot be asked.
    UnsupportedBackboneError
        No backbone is there, or it cannot be served.
    """
    benchmark = get_benchmark(config.benchmark)
    questions = load_questions(benchmark, config.data, config.limit, config.max_bad_samples)
    parse_policies(config.schedules, config.seed)  # malformed ones are found now; a study says which fit
    policies = _policies([f"gates:{path}" for path in config.gates], config.seed)
    if transfers:
        policies = [replace(one, options={"allow_transfer": True}) for one in policies]
    pipeline = load_pipeline(config, policies=policies)
    kept, unaskable = without_unaskable(
        pipeline,
        questions,
        prompts_of(benchmark, questions, config.question_suffix),
        f"{benchmark.name} ({config.data})",
        config.max_bad_samples,
    )
    return Subject(config, pipeline, benchmark, kept, unaskable)


def _policies(texts: Sequence[str], seed: int) -> list[NamedPolicy]:
    """Policies of studies: gates are named by a setting of their own."""
    named = parse_policies(texts, seed)
    own = (text.partition("gates:")[2] for text in texts)
    return [replace(one, setting=f"gates {path}") if path else one for one, path in zip(named, own)]


def gates_of(subject: Subject) -> Mapping[str, str]:
    """The gates checkpoints in their policy form, by path; ConfigError where none is given."""
    if not subject.config.gates:
        raise ConfigError("this study needs trained gates: give --gates FOLDER, one or several")
    return {path: f"gates:{path}" for path in subject.config.gates}
