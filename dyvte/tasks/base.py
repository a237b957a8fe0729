"""What every benchmark is: questions from disk, a prompt per question, and a pure scorer of predictions."""

from __future__ import annotations

import difflib
import importlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, TypeAlias

import numpy as np

from dyvte.errors import ConfigError, DataError, ScoreError
from dyvte.tasks.readers.tables import PackedImage
from dyvte.tasks.readers.videos import Video
from dyvte.tasks.statistics import Statistic

DIALECTS = ("original", "lmms", "vlmevalkit")
"""Whose rule reads an answer: the benchmark's own tool, lmms-eval, or VLMEvalKit."""

SHORT_ANSWER_SUFFIX = "\nAnswer the question using a single word or phrase."
"""What LLaVA's evaluation appends to questions with a short answer."""

LETTER_SUFFIX = "\nAnswer with the option's letter from the given choices directly."
"""What LLaVA's evaluation appends to multiple-choice questions."""

ImageSource: TypeAlias = Path | PackedImage
"""An image file, or an image inside a table (parquet, TSV)."""

IMAGE_EXTENSIONS = (".jpg", ".jpeg", ".png", ".webp", ".bmp")
_NAMED_AT_MOST = 5


@dataclass(frozen=True, kw_only=True)
class Question:
    """One question about one image, several images or a video.

    Attributes
    ----------
    id : str
        Unique within the benchmark; kept as text (GQA ids have leading zeros).
    image : Path or PackedImage, or None
        The first image; None for a question about a video.
    text : str
        The question as the benchmark states it, options included, without what evaluations append.
    answer : str or None
        Gold answer as stored; None on a split whose answers are not public.
    image_id : str
        The unit of dependence: questions with the same ``image_id`` are resampled together.
    kind : str
        Question type or subtask, for breakdowns.
    details : Mapping
        What only this benchmark's scorer needs.
    more_images : tuple
        Further images, in the order of the question's placeholders.
    video : Video or None
    """

    id: str
    image: ImageSource | None
    text: str
    answer: str | None
    image_id: str
    kind: str
    details: Mapping[str, Any] = field(default_factory=dict)
    more_images: tuple[ImageSource, ...] = ()
    video: Video | None = None

    @property
    def images(self) -> tuple[ImageSource, ...]:
        """All images, in order; empty for a question about a video."""
        return () if self.image is None else (self.image, *self.more_images)


@dataclass(frozen=True)
class Predictions:
    """Answers by question id.

    ``converted`` is True when the texts come from a benchmark's submission file, where the official
    tool compares them as they stand; False for a model's raw answers.
    """

    texts: Mapping[str, str]
    converted: bool = False


class Benchmark(Protocol):
    """Interface of a benchmark; :mod:`dyvte.tasks.common` does most of it."""

    name: str
    title: str
    expected_tree: str
    dialects: tuple[str, ...]
    unit: str
    score_name: str

    def load(self, root: Path, limit: int | None = None, *, images: bool = True) -> list[Question]:
        """Read the questions below ``root``; ``limit`` keeps about that many, whole images where paired;
        without ``images`` their files need not be there."""
        ...

    def prompt(self, question: Question, suffix: str | None = None) -> str:
        """Text asked of the model, without image placeholder; ``suffix`` None is what LLaVA appends."""
        ...

    def correct(
        self, questions: Sequence[Question], predictions: Predictions, dialect: str = "original"
    ) -> list[bool] | list[float]:
        """Whether each question, in order, is answered rightly under ``dialect``; a share where answers can
        be partly right."""
        ...

    def score(
        self, questions: Sequence[Question], predictions: Predictions, dialect: str = "original"
    ) -> dict[str, Any]:
        """Scores, JSON-ready."""
        ...

    def headline(self, scores: Mapping[str, Any]) -> str:
        """The figure of a table cell."""
        ...

    def statistic(self, questions: Sequence[Question], hits: Sequence[float]) -> Statistic:
        """The score as a function of how often each unit was drawn."""
        ...

    def strata(self, questions: Sequence[Question]) -> np.ndarray:
        """(G,) stratum of every unit, within which it is drawn."""
        ...

    def read_predictions(self, path: Path, questions: Sequence[Question]) -> Predictions:
        """Read raw answers (jsonl) or this benchmark's submission format."""
        ...

    def write_submission(self, folder: Path, questions: Sequence[Question], predictions: Predictions) -> Path:
        """Write the file or folder that the benchmark's own tool takes."""
        ...


_BENCHMARKS = {
    "gqa": "GQA",
    "mme": "MME",
    "pope": "POPE",
    "scienceqa": "ScienceQA",
    "ai2d": "AI2D",
    "mmbench": "MMBench",
    "mmmu": "MMMU",
    "seed": "SEED",
    "textvqa": "TextVQA",
    "vqav2": "VQAv2",
    "mmvet": "MMVet",
    "videomme": "VideoMME",
    "tgifqa": "TGIFQA",
}
"""Name, which is also the module in :mod:`dyvte.tasks`, and class."""


def benchmark_names() -> tuple[str, ...]:
    """Names that :func:`get_benchmark` takes."""
    return tuple(_BENCHMARKS)


def check_benchmark(name: str) -> None:
    """Raise ConfigError, naming the nearest name, unless ``name`` is a benchmark."""
    if name in _BENCHMARKS:
        return
    near = difflib.get_close_matches(str(name).lower().replace("-", "").replace("_", ""), _BENCHMARKS, 1)
    hint = f" (did you mean {near[0]!r}?)" if near else ""
    raise ConfigError(f"unknown benchmark {name!r}{hint}; known: {', '.join(_BENCHMARKS)}")


def get_benchmark(name: str) -> Benchmark:
    """Benchmark by name.

    Raises
    ------
    ConfigError
        Unknown name; the nearest one is named.
    """
    check_benchmark(name)
    module = importlib.import_module(f"dyvte.tasks.{name}")
    return getattr(module, _BENCHMARKS[name])()


def check_dialect(dialect: str, known: Sequence[str] = DIALECTS, benchmark: str = "") -> None:
    """Raise ConfigError unless ``dialect`` is one of ``known``."""
    if dialect not in DIALECTS:
        raise ConfigError(f"unknown scoring dialect {dialect!r}; known: {', '.join(DIALECTS)}")
    if dialect not in known:
        raise ConfigError(
            f"{benchmark} has no {dialect!r} dialect: that tool does not score it. Use {' or '.join(known)}"
        )


def name_some(items: Iterable[str]) -> str:
    """The first few items and how many more there are."""
    items = list(items)
    shown = ", ".join(items[:_NAMED_AT_MOST])
    return shown if len(items) <= _NAMED_AT_MOST else f"{shown} and {len(items) - _NAMED_AT_MOST} more"


def layout_error(benchmark: str, root: Path, problem: str, expected_tree: str) -> DataError:
    """The error for a folder that is not the benchmark's layout: shows what was looked for."""
    return DataError(f"{root} is not {benchmark} data: {problem}.\nExpected:\n{expected_tree}")


def unique_ids(questions: Sequence[Question], where: Path) -> None:
    """Raise DataError naming ids that occur twice."""
    seen: set[str] = set()
    twice = [q.id for q in questions if q.id in seen or seen.add(q.id)]
    if twice:
        raise DataError(f"{where}: {len(twice)} duplicate question ids: {name_some(twice)}")


def require_all(questions: Sequence[Question], predictions: Predictions) -> None:
    """Raise ScoreError naming questions without a prediction: the denominator never shrinks silently."""
    missing = [q.id for q in questions if q.id not in predictions.texts]
    if missing:
        raise ScoreError(
            f"{len(missing)} of {len(questions)} questions have no prediction: {name_some(missing)}. "
            "Every question must be answered; an empty answer counts as an answer"
        )


def count_unknown(questions: Sequence[Question], predictions: Predictions) -> int:
    """How many predictions belong to none of the questions (ignored, as the official tools do)."""
    known = {q.id for q in questions}
    return sum(1 for question_id in predictions.texts if question_id not in known)


def read_json(path: Path, unique_keys: bool = False) -> Any:
    """Parse a JSON file.

    Raises
    ------
    DataError
        Unreadable, not JSON, or (with ``unique_keys``) an object that states a key twice.
    """

    def pairs(items: list[tuple[str, Any]]) -> dict[str, Any]:
        result = dict(items)
        if unique_keys and len(result) != len(items):
            seen: set[str] = set()
            twice = [key for key, _ in items if key in seen or seen.add(key)]
            raise DataError(f"{path}: {len(twice)} duplicate question ids: {name_some(twice)}")
        return result

    try:
        return json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=pairs)
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror or error}") from error
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise DataError(f"{path} is not JSON: {error}") from error


def read_jsonl(path: Path) -> list[Any]:
    """Parse a JSON-lines file; lines end at ``\\n`` only (answers may hold U+2028 and its like)."""
    try:
        text = path.read_bytes().decode("utf-8")
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 text: {error}") from error
    rows = []
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError as error:
            raise DataError(f"{path}, line {number}: not JSON: {error}") from error
    return rows


def predictions_from_rows(
    rows: Sequence[Any], path: Path, id_key: str, text_keys: Sequence[str], converted: bool
) -> Predictions:
    """Collect ``row[id_key] -> row[first present text key]``.

    Raises
    ------
    ScoreError
        A row without id or text, or an id that occurs twice.
    """
    texts: dict[str, str] = {}
    for number, row in enumerate(rows, start=1):
        if not isinstance(row, Mapping) or id_key not in row:
            raise ScoreError(f"{path}, row {number}: no {id_key!r}")
        text = next((row[key] for key in text_keys if key in row), None)
        if not isinstance(text, str):
            raise ScoreError(f"{path}, row {number}: no text under {' or '.join(map(repr, text_keys))}")
        question_id = str(row[id_key])
        if question_id in texts:
            raise ScoreError(f"{path}, row {number}: a second prediction for question {question_id!r}")
        texts[question_id] = text
    return Predictions(texts, converted)


def read_raw_predictions(path: Path) -> Predictions:
    """Read jsonl answers: our ``predictions.jsonl`` or LLaVA's answers file (``question_id``, ``text``)."""
    return predictions_from_rows(
        read_jsonl(path), path, "question_id", ("prediction", "text"), converted=False
    )


def percent(hits: Sequence[bool] | Sequence[float]) -> float:
    """Mean of hits in percent; 0 for none, as the official tools print."""
    return 100.0 * sum(hits) / len(hits) if hits else 0.0
