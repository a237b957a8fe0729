"""Answers that an earlier run holds: what was asked once in the same way is not asked again."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dyvte.errors import ConfigError
from dyvte.evaluation.run_log import EXITS_FILE, PREDICTIONS_FILE, RUN_FILE
from dyvte.files import write_atomically


def check_earlier(earlier: Sequence[Path]) -> None:
    """Raise ConfigError where a folder of earlier runs is not there: all would quietly be asked again."""
    for root in earlier:
        if not root.is_dir():
            raise ConfigError(f"earlier: there is no folder {root}; expected the --output of a dyvte eval")


def take_over(folder: Path, identity: Mapping[str, Any], earlier: Sequence[Path]) -> bool:
    """Copy a finished run of this identity into an empty folder, if there is one among the earlier runs.

    Parameters
    ----------
    folder
        Of the run to be; left alone where it holds one already.
    identity
        All that its answers depend on (`dyvte.evaluation.identity.identity_of`).
    earlier
        Folders of runs, or folders of such folders (`check_earlier`).

    Returns
    -------
    bool
        Whether one was found.
    """
    if (folder / RUN_FILE).exists():
        return False
    wanted = json.loads(json.dumps(identity))
    for root in earlier:
        for path in sorted({root / RUN_FILE, *root.glob(f"*/{RUN_FILE}")}):
            files = [path.with_name(name) for name in (RUN_FILE, EXITS_FILE, PREDICTIONS_FILE)]
            if all(file.is_file() for file in files) and _read(path) == wanted:
                folder.mkdir(parents=True, exist_ok=True)
                for file in files:  # the predictions last: with them a run is finished
                    write_atomically(folder / file.name, file.read_text(encoding="utf-8"))
                return True
    return False


def _read(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError:  # damaged: a run of nothing that is known
        return None
