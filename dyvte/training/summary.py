"""What a run leaves about itself, ``summary.json``: how the weights came about, and how they fared."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, TypeVar, get_type_hints

from dyvte.config import to_dict
from dyvte.entries import record_of
from dyvte.errors import DataError
from dyvte.files import write_atomically
from dyvte.training.config import TrainConfig
from dyvte.training.loop import TrainingSize

SUMMARY_FILE = "summary.json"
_ADVICE = "not what this version of dyvte train writes. Choose another output_dir"

Summary = TypeVar("Summary", bound="RunSummary")


@dataclass(frozen=True, kw_only=True)
class TrainingRecord:
    """How weights came about: what gates and adapters have in common.

    Attributes
    ----------
    optimizer : its settings, as YAML would hold them.
    epochs, steps, global_batch, num_samples, seed : of the training; samples in a step, and in all.
    """

    optimizer: Mapping[str, Any]
    epochs: int
    steps: int
    global_batch: int
    num_samples: int
    seed: int

    @staticmethod
    def common(cfg: TrainConfig, size: TrainingSize) -> dict[str, Any]:
        """The fields above, by name.

        Parameters
        ----------
        cfg
            Of the run.
        size
            Its samples and steps.
        """
        return {
            "optimizer": to_dict(cfg.optimizer),
            "epochs": cfg.epochs,
            "steps": size.steps,
            "global_batch": size.global_batch,
            "num_samples": size.num_samples,
            "seed": cfg.seed,
        }


@dataclass(frozen=True, kw_only=True)
class RunSummary:
    """How a run went: what gates and adapters have in common.

    Attributes
    ----------
    judged_on : which samples, in words.
    num_judged : how many.
    parameters : trained ones.
    dropped : samples that could not be used, as text naming file, sample and reason.
    train_seconds : of the training, without the teacher.
    record : how the weights came about.
    """

    judged_on: str
    num_judged: int
    parameters: int
    dropped: tuple[str, ...]
    train_seconds: float
    record: TrainingRecord

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready, as ``summary.json`` holds it: the record's entries beside the others."""
        values = asdict(self)
        record = values.pop("record")
        return {**values, **record}

    @classmethod
    def from_dict(cls: type[Summary], values: Any, where: str) -> Summary:
        """Inverse of `to_dict`.

        Parameters
        ----------
        values
            What the JSON holds.
        where
            File, for messages.

        Raises
        ------
        DataError
            An entry is absent; it is named.
        """
        record = record_of(get_type_hints(cls)["record"], values, where, _ADVICE)
        return record_of(cls, {**values, "record": record}, where, _ADVICE)


def write_summary(cfg: TrainConfig, summary: RunSummary) -> None:
    """Write the last file of a run.

    Parameters
    ----------
    cfg
        Of the run.
    summary
        What is written.
    """
    write_atomically(cfg.output_dir / SUMMARY_FILE, json.dumps(summary.to_dict(), indent=2) + "\n")


def read_summary(cfg: TrainConfig, cls: type[Summary]) -> Summary | None:
    """The summary in the output folder; None if there is none.

    Parameters
    ----------
    cls
        The gates' or the adapter's.

    Raises
    ------
    DataError
        If the file cannot be read, or is not what this version writes; it and the entry are named.
    """
    path = cfg.output_dir / SUMMARY_FILE
    if not path.is_file():
        return None
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"{path} cannot be read ({error}). Choose another output_dir") from error
    return cls.from_dict(values, str(path))


def judged_on(held_out: Any | None) -> str:
    """In words: the held-out samples, or without any those of the training."""
    return "held-out samples" if held_out is not None else "training samples"
