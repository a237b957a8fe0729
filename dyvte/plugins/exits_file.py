"""The file of exits that plug-ins write beside a harness's own results: one JSON line for each answer."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dyvte.errors import ConfigError
from dyvte.evaluation.run_log import Answer, exit_row
from dyvte.files import write_atomically


def own_file(path: Path, rank: int) -> Path:
    """The file of one process: ``NAME.jsonl`` of the first, ``NAME.RANK.jsonl`` of the others."""
    return path.with_name(f"{path.stem}.{rank}{path.suffix}") if rank else path


class ExitsFile:
    """Rows of one process, in the order they were answered.

    A file that is there is continued: a harness that resumes asks only what it has no answer to. Rows name
    their question by the fields of ``key``; where one is answered again, the later row counts, and the next
    run takes the earlier one away, as it does a line that a kill cut off.

    Parameters
    ----------
    path
        As the user gave it; further processes write beside it (`own_file`).
    rank
        Which process this is.
    key
        Fields that name a question.
    settings
        What all rows have in common, such as the policy.

    Raises
    ------
    ConfigError
        The file holds rows of other settings, or cannot be read or written.
    """

    def __init__(self, path: Path, rank: int, key: tuple[str, ...], settings: Mapping[str, Any]) -> None:
        self.path, self.key, self.settings = own_file(path, rank), key, dict(settings)
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            rows = self._read()
            write_atomically(self.path, "".join(map(_line, rows)))
        except OSError as error:
            raise ConfigError(f"exits: cannot write {self.path}: {error.strerror or error}") from error

    def add(self, answer: Answer, **fields: Any) -> None:
        """Keep what one answer cost; ``fields`` stand first and hold the key."""
        row = {**fields, **self.settings, **exit_row(answer)}
        with self.path.open("a", encoding="utf-8", newline="\n") as stream:
            stream.write(_line(row))

    def _read(self) -> list[dict[str, Any]]:
        """The rows that are there: of each question the last, in the order of the questions."""
        if not self.path.is_file():
            return []
        rows: dict[Any, dict[str, Any]] = {}
        for number, text in enumerate(self.path.read_bytes().split(b"\n"), start=1):
            try:
                row = json.loads(text)
            except ValueError:
                continue  # cut off by a kill; blank at the end
            self._check(row)
            key = tuple(row[name] for name in self.key)
            rows[(number,) if None in key else key] = row
        return list(rows.values())

    def _check(self, row: Any) -> None:
        if not isinstance(row, dict) or not set(self.key) <= row.keys():
            raise ConfigError(
                f"exits: {self.path} is not of this version: expected rows with {', '.join(self.key)}; name "
                "another file"
            )
        for name, value in self.settings.items():
            if row.get(name, value) != value:
                raise ConfigError(
                    f"exits: {self.path} holds rows of {name} {row[name]!r}, now {value!r}: name another "
                    "file, or remove that one to start anew"
                )


def _line(row: Mapping[str, Any]) -> str:
    return json.dumps(row, ensure_ascii=False) + "\n"
