"""What a run leaves on disk, and how a killed run goes on.

While a policy's answers come in they are appended, a batch at a time, to ``answers.partial.jsonl`` (each
further process has a file of its own). Batches are fixed by the questions alone, so a run that goes on after
a kill, with however many processes, asks the missing batches as they would have been asked, and ends with the
same files: ``predictions.jsonl`` and ``exits.jsonl``, in the order of the questions.

Shape letters: L decoder layers.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any, TypeAlias

from dyvte.errors import ConfigError, DataError
from dyvte.evaluation.scores import SCORES_FILE
from dyvte.files import write_atomically
from dyvte.readers.rows import read_jsonl

RUN_FILE = "run.json"
PARTIAL_FILE = "answers.partial.jsonl"
PREDICTIONS_FILE = "predictions.jsonl"
EXITS_FILE = "exits.jsonl"

Layers: TypeAlias = tuple[tuple[int, int], ...]
"""Tokens per decoder layer, runs of equal numbers together: ((tokens, how many layers), ...)."""


def pack_layers(tokens_L: Sequence[int]) -> Layers:
    """Runs of equal numbers together: (9, 9, 4) becomes ((9, 2), (4, 1))."""
    return tuple((tokens, len(list(run))) for tokens, run in groupby(tokens_L))


def unpack_layers(runs: Layers) -> list[int]:
    """One number per layer."""
    return [tokens for tokens, layers in runs for _ in range(layers)]


@dataclass(frozen=True, kw_only=True)
class Answer:
    """One question's answer and what it cost.

    Attributes
    ----------
    question_id, prediction : str
    exit_layer : layers that could read the visual tokens; -1 without an image.
    freeze_layer : layers that updated them; None: as many as read them.
    num_visual, num_text : tokens of the prompt.
    visual_tokens, text_tokens : tokens that each decoder layer processed in prefill, after whatever exits and
        reductions took away.
    frozen_tokens : further visual tokens that each layer read and did not update; empty: none in any.
    score_layers : layers k in which a reduction had the last token's attention computed apart.
    num_new_tokens : tokens generated, the closing one included.
    kv_bytes : share of the batch's KV cache after prefill, by the tokens that each layer holds of it.
    gate_logits : one per layer, None where no gate ran; empty when no gates were used.
    freeze_logits : of the freeze head, entry j after j layers; empty without one.
    problem : why the question was not asked; empty for one that was.
    """

    question_id: str
    prediction: str
    exit_layer: int
    num_visual: int
    num_text: int
    visual_tokens: Layers
    text_tokens: Layers
    num_new_tokens: int
    kv_bytes: float
    score_layers: tuple[int, ...] = ()
    gate_logits: tuple[float | None, ...] = ()
    freeze_layer: int | None = None
    frozen_tokens: Layers = ()
    freeze_logits: tuple[float | None, ...] = ()
    problem: str = ""

    @staticmethod
    def unanswered(question_id: str, problem: str, num_layers: int) -> Answer:
        """In place of the answer to a question that cannot be asked: an empty one that cost nothing.

        Parameters
        ----------
        question_id
            Of the question.
        problem
            Why it cannot be asked.
        num_layers
            L.
        """
        none = ((0, num_layers),)
        return Answer(
            question_id=question_id,
            prediction="",
            exit_layer=-1,
            num_visual=0,
            num_text=0,
            visual_tokens=none,
            text_tokens=none,
            num_new_tokens=0,
            kv_bytes=0.0,
            problem=problem,
        )

    @property
    def updated_layers(self) -> int:
        """Layers that updated the visual tokens; -1 without an image."""
        return self.exit_layer if self.freeze_layer is None else self.freeze_layer

    @property
    def visual_token_layers(self) -> int:
        """Sum over layers of the visual tokens they processed."""
        return sum(tokens * layers for tokens, layers in self.visual_tokens)

    @property
    def gate_probabilities(self) -> tuple[float | None, ...]:
        """Sigmoid of the gate logits: what is compared with the threshold."""
        return tuple(None if x is None else round(_sigmoid(x), 6) for x in self.gate_logits)


class AnswerLog:
    """Answers of one policy in one folder, resumable.

    Parameters
    ----------
    folder : where the files go.
    identity : all that the answers depend on; a folder made with another identity is refused.
    batches : question ids of every batch, in the order they are asked.
    overwrite : start anew whatever lies there.
    rank : which process this is. The first one makes the folder and tidies up what a kill left; the others
        may only look afterwards, and append to files of their own.

    Raises
    ------
    ConfigError
        The folder holds another run (the differing field is named), or cannot be written.
    """

    def __init__(
        self,
        folder: Path,
        identity: Mapping[str, Any],
        batches: Sequence[Sequence[str]],
        *,
        overwrite: bool = False,
        rank: int = 0,
    ) -> None:
        self.folder, self.rank = Path(folder), rank
        self.batches = [tuple(batch) for batch in batches]
        self.answers: dict[str, Answer] = {}
        try:
            if rank == 0:
                self._prepare(identity, overwrite)
            self._read()
        except OSError as error:
            raise ConfigError(f"cannot write to {self.folder}: {error.strerror or error}") from error

    @property
    def finished(self) -> bool:
        """Whether every question has its answer on disk in final form."""
        return (self.folder / PREDICTIONS_FILE).is_file() and (self.folder / EXITS_FILE).is_file()

    def missing(self) -> list[int]:
        """Indices of the batches still to be asked."""
        return [i for i, ids in enumerate(self.batches) if any(q not in self.answers for q in ids)]

    def append(self, batch_index: int, answers: Sequence[Answer]) -> None:
        """Keep one batch's answers, on disk before this returns.

        Parameters
        ----------
        batch_index
            Of the batch.
        answers
            To all of its questions, in order.
        """
        if tuple(answer.question_id for answer in answers) != self.batches[batch_index]:
            raise DataError(f"answers do not belong to batch {batch_index} of {self.folder}")
        text = "".join(_line(vars(answer)) for answer in answers)
        path = self.folder / (_partial_name(self.rank) if self.rank else PARTIAL_FILE)
        with path.open("a", encoding="utf-8", newline="\n") as stream:
            stream.write(text)
            stream.flush()
            os.fsync(stream.fileno())
        self.answers.update((answer.question_id, answer) for answer in answers)

    def finish(self, question_ids: Sequence[str]) -> list[Answer]:
        """Take in what the other processes asked, write the final files in the order of ``question_ids``.

        Raises
        ------
        DataError
            A question has no answer yet.
        """
        if not self.finished:
            self._read()
        missing = self.missing()
        if missing:
            raise DataError(f"{self.folder}: {len(missing)} of {len(self.batches)} batches are unanswered")
        answers = [self.answers[question_id] for question_id in question_ids]
        predictions = ({"question_id": a.question_id, "prediction": a.prediction} for a in answers)
        write_atomically(self.folder / PREDICTIONS_FILE, "".join(map(_line, predictions)))
        write_atomically(self.folder / EXITS_FILE, "".join(_line(exit_row(a)) for a in answers))
        for path in self._partial_files():
            path.unlink()
        return answers

    def _prepare(self, identity: Mapping[str, Any], overwrite: bool) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        if overwrite:
            for name in (RUN_FILE, SCORES_FILE, PREDICTIONS_FILE, EXITS_FILE):
                (self.folder / name).unlink(missing_ok=True)
            for path in self._partial_files():
                path.unlink()
        self._check_identity(json.loads(json.dumps(identity)))
        if not self.finished:
            self._tidy()

    def _tidy(self) -> None:
        """Bring what a killed run left, of however many processes, into one file of whole batches."""
        files = self._partial_files()
        if not files:
            return
        self._read()
        incomplete = {q for i in self.missing() for q in self.batches[i]}
        whole = [vars(answer) for q, answer in self.answers.items() if q not in incomplete]
        write_atomically(self.folder / PARTIAL_FILE, "".join(map(_line, whole)))
        for path in files:
            if path.name != PARTIAL_FILE:
                path.unlink()
        self.answers.clear()

    def _partial_files(self) -> list[Path]:
        return sorted(self.folder.glob(_partial_name("*"))) + sorted(self.folder.glob(PARTIAL_FILE))

    def _check_identity(self, identity: dict[str, Any]) -> None:
        path = self.folder / RUN_FILE
        if not path.is_file() or not (self.finished or self._partial_files()):
            # of a start that answered nothing, there is nothing to mix up
            write_atomically(path, json.dumps(identity, indent=2, sort_keys=True) + "\n")
            return
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
        except json.JSONDecodeError as error:
            raise ConfigError(
                f"{path} is damaged: {error}; use another output folder or --overwrite"
            ) from error
        for key in sorted(identity.keys() | found.keys()):
            if identity.get(key) != found.get(key):
                raise ConfigError(
                    f"{self.folder} holds a run with another {key}: {found.get(key)!r}, "
                    f"now {identity.get(key)!r}. "
                    "Use another output folder, or --overwrite to start anew"
                )

    def _read(self) -> None:
        if self.finished:
            for answer in read_answers(self.folder):
                self.answers[answer.question_id] = answer
            return
        for path in self._partial_files():
            for line in path.read_bytes().split(b"\n"):
                try:
                    answer = _answer(json.loads(line))
                except (ValueError, TypeError, KeyError):
                    continue  # a line cut off by the kill: its batch is incomplete and is asked again
                self.answers[answer.question_id] = answer


def read_answers(folder: Path) -> list[Answer]:
    """Answers of a finished run, in the order of the questions.

    Raises
    ------
    DataError
        The run is not finished, or its files are damaged.
    """
    folder = Path(folder)
    exits = {row.pop("question_id"): row for row in read_jsonl(folder / EXITS_FILE)}
    try:
        return [
            _answer({**exits[row["question_id"]], **row}) for row in read_jsonl(folder / PREDICTIONS_FILE)
        ]
    except (KeyError, TypeError, ValueError) as error:
        raise DataError(
            f"{folder}: {PREDICTIONS_FILE} and {EXITS_FILE} do not fit together ({error!r}): "
            "ask again with --overwrite"
        ) from error


def _answer(row: Mapping[str, Any]) -> Answer:
    fields = {key: value for key, value in row.items() if key != "gate_probabilities"}
    for key in ("visual_tokens", "text_tokens", "frozen_tokens"):
        fields[key] = tuple((int(tokens), int(layers)) for tokens, layers in fields.get(key, ()))
    for key in ("score_layers", "gate_logits", "freeze_logits"):
        fields[key] = tuple(fields.get(key, ()))
    return Answer(**fields)


def exit_row(answer: Answer) -> dict[str, Any]:
    """A row of ``exits.jsonl``: all of an answer but its text; freezing and a problem where there are any."""
    row = {key: value for key, value in vars(answer).items() if key != "prediction"}
    for key in ("freeze_layer", "frozen_tokens", "freeze_logits", "problem"):
        if not row[key] and row[key] != 0:
            del row[key]
    return {**row, "gate_probabilities": answer.gate_probabilities}


def _partial_name(rank: int | str) -> str:
    return PARTIAL_FILE.replace(".jsonl", f".{rank}.jsonl")


def _sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x)) if x >= 0 else math.exp(x) / (1 + math.exp(x))


def _line(row: Mapping[str, Any]) -> str:
    return json.dumps(row, ensure_ascii=False) + "\n"


def texts(answers: Iterable[Answer]) -> dict[str, str]:
    """Predictions by question id."""
    return {answer.question_id: answer.prediction for answer in answers}
