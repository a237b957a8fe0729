"""What a run leaves on disk, and how a killed run goes on.

While a policy's answers come in they are appended, a batch at a time, to ``answers.partial.jsonl``. Batches
are fixed by the questions alone, so a run that goes on after a kill asks the missing batches as they would
have been asked, and ends with the same files: ``predictions.jsonl`` and ``exits.jsonl``, in the order of the
questions.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from dyvte.errors import ConfigError, DataError
from dyvte.evaluation.base import read_jsonl
from dyvte.files import write_atomically

RUN_FILE = "run.json"
PARTIAL_FILE = "answers.partial.jsonl"
PREDICTIONS_FILE = "predictions.jsonl"
EXITS_FILE = "exits.jsonl"


@dataclass(frozen=True, kw_only=True)
class Answer:
    """One question's answer and what it cost.

    Attributes
    ----------
    question_id, prediction : str
    exit_layer : layers that processed the visual tokens; -1 without an image.
    num_visual, num_text : tokens of the prompt.
    num_new_tokens : tokens generated, the closing one included.
    kv_bytes : share of the batch's KV cache after prefill.
    gate_logits : one per layer, None where no gate ran; empty when no gates were used.
    """

    question_id: str
    prediction: str
    exit_layer: int
    num_visual: int
    num_text: int
    num_new_tokens: int
    kv_bytes: float
    gate_logits: tuple[float | None, ...] = ()


class AnswerLog:
    """Answers of one policy in one folder, resumable.

    Parameters
    ----------
    folder : where the files go.
    identity : all that the answers depend on; a folder made with another identity is refused.
    batches : question ids of every batch, in the order they are asked.
    overwrite : start anew whatever lies there.

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
    ) -> None:
        self.folder = Path(folder)
        self.batches = [tuple(batch) for batch in batches]
        self.answers: dict[str, Answer] = {}
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            if overwrite:
                for name in (RUN_FILE, PARTIAL_FILE, PREDICTIONS_FILE, EXITS_FILE):
                    (self.folder / name).unlink(missing_ok=True)
            self._check_identity(json.loads(json.dumps(identity)))
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
        """Keep one batch's answers, on disk before this returns."""
        if tuple(answer.question_id for answer in answers) != self.batches[batch_index]:
            raise DataError(f"answers do not belong to batch {batch_index} of {self.folder}")
        text = "".join(_line(asdict(answer)) for answer in answers)
        with (self.folder / PARTIAL_FILE).open("a", encoding="utf-8", newline="\n") as stream:
            stream.write(text)
            stream.flush()
            os.fsync(stream.fileno())
        self.answers.update((answer.question_id, answer) for answer in answers)

    def finish(self, question_ids: Sequence[str]) -> list[Answer]:
        """Write the final files in the order of ``question_ids`` and return the answers in it."""
        answers = [self.answers[question_id] for question_id in question_ids]
        predictions = ({"question_id": a.question_id, "prediction": a.prediction} for a in answers)
        exits = ({k: v for k, v in asdict(a).items() if k != "prediction"} for a in answers)
        write_atomically(self.folder / PREDICTIONS_FILE, "".join(map(_line, predictions)))
        write_atomically(self.folder / EXITS_FILE, "".join(map(_line, exits)))
        (self.folder / PARTIAL_FILE).unlink(missing_ok=True)
        return answers

    def _check_identity(self, identity: dict[str, Any]) -> None:
        path = self.folder / RUN_FILE
        if not path.is_file():
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
            exits = {row["question_id"]: row for row in read_jsonl(self.folder / EXITS_FILE)}
            for row in read_jsonl(self.folder / PREDICTIONS_FILE):
                self._take({**exits[row["question_id"]], **row})
            return
        path = self.folder / PARTIAL_FILE
        if not path.is_file():
            return
        for line in path.read_bytes().split(b"\n"):
            try:
                self._take(json.loads(line))
            except (ValueError, TypeError):
                continue  # a line cut off by the kill: its batch is incomplete and is asked again
        incomplete = {q for i in self.missing() for q in self.batches[i]}
        self.answers = {q: answer for q, answer in self.answers.items() if q not in incomplete}
        write_atomically(path, "".join(_line(asdict(answer)) for answer in self.answers.values()))

    def _take(self, row: Mapping[str, Any]) -> None:
        answer = Answer(**{**row, "gate_logits": tuple(row.get("gate_logits", ()))})
        self.answers[answer.question_id] = answer


def _line(row: Mapping[str, Any]) -> str:
    return json.dumps(row, ensure_ascii=False) + "\n"


def texts(answers: Iterable[Answer]) -> dict[str, str]:
    """Predictions by question id."""
    return {answer.question_id: answer.prediction for answer in answers}
