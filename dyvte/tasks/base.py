"""What every benchmark is: questions from disk, a prompt per question, and a pure scorer of predictions.

A benchmark is one file: a registered subclass of :class:`Benchmark` (or
:class:`~dyvte.tasks.choices.ChoiceBenchmark`) that says which formats there are, what a row of its table
means, and what an answer is worth.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any, ClassVar, TypeAlias

import numpy as np

from dyvte.errors import DataError, ScoreError
from dyvte.formatting import name_some
from dyvte.readers.files import fit, shards_below, tables_below
from dyvte.readers.rows import Row, halves_taken
from dyvte.readers.tables import read_table
from dyvte.registry import Registry
from dyvte.tasks.dialects import DIALECTS as DIALECTS
from dyvte.tasks.dialects import check_dialect as check_dialect
from dyvte.tasks.metrics import NOT_GRADED, breakdown, percent, ungraded
from dyvte.tasks.prompts import SHORT_ANSWER_SUFFIX
from dyvte.tasks.records import Predictions as Predictions
from dyvte.tasks.records import Question as Question
from dyvte.tasks.records import count_unknown, refuse_missing_files, require_all, unique_ids, with_damage
from dyvte.tasks.statistics import Statistic, mean_statistic, unit_strata
from dyvte.tasks.submissions import Submissions

Source: TypeAlias = Callable[[Path], "list[Question] | None"]
"""Questions below a root, or None where the root is not of that format."""


class Benchmark(Submissions):
    """A benchmark but for its formats (:meth:`sources`, :meth:`table_question`) and its rule (:meth:`hits`).

    Attributes
    ----------
    name : str
        On the command line.
    title : str
        As its authors write it.
    expected_tree : str
        Shown for a folder of no known format.
    tables : tuple of str
        File names of VLMEvalKit's table, as patterns in which letter case does not count; the first that
        fits is taken. One with the benchmark's name in it, so that a file of one's own can be read.
    shards : tuple of str
        Patterns of the parquet files of a Hugging Face split; all files of the first that fits are read.
    columns : tuple of tuple of str
        What a table must have: of each tuple one column.
    shard_columns : tuple of str, or of tuples of str
        What a parquet split must have beside that (of a tuple one), by which it is told from those of other
        benchmarks.
    dialects : tuple of str
        Whose rules exist for it.
    suffix : str
        What LLaVA appends to its questions.
    max_new_tokens : int
        How long an answer may be.
    unit : str
        What was drawn independently: the questions of one ``image_id`` are about one of these.
    score_name : str
        What :meth:`statistic` gives, and its unit.
    headline_metrics : tuple of str
        Keys of :meth:`score` that the headline consists of.
    wants_masks : bool
        Answers hold a mask (:mod:`dyvte.tasks.answers.masks`), which a mask head makes.
    """

    name: ClassVar[str] = ""
    title: ClassVar[str] = ""
    expected_tree: ClassVar[str] = ""
    tables: ClassVar[tuple[str, ...]] = ()
    shards: ClassVar[tuple[str, ...]] = ()
    columns: ClassVar[tuple[tuple[str, ...], ...]] = (("question",),)
    shard_columns: ClassVar[tuple[str | tuple[str, ...], ...]] = ()
    dialects: ClassVar[tuple[str, ...]] = DIALECTS
    suffix: ClassVar[str] = SHORT_ANSWER_SUFFIX
    max_new_tokens: ClassVar[int] = 16
    unit: ClassVar[str] = "image"
    score_name: ClassVar[str] = "accuracy, %"
    headline_metrics: ClassVar[tuple[str, ...]] = ("accuracy",)
    wants_masks: ClassVar[bool] = False

    # --- questions --------------------------------------------------------------------------------------

    def sources(self) -> Sequence[Source]:
        """Readers of the formats, in the order in which they are tried; here the table alone."""
        return (self.table,)

    def table(self, root: Path) -> list[Question] | None:
        """The questions of VLMEvalKit's TSV or of a Hugging Face parquet split."""
        files = self._own_tables(root)[:1] or shards_below(root, self.shards)
        if not files:
            return None
        base = root if root.is_dir() else root.parent
        rows = read_table(files)
        if rows:
            self._check_columns(rows[0], files[0])
        found = (self.table_question(row, number, base) for number, row in enumerate(rows, start=1))
        return [question for question in found if question is not None]

    def _own_tables(self, root: Path) -> list[Path]:
        """TSV files that bear the benchmark's name, and no other's better; the best first."""
        fits = {path: fit(path.name, self.tables) for path in tables_below(root)}
        own = [path for path, own_fit in fits.items() if own_fit and own_fit >= _best_fit(path.name)]
        return sorted(own, key=lambda path: (-fits[path], path.name))

    def _check_columns(self, row: Row, path: Path) -> None:
        own = self.shard_columns if path.suffix == ".parquet" else ()
        for names in (*self.columns, *((name,) if isinstance(name, str) else name for name in own)):
            if not any(name in row for name in names):
                raise DataError(
                    f"{path} is no table of {self.title}: it has no column {' or '.join(map(repr, names))}, "
                    f"only {', '.join(map(repr, row))}"
                )

    def table_question(self, row: Row, number: int, base: Path) -> Question | None:
        """The question of a table's row; None for one that the benchmark does not ask.

        Parameters
        ----------
        row
            Its image cells are packed, see :func:`~dyvte.readers.files.table_images`.
        number
            Of the row, from 1.
        base
            Folder of the table.
        """
        raise NotImplementedError(f"{type(self).__name__} defines no `table_question`")

    def load(
        self, root: Path, limit: int | None = None, *, images: bool = True, damaged: bool = False
    ) -> list[Question]:
        """Read the questions.

        Parameters
        ----------
        root
            A folder of one of the formats, or the question file itself.
        limit
            Keep about that many questions.
        images
            Check that the images and videos of the questions kept are there; scoring needs none.
        damaged
            Keep a question with half a character in a text of it, and say so in its ``damage``; else it is an
            error of the file.

        Raises
        ------
        DataError
            No known format (the expected trees are shown), another benchmark's table, a record that is not as
            it should be (named), duplicate ids, gold answers that are partly absent, missing images.
        """
        root = Path(root)
        if not root.exists():
            raise self.layout_error(root, "the folder does not exist")
        with halves_taken() if damaged else nullcontext():
            questions = next((q for source in self.sources() if (q := source(root)) is not None), None)
        if questions is None:
            raise self.layout_error(root, f"no question file of a known format{_other_tables(root)}")
        if damaged:
            questions = [with_damage(question) for question in questions]
        if not questions:
            raise self.layout_error(root, "the question file holds no question")
        unique_ids(questions, root)
        without = [q.id for q in questions if q.answer is None]
        if without and len(without) < len(questions):
            raise DataError(f"{root}: {len(without)} questions have no gold answer: {name_some(without)}")
        kept = self.limited(questions, limit)
        if images:
            refuse_missing_files(kept, root)
        return kept

    def layout_error(self, root: Path, problem: str) -> DataError:
        """The error for a folder that is not the benchmark's layout: shows what was looked for.

        Parameters
        ----------
        root
            As it was given.
        problem
            What is wrong with it.
        """
        return DataError(f"{root} is not {self.title} data: {problem}.\nExpected:\n{self.expected_tree}")

    def limited(self, questions: list[Question], limit: int | None) -> list[Question]:
        """The first ``limit`` questions."""
        return questions[:limit]

    def prompt(self, question: Question, suffix: str | None = None) -> str:
        """The text asked of the model, without image placeholder.

        Parameters
        ----------
        question
            As :meth:`load` gives it.
        suffix
            Appended; None: what LLaVA appends.
        """
        return question.text + (self.suffix if suffix is None else suffix)

    # --- scores -----------------------------------------------------------------------------------------

    def hits(
        self, questions: Sequence[Question], predictions: Predictions, dialect: str
    ) -> list[bool] | list[float]:
        """What each question is worth: right or wrong, or a share in [0, 1].

        Parameters
        ----------
        questions
            All have a gold answer.
        predictions
            Hold an answer to each.
        dialect
            One of ``dialects``.
        """
        raise NotImplementedError(f"{type(self).__name__} defines no `hits`")

    def correct(
        self, questions: Sequence[Question], predictions: Predictions, dialect: str = "original"
    ) -> list[bool] | list[float]:
        """Whether each question, in order, is answered rightly under ``dialect``; a share where answers can
        be partly right.

        Parameters
        ----------
        questions, predictions
            As :meth:`load` and :meth:`read_predictions` give them; predictions for others are ignored.
        dialect
            Whose rule reads the answers.

        Raises
        ------
        ConfigError
            The dialect does not exist.
        ScoreError
            Questions without a prediction or without a gold answer.
        """
        self.check(questions, predictions, dialect)
        without = [q.id for q in questions if q.answer is None]
        if without:
            raise ScoreError(
                f"{len(without)} of {len(questions)} questions have no gold answer: {name_some(without)}. "
                f"Write {self.title}'s submission file and have it scored where the answers are"
            )
        return self.hits(questions, predictions, dialect)

    def check(self, questions: Sequence[Question], predictions: Predictions, dialect: str) -> None:
        """Raise unless the dialect exists and every question has a prediction.

        Parameters
        ----------
        questions
            As the benchmark gives them.
        predictions
            An answer to each.
        dialect
            Whose rule.
        """
        check_dialect(dialect, self.dialects, self.title)
        require_all(questions, predictions)

    def score(
        self, questions: Sequence[Question], predictions: Predictions, dialect: str = "original"
    ) -> dict[str, Any]:
        """Scores, JSON-ready: counts and :meth:`metrics`.

        On a split without public answers: ``graded`` is False and there is no metric. Parameters and errors
        are those of :meth:`correct`.
        """
        self.check(questions, predictions, dialect)
        scores: dict[str, Any] = {
            "benchmark": self.name,
            "dialect": dialect,
            "num_questions": len(questions),
            "num_unknown_predictions": count_unknown(questions, predictions),
        }
        if all(q.answer is None for q in questions):
            return {**scores, **ungraded("the answers of this split are not public")}
        hits = self.correct(questions, predictions, dialect)
        return {**scores, **self.metrics(questions, hits, predictions, dialect)}

    def metrics(
        self,
        questions: Sequence[Question],
        hits: Sequence[bool] | Sequence[float],
        predictions: Predictions,
        dialect: str,
    ) -> dict[str, Any]:
        """What :meth:`score` reports beside the counts: accuracy in percent, over all and per kind.

        Parameters
        ----------
        questions, predictions, dialect
            Those of :meth:`score`.
        hits
            What :meth:`correct` gives for them.
        """
        return {"accuracy": percent(hits), "per_kind": breakdown([q.kind for q in questions], hits)}

    def headline(self, scores: Mapping[str, Any]) -> str:
        """The text of a table cell: the headline metrics with one decimal."""
        if scores.get("graded") is False:
            return NOT_GRADED
        return " / ".join(f"{scores[metric]:.1f}" for metric in self.headline_metrics)

    def statistic(self, questions: Sequence[Question], hits: Sequence[float]) -> Statistic:
        """The score of the headline as a function of how often each unit was drawn.

        Parameters
        ----------
        questions, hits
            As :meth:`correct` takes and gives them.

        Returns
        -------
        Statistic
            Maps weights (R, G) over the units, in order of first appearance of ``image_id``, to (R,) scores.
        """
        return mean_statistic([q.image_id for q in questions], hits)

    def stratum(self, question: Question) -> str:
        """The part of the benchmark within which the question's unit is drawn; "" for one draw over all."""
        return ""

    def strata(self, questions: Sequence[Question]) -> np.ndarray:
        """(G,) index of every unit's stratum: units are drawn within theirs, so that none comes out empty."""
        return unit_strata([q.image_id for q in questions], [self.stratum(q) for q in questions])


TASKS: Registry[type[Benchmark]] = Registry("benchmark", "dyvte.tasks")
"""The benchmarks by name."""


def get_benchmark(name: str) -> Benchmark:
    """Benchmark by name.

    Raises
    ------
    ConfigError
        Unknown name; the nearest one is named.
    """
    return TASKS.get(name)()


def _best_fit(name: str) -> int:
    """How well a TSV's name fits the benchmark that it fits best."""
    return max(fit(name, TASKS.get(task).tables) for task in TASKS)


def _other_tables(root: Path) -> str:
    """Which tables are there, and whose they are."""
    said = []
    for path in tables_below(root):
        best = _best_fit(path.name)
        owners = [TASKS.get(task).title for task in TASKS if fit(path.name, TASKS.get(task).tables) == best]
        whose = f"the table of {' and of '.join(owners)}" if best else "not named after any benchmark"
        said.append(f"{path.name} is {whose}")
    return f" ({name_some(said)})" if said else ""
