"""Backbones whose vision side has no class in transformers (VILA-1.5, Eagle-X5): it is a function of yours.

The language side is a folder that `save_for_features` wrote from a converted state dict. What the original
towers (and, for VILA, the projector) make of images is computed by a Python function that you name, as
``module:function``: a list of PIL images in, features (I, T, W) out. Everything else, training included, is
then as for any other backbone.

Shapes: I images, T visual tokens of an image, W width of a feature.
"""

from __future__ import annotations

import importlib
import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dyvte.backbones.convert.features import GivenFeatures
from dyvte.errors import UnsupportedBackboneError

SETTINGS_FILE = "given_features.json"
Features = Callable[[list[Any]], Tensor]


def save_for_features(
    model: nn.Module, tokenizer: Any, folder: str | os.PathLike[str], *, num_tokens: int
) -> None:
    """Write a model of `llava_for_features` and its tokenizer, to be loaded by `load_backbone`.

    Parameters
    ----------
    num_tokens
        T: placeholders that one image becomes.
    """
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    projects = not isinstance(model.model.multi_modal_projector, nn.Identity)
    image_token = tokenizer.convert_ids_to_tokens(model.config.image_token_id)
    settings = {"num_tokens": num_tokens, "image_token": image_token, "projects": projects}
    (Path(folder) / SETTINGS_FILE).write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")


def takes_features(path: str | os.PathLike[str]) -> bool:
    """Was this folder written by `save_for_features`?"""
    return (Path(path) / SETTINGS_FILE).is_file()


def put_stand_in(model: nn.Module, path: str | os.PathLike[str]) -> None:
    """Replace the empty vision tower (and the projector, where the features come from behind it).

    Parameters
    ----------
    model
        Changed in place.
    path
        Its folder, whose settings say what the features are.
    """
    model.model.vision_tower = GivenFeatures()
    if not _settings(path)["projects"]:
        model.model.multi_modal_projector = nn.Identity()


class FeaturesProcessor:
    """Tokenizer and image features of such a backbone, called like a processor of transformers."""

    chat_template = None

    def __init__(self, path: str | os.PathLike[str], name: str | None) -> None:
        from transformers import AutoTokenizer

        settings = _settings(path)
        self.tokenizer = AutoTokenizer.from_pretrained(path)
        self.image_token, self.num_tokens = settings["image_token"], settings["num_tokens"]
        self.image_processor = _Named(str(name))
        self._features = _function(name, path)

    def __call__(
        self, *, text: Sequence[str], images: Sequence[Any] | None = None, **options: Any
    ) -> dict[str, Any]:
        """Token ids with each placeholder repeated T times; ``pixel_values`` are the features."""
        expanded = [one.replace(self.image_token, self.image_token * self.num_tokens) for one in text]
        batch = dict(self.tokenizer(expanded, **options))
        if images:
            features = torch.as_tensor(self._features(list(images)))
            if features.ndim != 3 or features.shape[:2] != (len(images), self.num_tokens):
                raise UnsupportedBackboneError(
                    f"{self.image_processor.name} gave features of shape {tuple(features.shape)}, expected "
                    f"({len(images)}, {self.num_tokens}, width)"
                )
            batch["pixel_values"] = features.detach().float().cpu()
        return batch


class _Named:
    """Tells traces apart by the function that saw the images."""

    def __init__(self, name: str) -> None:
        self.name = name

    def to_dict(self) -> dict[str, str]:
        return {"image_features": self.name}


def _settings(path: str | os.PathLike[str]) -> dict[str, Any]:
    return json.loads((Path(path) / SETTINGS_FILE).read_text(encoding="utf-8"))


def _function(name: str | None, path: str | os.PathLike[str]) -> Features:
    if name is None:
        raise UnsupportedBackboneError(
            f"{path} holds no vision tower: name the function that turns images into its features, as "
            "image_features: module:function"
        )
    module, colon, attribute = name.partition(":")
    try:
        found = getattr(importlib.import_module(module), attribute) if colon else None
    except (ImportError, AttributeError) as error:
        raise UnsupportedBackboneError(f"image_features {name!r} cannot be imported ({error})") from error
    if not callable(found):
        raise UnsupportedBackboneError(f"image_features {name!r}: expected module:function")
    return found
