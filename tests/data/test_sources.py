"""Files and datasets of conversations: the same samples and the same selection from every one of them."""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Callable
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from dyvte.data import load_image, open_conversations, open_hub_conversations, select, sources
from dyvte.errors import ConfigError, DataError

datasets = pytest.importorskip("datasets")
NUM_SAMPLES = 40


def picture(number: int) -> bytes:
    stream = BytesIO()
    Image.new("RGB", (8, 4), (number, 2 * number, 0)).save(stream, "PNG")
    return stream.getvalue()


def records(image: Callable[[int], Any]) -> list[dict[str, Any]]:
    """Single-turn, multi-turn (every 5th) and text-only (every 8th) conversations; two share an image."""
    made = []
    for i in range(NUM_SAMPLES):
        turns = [{"from": "human", "value": f"<image>\nQ{i}"}, {"from": "gpt", "value": f"A{i} \u2028 é"}]
        if i % 5 == 4:
            turns += [{"from": "human", "value": "And?"}, {"from": "gpt", "value": "So."}]
        if i % 8 == 7:
            turns[0]["value"] = f"Q{i}"
        made.append({"id": f"s{i}", "image": None if i % 8 == 7 else image(i // 2), "conversations": turns})
    return made


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "images").mkdir()
    for i in range(NUM_SAMPLES // 2):
        (tmp_path / "images" / f"{i}.png").write_bytes(picture(i))
    return tmp_path


def path_records() -> list[dict[str, Any]]:
    return records(lambda i: f"{i}.png")


def as_json(folder: Path) -> Path:
    (folder / "data.json").write_text(json.dumps(path_records(), indent=1))
    return folder / "data.json"


def as_lines(folder: Path) -> Path:
    lines = "\n".join(json.dumps(record, ensure_ascii=False) for record in path_records())
    (folder / "data.jsonl").write_text(lines + "\n\n", encoding="utf-8")
    return folder / "data.jsonl"


def as_parquet(folder: Path) -> Path:
    datasets.Dataset.from_list(path_records()).to_parquet(folder / "data.parquet")
    return folder / "data.parquet"


def as_saved(folder: Path) -> Path:
    data = datasets.Dataset.from_list(path_records())
    datasets.DatasetDict({"train": data, "other": data.select([0])}).save_to_disk(folder / "saved")
    return folder / "saved"


def as_shards(folder: Path) -> Path:
    (folder / "shards").mkdir()
    rows = path_records()
    for part in range(2):
        chunk = datasets.Dataset.from_list(rows[20 * part : 20 * part + 20])
        chunk.to_parquet(folder / "shards" / f"train-{part:05d}-of-00002.parquet")
    return folder / "shards"


@pytest.mark.parametrize("store", [as_json, as_lines, as_parquet, as_saved, as_shards])
def test_every_format_gives_the_same_selection(folder: Path, store: Callable[[Path], Path]) -> None:
    expected = select(open_conversations(as_json(folder)), turns="all", fraction=0.3, seed=5)
    assert expected.counts["eligible"] == 42  # 35 with an image, 7 of those with a second exchange
    path = store(folder)
    found = select(open_conversations(path, folder / "images"), turns="all", fraction=0.3, seed=5)
    assert found.samples == expected.samples
    assert found.sha256 == expected.sha256
    assert found.counts == expected.counts
    assert found.samples[0].answer.endswith(" \u2028 é")


def bytes_in_struct(i: int) -> Any:
    return {"bytes": picture(i), "path": "image.png"}


def raw_bytes(i: int) -> Any:
    return picture(i)


@pytest.mark.parametrize("feature", [True, False])
@pytest.mark.parametrize("image", [bytes_in_struct, raw_bytes])
def test_embedded_images_are_told_apart_by_content(folder: Path, image: Any, feature: bool) -> None:
    data = datasets.Dataset.from_list(records(image))
    if feature and image is bytes_in_struct:
        data = data.cast_column("image", datasets.Image())
    data.to_parquet(folder / "data.parquet")
    found = select(open_conversations(folder / "data.parquet", folder / "nowhere"))
    assert found.counts["chosen"] == 28
    for sample in found.samples:
        number = int(sample.id[1:]) // 2
        assert sample.image_id == f"sha256:{hashlib.sha256(picture(number)).hexdigest()}"
        assert load_image(sample.image).getpixel((0, 0)) == (number, 2 * number, 0)
    assert found.counts["images"] == len({int(s.id[1:]) // 2 for s in found.samples})


def test_paths_inside_an_image_column_stay_in_the_folder(folder: Path) -> None:
    rows = records(lambda i: {"bytes": None, "path": f"{i}.png"})
    datasets.Dataset.from_list(rows).to_parquet(folder / "data.parquet")
    found = select(open_conversations(folder / "data.parquet"))
    assert found.samples[0].image == folder / "images" / "0.png"
    rows[3]["image"]["path"] = "/etc/passwd"
    datasets.Dataset.from_list(rows).to_parquet(folder / "bad.parquet")
    with pytest.raises(DataError, match=r"bad\.parquet: sample 's3': image: '/etc/passwd' leaves"):
        select(open_conversations(folder / "bad.parquet"), max_bad_samples=99)


def test_turns_as_an_object_of_lists(folder: Path) -> None:
    rows = path_records()
    for row in rows:
        turns = row["conversations"]
        row["conversations"] = {key: [turn[key] for turn in turns] for key in ("from", "value")}
    (folder / "lists.jsonl").write_text("\n".join(map(json.dumps, rows)))
    found = select(open_conversations(folder / "lists.jsonl"), turns="all")
    assert found.samples == select(open_conversations(as_json(folder)), turns="all").samples


@pytest.mark.parametrize("streaming", [True, False])
def test_hub_datasets(folder: Path, streaming: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """A local folder stands for the hub id: ``load_dataset`` takes both."""
    as_shards(folder)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", folder / "cache")
    found = select(
        open_hub_conversations(str(folder / "shards"), folder / "images", streaming=streaming), limit=7
    )
    assert found.samples == select(open_conversations(as_json(folder)), limit=7).samples
    assert found.source == f"{folder / 'shards'} [train]"
    assert found.source_sha256 is None
    with pytest.raises(DataError, match="cannot be read as a dataset"):
        select(open_hub_conversations(str(folder / "shards"), split="none", streaming=streaming))


def test_the_files_sha256_is_recorded(folder: Path) -> None:
    for path in (as_json(folder), as_lines(folder)):
        found = select(open_conversations(path), fraction=0.5, seed=3)
        assert found.source_sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
        record = found.record()
        assert (record["file"], record["file_sha256"]) == (path.name, found.source_sha256)
        assert (record["sha256"], record["turns"], record["fraction"]) == (found.sha256, "single", 0.5)
        assert (record["selection_seed"], record["chosen"]) == (3, 14)


@pytest.mark.parametrize("chunk", [1, 2, 3, 7, 64, 1 << 20])
def test_lists_are_decoded_across_any_chunk_border(
    tmp_path: Path, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sources, "_CHUNK", chunk)
    rng = random.Random(0)
    values = [
        {"k": ['é\n"]},', 1.5e3, {"n": None}]},
        12345,
        -1.25,
        "]",
        [],
        True,
        rng.random(),
        {"é": "\u2028"},
    ]
    for indent in (None, 2):
        for mark in ("", "\ufeff"):
            path = tmp_path / "data.json"
            path.write_text(mark + json.dumps(values, indent=indent, ensure_ascii=False) + " \n", "utf-8")
            digest = hashlib.sha256()
            assert list(sources._json_values(path, digest)) == values
            assert digest.hexdigest() == hashlib.sha256(path.read_bytes()).hexdigest()


def test_long_files_are_read_piece_by_piece(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "_CHUNK", 1000)
    path = tmp_path / "data.json"
    path.write_text(json.dumps([{"text": "x" * 90}] * 1000))
    with path.open("rb") as stream:
        text = sources._Text(path, stream, hashlib.sha256())
        assert text.next_character() == "["
        text.position += 1
        for _ in range(900):
            text.next_character()
            text.value()
            assert len(text._window) <= 3000
            text.next_character()
            text.position += 1


def test_unreadable_sources(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, content, message in [
        ("a.jsonl", b'{"id": 1}\n{"id"\n', r"a\.jsonl: line 2: not valid JSON"),
        ("a.json", b'["\xff"]', r"a\.json: not UTF-8"),
        ("a.parquet", b"not parquet", r"a\.parquet: cannot be read as a dataset"),
        ("a.csv", b"", r"a\.csv: expected \.json, \.jsonl, \.parquet"),
    ]:
        (tmp_path / name).write_bytes(content)
        with pytest.raises(DataError, match=message):
            list(open_conversations(tmp_path / name).samples())
    with pytest.raises(DataError, match="no such data file"):
        open_conversations(tmp_path / "none.json")
    as_saved(tmp_path)
    with pytest.raises(DataError, match="no split 'test'; there are train, other"):
        list(open_conversations(tmp_path / "saved", split="test").samples())
    monkeypatch.setitem(__import__("sys").modules, "datasets", None)
    with pytest.raises(ConfigError, match="needs the package datasets"):
        list(open_conversations(tmp_path / "saved").samples())
