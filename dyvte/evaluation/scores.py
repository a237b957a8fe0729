"""What a run reports of itself: scores, cost and times, in memory and in ``scores.json``.

Shape letters: L decoder layers.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from dyvte.costs.prefill import PrefillCost
from dyvte.entries import entries, record_of
from dyvte.errors import DataError
from dyvte.files import write_atomically
from dyvte.reductions import NO_REDUCTION

SCORES_FILE = "scores.json"
FULL_MODEL = "never"
"""The policy of the full model, and the name of its run: never an exit, no reduction."""
TIMED_IMAGES = ("fresh", "shared")
"""Images of timed questions: each question computes its own, or those of a batch share them."""

_LATER = {"mean_freeze_layer": None, "selection_flops_per_question": 0.0}
"""Costs that earlier versions did not know, and what they then were; omitted where they are that."""
_ADVICE = "not what this version of dyvte eval writes. Run the same command again with --overwrite"


@dataclass(frozen=True, kw_only=True)
class CostMetrics:
    """Exit layers, compute and memory, as means over the questions.

    Attributes
    ----------
    num_layers : L.
    mean_exit_layer : of the questions with an image.
    exit_layer_counts : questions by exit layer; -1 are those without an image.
    visual_compute : what was spent on visual tokens, as a share of the full model's.
    visual_token_layers_per_question : sum over layers of the visual tokens that they processed.
    prefill : by convention, see `dyvte.costs.prefill.CONVENTIONS`.
    score_row_flops_per_question : of the rows of attention that reductions had computed apart.
    vision_tower_flops_per_image : None where the config lacks a size.
    output_head_flops_per_token : of the language model's head.
    kv_bytes_per_question : of the KV cache after prefill.
    mean_visual_tokens, mean_text_tokens, mean_new_tokens : of the prompt, and generated.
    mean_freeze_layer : layers that updated the visual tokens; None where no token was frozen: as many as read
        them.
    selection_flops_per_question : of what reductions compute to choose tokens before the first layer.
    """

    num_layers: int
    mean_exit_layer: float
    exit_layer_counts: Mapping[int, int]
    visual_compute: float
    visual_token_layers_per_question: float
    prefill: Mapping[str, PrefillCost]
    score_row_flops_per_question: float
    vision_tower_flops_per_image: float | None
    output_head_flops_per_token: int
    kv_bytes_per_question: float
    mean_visual_tokens: float
    mean_text_tokens: float
    mean_new_tokens: float
    mean_freeze_layer: float | None = None
    selection_flops_per_question: float = 0.0

    @property
    def mean_updated_layers(self) -> float:
        """Layers that updated the visual tokens."""
        return self.mean_exit_layer if self.mean_freeze_layer is None else self.mean_freeze_layer


@dataclass(frozen=True, kw_only=True)
class GenerationTimes:
    """Medians over batches and turns; ratios, turn by turn, to the model without anything installed.

    Attributes
    ----------
    time_to_first_token_ms, first_token_ratio : vision tower, prefill and the choice of the token.
    time_per_token_ms, per_token_ratio : of each further token; None where only one was generated.
    """

    time_to_first_token_ms: float
    first_token_ratio: float
    time_per_token_ms: float | None
    per_token_ratio: float | None


@dataclass(frozen=True, kw_only=True)
class Machine:
    """What a time was measured on."""

    processor: str
    cores: int | None
    torch_threads: int
    gpu: str | None

    def __str__(self) -> str:
        return f"{self.gpu or self.processor}, {self.torch_threads} threads"


@dataclass(frozen=True, kw_only=True)
class Timing:
    """A run's times and how they were taken.

    Attributes
    ----------
    times : of the run.
    plain : of the model without anything installed, on the same batches in turns.
    batches, batch_size, new_tokens, repeats : how many of each were timed.
    machine : where.
    images : one of `TIMED_IMAGES`; None in what earlier versions wrote, which knew fresh ones alone.
    """

    times: GenerationTimes
    plain: GenerationTimes
    batches: int
    batch_size: int
    new_tokens: int
    repeats: int
    machine: Machine
    images: str | None = None


@dataclass(frozen=True)
class RunIdentity:
    """What a run's answers depend on, as ``run.json`` holds it, and what the run is called.

    Attributes
    ----------
    values : everything, by name; JSON-ready.
    name : of the run, and of its folder.
    backbone : folder or hub id.
    """

    values: Mapping[str, Any]
    name: str
    backbone: str

    @property
    def policy(self) -> str:
        """When visual tokens leave, as the command line says it; "gates" and "given" for what it cannot."""
        return str(self.values["policy"])

    @property
    def reduction(self) -> str:
        """What else was spent on them less, as the command line says it; "none" without."""
        return str(self.values.get("reduction", NO_REDUCTION))

    @property
    def is_full_model(self) -> bool:
        """No exit, no reduction."""
        return self.policy == FULL_MODEL and self.reduction == NO_REDUCTION

    @property
    def questions_sha256(self) -> str | None:
        """Fingerprint of the questions and how they were put."""
        return self.values.get("questions_sha256")

    @property
    def gates_sha256(self) -> str | None:
        """Fingerprint of the gates; None without."""
        return self.values.get("gates_sha256")

    @property
    def threshold(self) -> float | None:
        """Of the gates; None without."""
        return self.values.get("threshold")


@dataclass(frozen=True, kw_only=True)
class RunScores:
    """One policy with its reductions on one benchmark.

    Attributes
    ----------
    scores : what the benchmark's own rule says; its keys are the benchmark's.
    headline : the text of a table cell.
    cost : exit layers, compute and memory.
    same_answer_as_never : share of questions with the whole answer of the full model; None where that was not
        run beside.
    timing : None where nothing was timed.
    run : what the answers depend on.
    config : the settings of the evaluation, as YAML would hold them.
    unanswered : questions that could not be asked, by id, and why. Scores count an empty answer for each, as
        the benchmark's rule reads it; all else is of the other questions.
    """

    scores: Mapping[str, Any]
    headline: str
    cost: CostMetrics
    same_answer_as_never: float | None
    timing: Timing | None
    run: RunIdentity
    config: Mapping[str, Any]
    unanswered: Mapping[str, str] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready, as ``scores.json`` holds it: costs on the top level, times beside what they are of."""
        timing = None
        if self.timing is not None:
            timing = asdict(self.timing)
            timing = {**timing.pop("times"), **timing}
            if self.timing.images is None:
                del timing["images"]
        cost = asdict(self.cost)
        cost["exit_layer_counts"] = {str(k): count for k, count in cost["exit_layer_counts"].items()}
        for name, unsaid in _LATER.items():  # the file that versions without it wrote
            if cost[name] == unsaid:
                del cost[name]
        return {
            "scores": dict(self.scores),
            "headline": self.headline,
            **cost,
            "same_answer_as_never": self.same_answer_as_never,
            **({"unanswered": dict(self.unanswered)} if self.unanswered else {}),
            "timing": timing,
            "run": {**self.run.values, "name": self.run.name, "backbone": self.run.backbone},
            "config": dict(self.config),
        }

    @staticmethod
    def from_dict(values: Mapping[str, Any], where: str = "scores") -> RunScores:
        """Inverse of `to_dict`.

        Parameters
        ----------
        values : what the JSON holds.
        where : file, for messages.

        Raises
        ------
        DataError
            An entry is missing or is not what it should be; it is named.
        """
        if not isinstance(values, Mapping):
            raise DataError(f"{where}: expected an object, found {type(values).__name__}")
        names = ("scores", "headline", "same_answer_as_never", "timing", "run", "config")
        top = entries(values, names, where, _ADVICE)
        identity = entries(top["run"], ("policy", "name", "backbone"), f"{where}, run", _ADVICE)
        timing = top["timing"]
        return RunScores(
            scores=top["scores"],
            headline=top["headline"],
            cost=_cost(values, where),
            same_answer_as_never=top["same_answer_as_never"],
            timing=None if timing is None else _timing(timing, f"{where}, timing"),
            run=RunIdentity(
                {k: v for k, v in top["run"].items() if k not in ("name", "backbone")},
                identity["name"],
                identity["backbone"],
            ),
            config=top["config"],
            unanswered=values.get("unanswered") or {},
        )

    def write(self, folder: Path) -> None:
        """Write ``scores.json``."""
        write_atomically(folder / SCORES_FILE, json.dumps(self.to_dict(), indent=2) + "\n")

    @staticmethod
    def read(folder: Path) -> RunScores:
        """Read ``scores.json`` of a run's folder.

        Raises
        ------
        DataError
            It is not there, or not what ``dyvte eval`` writes; the entry is named.
        """
        path = Path(folder) / SCORES_FILE
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
        except OSError as error:
            raise DataError(f"cannot read {path}: {error.strerror or error}") from error
        except ValueError as error:
            raise DataError(f"{path} is not what dyvte eval writes: {error}") from error
        return RunScores.from_dict(values, str(path))


def _cost(values: Mapping[str, Any], where: str) -> CostMetrics:
    names = [one.name for one in dataclasses.fields(CostMetrics) if one.name not in _LATER]
    cost = {**entries(values, names, where, _ADVICE), **{k: values.get(k, v) for k, v in _LATER.items()}}
    try:
        cost["exit_layer_counts"] = {int(k): count for k, count in cost["exit_layer_counts"].items()}
        conventions = dict(cost["prefill"].items())
    except (AttributeError, ValueError) as error:
        raise DataError(f"{where} is not what dyvte eval writes ({error})") from error
    prefill = {
        name: record_of(PrefillCost, one, f"{where}, prefill, {name}", _ADVICE)
        for name, one in conventions.items()
    }
    return CostMetrics(**{**cost, "prefill": prefill})


def _timing(values: Mapping[str, Any], where: str) -> Timing:
    names = [one.name for one in dataclasses.fields(Timing) if one.name not in ("times", "images")]
    about = entries(values, names, where, _ADVICE)
    about["images"] = values.get("images")
    about["plain"] = record_of(GenerationTimes, about["plain"], f"{where}, plain", _ADVICE)
    about["machine"] = record_of(Machine, about["machine"], f"{where}, machine", _ADVICE)
    return Timing(times=record_of(GenerationTimes, values, where, _ADVICE), **about)
