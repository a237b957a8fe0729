"""Traced samples with their questions and images: what rules are tuned and judged on without the model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from dyvte.data import open_conversations
from dyvte.errors import DataError
from dyvte.formatting import name_some
from dyvte.gates import DEFAULT_FEATURES
from dyvte.teacher.store import TraceStore
from dyvte.teacher.trace import Trace


@dataclass(frozen=True)
class TracedScenes:
    """A trace, and for each of its samples the question and the image it is about."""

    trace: Trace
    questions: tuple[str, ...]
    image_ids: tuple[str, ...]
    features: tuple[str, ...] = DEFAULT_FEATURES
    """Names of the parts of the trace's features."""

    @property
    def num_layers(self) -> int:
        """L."""
        return self.trace.num_layers


def load_scenes(traces: Path, data: Path, image_folder: Path) -> TracedScenes:
    """Join a trace store with the LLaVA json that it was made from.

    Samples without an image are excluded: nothing leaves there.

    Parameters
    ----------
    traces
        Folder of the store.
    data
        The json.
    image_folder
        What its image entries are relative to.

    Raises
    ------
    DataError
        A traced sample is not in the json.
    """
    store = TraceStore.open(traces)
    trace, image_ids = store.trace(), store.image_ids()
    conversations = open_conversations(data, image_folder)
    question_of = {s.id: s.question for turns in ("all", "first") for s in conversations.samples(turns)}
    missing = [sample_id for sample_id in trace.sample_ids if sample_id not in question_of]
    if missing:
        raise DataError(
            f"{len(missing)} traced samples of {traces} are not in {data}: {name_some(missing)}. "
            "Give the file that the traces were made from"
        )
    rows = (trace.num_visual > 0).nonzero().flatten().tolist()
    if not rows:
        raise DataError(f"{traces}: no traced sample has an image")
    trace = trace.rows(rows)
    return TracedScenes(
        trace=trace,
        questions=tuple(question_of[sample_id] for sample_id in trace.sample_ids),
        image_ids=tuple(image_ids[row] for row in rows),
        features=store.manifest.features,
    )


def distinct_share(questions: Sequence[str]) -> float:
    """Distinct wordings as a share of the questions."""
    return len(set(questions)) / len(questions)
