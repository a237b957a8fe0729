"""The decoder stack and the visual tokens of a transformers multimodal model, or why it cannot be served."""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from dyvte.backbones.adapter import resolve_adapter
from dyvte.backbones.config_fingerprint import config_fingerprint
from dyvte.errors import UnsupportedBackboneError

# Config fields under which transformers families keep the ids of their visual placeholders.
VISUAL_ID_FIELDS = (
    "image_token_id",
    "image_token_index",
    "video_token_id",
    "video_token_index",
)
# Families whose config field does not identify all of their visual tokens.
_NEEDS_EXPLICIT_IDS = {"molmo2"}
_GIVEN_IDS = "load it in Python and pass visual_token_ids to VisualExit; no command serves it"
_CROSS_ATTENTION = {"mllama", "idefics"}
_OTHER_DECODING = {"diffusion_gemma": "it denoises blocks of tokens instead of decoding one after the other"}
# Layer types whose K/V live in a plain per-layer attention cache.
_ATTENTION_LAYERS = {"full_attention", "sliding_attention", "chunked_attention", "attention"}


@dataclass(frozen=True)
class BackboneShape:
    """What a `config.json` alone tells.

    Attributes
    ----------
    num_layers, hidden_size
        L and D of the text decoder.
    model_type
        The family, e.g. "llava".
    visual_token_ids
        Ids of the placeholders that vision features overwrite.
    fingerprint
        Identity of the architecture, see `fingerprint`.
    """

    num_layers: int
    hidden_size: int
    model_type: str
    visual_token_ids: tuple[int, ...]
    fingerprint: str


@dataclass(frozen=True)
class Backbone:
    """A loaded model and the parts of it that exits work on.

    Attributes
    ----------
    model
        The model without wrappers such as PEFT.
    decoder
        The text model; its `layers` run one after the other.
    layers
        The decoder layers.
    path
        Modules from `model` down to `decoder`, both included.
    num_layers, hidden_size, visual_token_ids
        As in `BackboneShape`.
    """

    model: nn.Module
    decoder: nn.Module
    layers: nn.ModuleList
    path: tuple[nn.Module, ...]
    num_layers: int
    hidden_size: int
    visual_token_ids: tuple[int, ...]


def describe_config(
    path_or_config: str | os.PathLike[str] | Any, visual_token_ids: Iterable[int] | None = None
) -> BackboneShape:
    """Shape of a backbone from its `config.json` (or a transformers config); no weights are read.

    The folder of a PEFT adapter has the shape of the backbone that it names.

    Parameters
    ----------
    path_or_config
        Folder, hub id, or config.
    visual_token_ids
        Of the placeholders, where the config does not say.

    Raises
    ------
    UnsupportedBackboneError
        If the path holds no config, or the architecture cannot drop visual tokens part-way.
    """
    config = path_or_config
    if isinstance(path_or_config, (str, os.PathLike)):
        config = read_config(resolve_adapter(path_or_config)[0])
    text = _checked_text_config(config)
    return BackboneShape(
        num_layers=text.num_hidden_layers,
        hidden_size=text.hidden_size,
        model_type=config.model_type,
        visual_token_ids=_visual_token_ids(config, visual_token_ids),
        fingerprint=config_fingerprint(config),
    )


def describe(model: nn.Module, visual_token_ids: Iterable[int] | None = None) -> Backbone:
    """Find the decoder stack of a loaded model; PEFT, DDP and DeepSpeed wrappers are looked through.

    Parameters
    ----------
    model
        Loaded, also inside wrappers.
    visual_token_ids
        Placeholder ids, for a family whose config does not name them.

    Raises
    ------
    UnsupportedBackboneError
        Naming the reason: cross-attention, recurrent layers, shared K/V, no known visual token, no stack.
    """
    model = unwrap(model)
    config = getattr(model, "config", None)
    if config is None or not hasattr(model, "get_decoder"):
        raise UnsupportedBackboneError(
            f"{type(model).__name__} is not a transformers model: it has no decoder"
        )
    text = _checked_text_config(config)
    decoder = _decoder(model)
    path = _path_to(model, decoder)
    layers = decoder.layers
    if len(layers) < text.num_hidden_layers:
        raise UnsupportedBackboneError(
            f"{type(decoder).__name__} has {len(layers)} layers, its config says {text.num_hidden_layers}"
        )
    return Backbone(
        model=model,
        decoder=decoder,
        layers=layers,
        path=path,
        num_layers=text.num_hidden_layers,
        hidden_size=text.hidden_size,
        visual_token_ids=_visual_token_ids(config, visual_token_ids),
    )


def has_deepstack(backbone: Backbone) -> bool:
    """Does the decoder add vision features behind several of its first layers (Qwen3-VL)?

    Parameters
    ----------
    backbone
        As `describe` found it.
    """
    vision = getattr(backbone.model.config, "vision_config", None)
    return hasattr(backbone.decoder, "_deepstack_process") or bool(
        getattr(vision, "deepstack_visual_indexes", None)
    )


def model_without_weights(config: Any, *, trust_remote_code: bool = False) -> nn.Module:
    """The modules of a model on the meta device, from its transformers config: shapes, no storage.

    Parameters
    ----------
    config
        Of the whole model.
    trust_remote_code
        Let code that comes with the model run.
    """
    from transformers import AutoModelForImageTextToText

    with torch.device("meta"):
        return AutoModelForImageTextToText.from_config(config, trust_remote_code=trust_remote_code).eval()


def unwrap(model: nn.Module) -> nn.Module:
    """The transformers model inside PEFT, torch.compile, DistributedDataParallel or a DeepSpeed engine.

    Parameters
    ----------
    model
        Wrapped any number of times, or not at all.
    """
    while True:
        if hasattr(model, "get_base_model"):
            model = model.get_base_model()
            continue
        # A wrapper may answer for the model inside, so ask what it holds, not what it can do.
        children = getattr(model, "_modules", {})
        inner = children.get("_orig_mod") or children.get("module")
        if inner is None:
            return model
        model = inner


def read_config(path: str | os.PathLike[str], *, trust_remote_code: bool = False) -> Any:
    """The transformers config of a model (folder or hub id).

    Parameters
    ----------
    path
        Folder or hub id.
    trust_remote_code
        Let code that comes with the model run.

    Raises
    ------
    UnsupportedBackboneError
        If none is there or it cannot be read, with what to do.
    """
    from transformers import AutoConfig

    check_path(path)
    try:
        return AutoConfig.from_pretrained(path, trust_remote_code=trust_remote_code)
    except (OSError, ValueError) as error:
        raise UnsupportedBackboneError(
            f"cannot read a model config at {path}: {error}{hub_advice(path)}"
        ) from error


def check_path(path: str | os.PathLike[str]) -> None:
    """Raise UnsupportedBackboneError for a path that is neither a model's folder nor a hub id."""
    folder = Path(path)
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise UnsupportedBackboneError(
                f"{path} has no config.json: give the folder of a transformers model"
            )
        return
    # A hub id is "name" or "owner/name"; anything else was meant as a folder.
    if folder.is_file() or str(path).count("/") > 1 or str(path).startswith((".", "/", "~")):
        raise UnsupportedBackboneError(f"no model folder at {path}: check the path")


def hub_advice(path: str | os.PathLike[str]) -> str:
    """What to do where a hub id is not at hand; empty for a folder."""
    if Path(path).exists():
        return ""
    return (
        f". {path} is no folder, so it was taken for a hub id, which is not cached here: where the hub is "
        f"reached, `hf download {path} --local-dir FOLDER`, then give FOLDER as the model"
    )


def _checked_text_config(config: Any) -> Any:
    kind = getattr(config, "model_type", "") or type(config).__name__
    text = config.get_text_config(decoder=True)

    def refuse(reason: str) -> UnsupportedBackboneError:
        return UnsupportedBackboneError(f"visual tokens cannot leave {kind} part-way: {reason}")

    if getattr(config, "is_encoder_decoder", False) or getattr(text, "is_encoder_decoder", False):
        raise refuse("it is an encoder-decoder, its text never carries visual tokens")
    if kind in _CROSS_ATTENTION or getattr(text, "cross_attention_layers", None):
        raise refuse("it reads the image by cross-attention, there are no visual tokens in its sequence")
    if kind in _OTHER_DECODING:
        raise refuse(_OTHER_DECODING[kind])
    if getattr(text, "num_kv_shared_layers", 0) or "reuse" in (getattr(text, "kv_sharing_modes", None) or ()):
        raise refuse("some of its layers share the K/V of others (shared KV)")
    foreign = sorted(set(getattr(text, "layer_types", None) or ()) - _ATTENTION_LAYERS)
    if foreign:
        raise refuse(f"it has recurrent or other stateful layers {foreign}")
    if not getattr(text, "num_hidden_layers", None) or not getattr(text, "hidden_size", None):
        raise refuse("its text config names no num_hidden_layers and hidden_size")
    return text


def _visual_token_ids(config: Any, given: Iterable[int] | None) -> tuple[int, ...]:
    if given is not None:
        ids = tuple(dict.fromkeys(int(i) for i in given))
    elif config.model_type in _NEEDS_EXPLICIT_IDS:
        raise UnsupportedBackboneError(
            f"the config of {config.model_type} does not name all of its visual tokens: {_GIVEN_IDS}"
        )
    else:
        found = [getattr(config, name, None) for name in VISUAL_ID_FIELDS]
        ids = tuple(dict.fromkeys(int(i) for i in found if isinstance(i, int) and i >= 0))
    if not ids:
        raise UnsupportedBackboneError(
            f"no visual token is named in the config of {config.model_type} "
            f"(looked for {', '.join(VISUAL_ID_FIELDS)}); "
            f"if its vision features overwrite placeholder tokens, {_GIVEN_IDS}"
        )
    return ids


def _decoder(model: nn.Module) -> nn.Module:
    decoder, seen = model.get_decoder(), set()
    while not isinstance(getattr(decoder, "layers", None), nn.ModuleList):
        seen.add(id(decoder))
        inner = decoder.get_decoder() if hasattr(decoder, "get_decoder") else None
        if inner is None or id(inner) in seen:
            inner = getattr(decoder, "model", None)
        if not isinstance(inner, nn.Module) or id(inner) in seen:
            raise UnsupportedBackboneError(f"no stack of decoder layers found below {type(model).__name__}")
        decoder = inner
    return decoder


def _path_to(model: nn.Module, target: nn.Module) -> tuple[nn.Module, ...]:
    name = next(name for name, module in model.named_modules() if module is target)
    modules = [model]
    for part in name.split(".") if name else ():
        modules.append(getattr(modules[-1], part))
    return tuple(modules)
