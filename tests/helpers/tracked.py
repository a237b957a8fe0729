"""Read back what trackers wrote: wandb's offline file and TensorBoard's events."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

_BLOCK, _START = 32768, 7  # the record log of LevelDB, behind a start of its own
_FULL, _LAST = 1, 4


def wandb_run(file: Path) -> tuple[dict[str, Any], dict[int, dict[str, Any]]]:
    """Configuration, and figures by step; parts of histograms and media are figures of their own."""
    from wandb.proto.wandb_internal_pb2 import Record

    config, history = {}, {}
    for content in _records(file.read_bytes()):
        record = Record()
        record.ParseFromString(content)
        kind = record.WhichOneof("record_type")
        if kind == "run":
            config |= {item.key: json.loads(item.value_json) for item in record.run.config.update}
        elif kind == "history":
            items = {
                item.key or "/".join(item.nested_key): json.loads(item.value_json)
                for item in record.history.item
            }
            history.setdefault(record.history.step.num, {}).update(items)
    return config, history


def _records(content: bytes) -> Iterator[bytes]:
    at, parts = _START, b""
    while at + 7 <= len(content):
        if _BLOCK - at % _BLOCK < 7:  # too little of the block is left for a record's head
            at += _BLOCK - at % _BLOCK
            continue
        _, length, kind = struct.unpack("<IHB", content[at : at + 7])
        parts += content[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (_FULL, _LAST):
            yield parts
            parts = b""


def tensorboard_run(folder: Path) -> tuple[dict[int, dict[str, float]], Any]:
    """Scalars by step, and the accumulator for all else."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder), size_guidance={"scalars": 0, "images": 0})
    events.Reload()
    scalars: dict[int, dict[str, float]] = {}
    for tag in events.Tags()["scalars"]:
        for event in events.Scalars(tag):
            assert tag not in scalars.get(event.step, {}), f"{tag} twice at step {event.step}"
            scalars.setdefault(event.step, {})[tag] = event.value
    return scalars, events
