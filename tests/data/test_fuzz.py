"""Damaged instruction data, pictures, settings and gates: a value, or a DyvteError that names the file."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest
import yaml
from PIL import Image

from dyvte.config import load_config
from dyvte.data import Conversations, load_image, open_conversations, select
from dyvte.errors import DataError, DyvteError
from dyvte.gates import GateConfig, GateStack, load_checkpoint
from dyvte.tracing.zero import read_deepspeed
from dyvte.training import TrainConfig
from tests.helpers.mutations import json_bytes, mutated, mutated_json, seeded

datasets = pytest.importorskip("datasets")
COLOR = Image.effect_noise((24, 18), 60).convert("RGB")
# Eighteen kinds of picture: format, mode, options.
KINDS: list[tuple[str, str, dict[str, Any]]] = [
    *(("PNG", mode, {}) for mode in ("RGB", "RGBA", "P", "L", "1", "I;16")),
    *(("JPEG", mode, {}) for mode in ("RGB", "L", "CMYK")),
    *(("TIFF", mode, {}) for mode in ("RGB", "F")),
    ("TIFF", "RGB", {"compression": "tiff_lzw"}),
    *((kind, "RGB", {}) for kind in ("WEBP", "BMP", "PPM", "TGA", "JPEG2000")),
    ("GIF", "P", {}),
]


def outcome(read: Callable[[], Any], path: Path, told: str) -> bool:
    """Whether reading gives a value; a DyvteError names the file, anything else fails the test."""
    try:
        read()
        return True
    except DyvteError as error:
        message = str(error)
    except Exception as error:
        raise AssertionError(f"{told}: {error!r}") from error
    assert path.name in message, f"{told}: the error names no file: {message}"
    assert message.encode()
    return False


def record(number: int) -> dict[str, Any]:
    turns = [("human", f"<image>\nWhat {number}?"), ("gpt", "A"), ("human", "Why?"), ("gpt", "B")]
    said = [{"from": who, "value": text} for who, text in turns]
    if number % 2:
        parts = [{"type": "image"}, {"type": "text", "text": "What?"}]
        said = [{"role": "user", "content": parts}, {"role": "assistant", "content": "A"}]
        return {"id": number, "images": ["0.png"], "messages": said}
    return {"id": f"s{number}", "image": "0.png", "conversations": said}


def _selected(path: Path, chosen: Callable[[Conversations], Any]) -> Any:
    return chosen(open_conversations(path))


@pytest.mark.parametrize("form", ["json", "jsonl", "lines under json"])
def test_instruction_data(form: str, tmp_path: Path) -> None:
    draw, read = seeded(20260404), 0
    (tmp_path / "images").mkdir()
    COLOR.save(tmp_path / "images" / "0.png")
    rows = [record(number) for number in range(6)]
    path = tmp_path / ("data.jsonl" if form == "jsonl" else "data.json")
    for number in range(250):
        damaged = mutated_json(rows, draw) if draw.random() < 0.6 else rows
        data = json_bytes(damaged, lines=form != "json")
        path.write_bytes(data if damaged is not rows else mutated(data, draw))
        turns, most = draw.choice(("single", "first", "all")), draw.choice((0, 3, 99))
        told = f"{form}, file {number}"
        chosen = partial(select, turns=turns, max_bad_samples=most)
        read += outcome(partial(_selected, path, chosen), path, told)
    assert 25 < read < 225


def test_parquet(tmp_path: Path) -> None:
    draw, read = seeded(20260405), 0
    (tmp_path / "images").mkdir()
    COLOR.save(tmp_path / "images" / "0.png")
    path = tmp_path / "data.parquet"
    datasets.Dataset.from_list([record(number) for number in range(0, 6, 2)]).to_parquet(path)
    whole = path.read_bytes()
    for number in range(40):
        path.write_bytes(mutated(whole, draw))
        chosen = partial(select, turns="all")
        read += outcome(partial(_selected, path, chosen), path, f"file {number}")
    assert read < 40


def test_images(tmp_path: Path) -> None:
    draw, read = seeded(20260406), 0
    whole = []
    for kind, mode, options in KINDS:
        stream = BytesIO()
        grey = COLOR.convert("L")
        image = grey.convert("I").point(lambda v: v * 257).convert("I;16") if mode == "I;16" else COLOR
        image = grey.convert("F").point(lambda v: v / 255) if mode == "F" else image
        (image if mode in ("I;16", "F") else image.convert(mode)).save(stream, kind, **options)
        whole.append((f"{kind.lower()}-{mode.replace(';', '')}.bin", stream.getvalue()))
    assert len(whole) == 18
    for name, data in whole:
        (tmp_path / name).write_bytes(data)
        assert load_image(tmp_path / name).mode == "RGB", name
    for number in range(720):
        name, data = whole[number % len(whole)]
        path = tmp_path / name
        path.write_bytes(mutated(data, draw))
        read += outcome(partial(load_image, path), path, f"{name}, file {number}")
    assert 72 < read < 648


ENGINE = {
    "bf16": {"enabled": "auto"},
    "train_batch_size": "auto",
    "zero_optimization": {"stage": 2, "overlap_comm": True, "reduce_bucket_size": "auto"},
    "gradient_clipping": 1.0,
}


def test_deepspeed_files(tmp_path: Path) -> None:
    draw, read, path = seeded(20260407), 0, tmp_path / "zero.json"
    for number in range(150):
        by_value = draw.random() < 0.6
        text = json_bytes(mutated_json(ENGINE, draw)) if by_value else mutated(json_bytes(ENGINE), draw)
        path.write_bytes(text)
        read += outcome(partial(read_deepspeed, path), path, f"file {number}")
    assert 15 < read < 150


def test_settings_files(tmp_path: Path) -> None:
    draw, read, path = seeded(20260408), 0, tmp_path / "run.yaml"
    settings = yaml.safe_load((Path(__file__).parents[2] / "configs" / "embedded.yaml").read_text())
    words = [f"output_dir={tmp_path / 'out'}"]
    for number in range(150):
        text = yaml.safe_dump(mutated_json(settings, draw) if draw.random() < 0.6 else settings).encode()
        path.write_bytes(text if draw.random() < 0.6 else mutated(text, draw))
        read += outcome(partial(load_config, TrainConfig, path, words), path, f"file {number}")
    assert 15 < read < 150


@pytest.mark.parametrize("name", ["gate_config.json", "gates.safetensors"])
def test_gates(name: str, tmp_path: Path) -> None:
    draw, read, folder = seeded(20260409), 0, tmp_path / "gates"
    GateStack.init(GateConfig(num_layers=2, hidden_size=8), seed=0).save_pretrained(folder)
    path, whole = folder / name, (folder / name).read_bytes()
    for number in range(75):
        damaged = mutated(whole, draw)
        if name.endswith("json") and draw.random() < 0.6:
            damaged = json_bytes(mutated_json(json.loads(whole), draw))
        path.write_bytes(damaged)
        read += outcome(partial(load_checkpoint, folder), folder, f"file {number}")
    assert read < 75


def test_a_shortage_of_the_machine_is_no_damage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def short(*_: Any, **__: Any) -> None:
        raise MemoryError

    COLOR.save(tmp_path / "0.png")
    monkeypatch.setattr(Image, "open", short)
    with pytest.raises(MemoryError):
        load_image(tmp_path / "0.png")
    monkeypatch.undo()
    with pytest.raises(DataError, match="missing image"):
        load_image(tmp_path / "1.png")
