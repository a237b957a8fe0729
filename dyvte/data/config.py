"""Settings of instruction data: where it is and what is taken of it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from dyvte.data.selection import Selection, select
from dyvte.data.sources import open_conversations, open_hub_conversations


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """LLaVA instruction data, from a file or from the hub, and what is taken of it."""

    path: Path | None = None
    """A .json, .jsonl or .parquet file of conversations, or a dataset folder."""
    hub_id: str | None = None
    """A hub dataset instead."""
    subset: str | None = None
    """hub_id: the dataset's configuration, where it has several."""
    split: str = "train"
    """hub_id, or a dataset folder: which split."""
    revision: str | None = None
    """hub_id: commit, tag or branch."""
    streaming: bool = False
    """hub_id: read over the network and keep the chosen samples only; else download and cache all of it."""
    image_folder: Path | None = None
    """What image paths are relative to; null: "images" beside the file."""
    follow_links: bool = False
    """Let symbolic links in the image folder lead out of it (folders of images that you linked together)."""
    turns: Literal["single", "first", "all"] = "single"
    """Conversations of one exchange only; the first exchange of any; or every exchange as a sample of its
    own, with the earlier ones in its prompt."""
    repeated_ids: Literal["number", "refuse"] = "number"
    """Number ids that repeat (they do in LLaVA-665k), or count their samples as unusable."""
    fraction: float = 1.0
    """Random share of the eligible samples; the papers use 0.01 of LLaVA-665k."""
    limit: int | None = None
    """At most this many samples, drawn at random."""
    seed: int = 0
    """Seed of both draws."""
    max_bad_samples: int = 0
    """How many unusable samples (named in the log) are tolerated before the run stops."""
    validation_fraction: float = 0.05
    """Share of the images held out from training, for the metrics in the log and the summary."""

    def __post_init__(self) -> None:
        if (self.path is None) == (self.hub_id is None):
            raise ValueError("give either path (a local file or folder) or hub_id (a hub dataset)")
        if not 0 < self.fraction <= 1:
            raise ValueError(f"fraction must lie in (0, 1], found {self.fraction}")
        if not 0 <= self.validation_fraction < 1:
            raise ValueError(f"validation_fraction must lie in [0, 1), found {self.validation_fraction}")
        if self.limit is not None and self.limit < 1:
            raise ValueError(f"limit must be at least 1, found {self.limit}")

    @property
    def images(self) -> Path:
        """The image folder in force."""
        if self.image_folder is not None:
            return self.image_folder
        return Path("images") if self.path is None else self.path.parent / "images"

    @property
    def name(self) -> str:
        """For messages: the file or the dataset."""
        return str(self.path if self.path is not None else self.hub_id)


def select_samples(data: DataConfig) -> Selection:
    """The samples that the settings choose, all with an image: a text-only prompt has no visual tokens.

    Parameters
    ----------
    data
        Which data, and which part of it.

    Raises
    ------
    DataError
        If nothing can be read there, or more samples are unusable than ``max_bad_samples``.
    """
    if data.hub_id is None:
        conversations = open_conversations(data.path, data.images, split=data.split)
    else:
        conversations = open_hub_conversations(
            data.hub_id,
            data.images,
            subset=data.subset,
            split=data.split,
            revision=data.revision,
            streaming=data.streaming,
        )
    return select(
        conversations,
        turns=data.turns,
        image_only=True,
        fraction=data.fraction,
        limit=data.limit,
        seed=data.seed,
        max_bad_samples=data.max_bad_samples,
        repeated_ids=data.repeated_ids,
        follow_links=data.follow_links,
    )
