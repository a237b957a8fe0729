"""LLaVA conversation files for the tests of data."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def entry(sample_id: Any = "a", image: Any = "x/1.png", *values: str) -> dict[str, Any]:
    values = values or ("<image>\nWhat is it?", "A cat.")
    turns = [{"from": "human" if i % 2 == 0 else "gpt", "value": value} for i, value in enumerate(values)]
    made = {"id": sample_id, "conversations": turns}
    return made if image is None else {**made, "image": image}


def write(folder: Path, entries: Any, images: tuple[str, ...] = ("x/1.png",)) -> Path:
    for name in images:
        (folder / "images" / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / "images" / name).write_bytes(b"not opened here")
    path = folder / "data.json"
    path.write_text(entries if isinstance(entries, str) else json.dumps(entries), encoding="utf-8")
    return path
