"""Load a backbone and its processor from a local folder or a hub id."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from dyvte.backbones.adapter import check_adapter, load_adapter, resolve_adapter
from dyvte.backbones.built import built_folder, is_recipe
from dyvte.backbones.config import BackboneConfig
from dyvte.backbones.describe import (
    check_path,
    describe,
    describe_config,
    hub_advice,
    model_without_weights,
    read_config,
)
from dyvte.backbones.given_features import FeaturesProcessor, put_stand_in, takes_features
from dyvte.backbones.padding import ImagePadding, set_image_padding
from dyvte.backbones.processor_check import check_processor, complete_processor
from dyvte.backbones.quantize import quantized_arguments
from dyvte.errors import UnsupportedBackboneError

log = logging.getLogger(__name__)
BeforeWeights = Callable[[nn.Module, Any], None]
"""Looks at a model on the meta device, and at its processor; raises where something does not fit them."""


def load_backbone(
    path: str | os.PathLike[str],
    *,
    dtype: str | torch.dtype = "auto",
    attn_implementation: str = "sdpa",
    device: str | torch.device | None = None,
    trust_remote_code: bool = False,
    adapter: str | os.PathLike[str] | None = None,
    quantization: str = "none",
    image_padding: ImagePadding = "auto",
    image_features: str | None = None,
    before_weights: BeforeWeights | None = None,
) -> tuple[Any, Any]:
    """A frozen model in eval mode, and its processor.

    Parameters
    ----------
    path
        Folder written by ``save_pretrained`` of model and processor, or a hub id; or the folder of a PEFT
        adapter, which names its backbone; or a recipe (``checkpoints/smol-llava``), built when it is missing.
    dtype
        "auto": as stored, and float32 on a CPU, where half precision is several times slower and rounds
        differently from one batch shape to the next.
    attn_implementation
        "sdpa", "eager" or "flash_attention_2" (needs the flash-attn package and a GPU).
    device
        None: where transformers puts it (CPU).
    trust_remote_code
        Run code that comes with the checkpoint; only for sources you trust.
    adapter
        A PEFT adapter to put on the model: folder or hub id. The model then comes as a ``PeftModel``; the
        adapter is not merged, its weights stay in float32.
    quantization
        "none", "int8" or "nf4": linear layers in 8 or 4 bits, all else in ``dtype`` (bitsandbytes, a GPU).
    image_padding
        What the processor does to images that are not square; see `set_image_padding`.
    image_features
        ``module:function``, for a folder without a vision tower; see `given_features`.
    before_weights
        Is given the model without weights, on the meta device, and the processor, before weights are read:
        what it raises is found early. Not called for a model that cannot be built without its weights.

    Raises
    ------
    ConfigError
        If the processor cannot pad images to a square but was asked to, or does not make as many placeholders
        of an image as the model makes features (found before weights are read where its config is enough).
    UnsupportedBackboneError
        If nothing loadable is there, flash-attn, PEFT, torchvision or bitsandbytes is needed but missing, the
        adapter does not fit, or exits cannot work on the model.
    """
    from transformers import AutoModelForImageTextToText

    path, adapter = resolve_adapter(path, adapter)
    check_path(path)
    _check_attention(attn_implementation)
    dtype = _dtype(dtype, device)
    packed = quantized_arguments(quantization, dtype, device)
    config = read_config(path, trust_remote_code=trust_remote_code)
    describe_config(config)
    if adapter is not None:
        check_adapter(adapter)
    processor = _read_processor(path, trust_remote_code, image_features)
    checked = complete_processor(processor, config, path)
    set_image_padding(processor, image_padding, config.model_type)
    if before_weights is not None and (shell := _shell(path, config, trust_remote_code)) is not None:
        before_weights(shell, processor)
    try:
        model = AutoModelForImageTextToText.from_pretrained(
            path,
            dtype=dtype,
            attn_implementation=attn_implementation,
            trust_remote_code=trust_remote_code,
            **packed,
        )
    except (OSError, ValueError, KeyError) as error:
        raise UnsupportedBackboneError(
            f"cannot load an image-text-to-text model from {path}: {error}{hub_advice(path)}"
        ) from error
    if takes_features(path):
        put_stand_in(model, path)
    describe(model)
    if adapter is not None:
        model = load_adapter(model, adapter)
    model.requires_grad_(False).eval()
    model = model if device is None or packed else model.to(device)
    if not checked:
        check_processor(processor, model, path)
    return model, processor


def open_backbone(
    config: BackboneConfig,
    device: torch.device | None = None,
    *,
    before_weights: BeforeWeights | None = None,
) -> tuple[Any, Any]:
    """The configured model, frozen and in eval mode, and its processor: `load_backbone` of its settings.

    Parameters
    ----------
    config
        Which model, and how it is loaded.
    device
        Where it goes, unless the configuration names a device. None: where transformers puts it (CPU).
    before_weights
        As for `load_backbone`.
    """
    return load_backbone(
        config.path,
        dtype=config.dtype,
        attn_implementation=config.attn_implementation,
        device=config.device or device,
        trust_remote_code=config.trust_remote_code,
        adapter=config.adapter,
        quantization=config.quantization,
        image_padding=config.image_padding,
        image_features=config.image_features,
        before_weights=before_weights,
    )


def read_model_config(config: BackboneConfig) -> Any:
    """The transformers config of the configured backbone (for an adapter, of the model that it names).

    Parameters
    ----------
    config
        Only ``path``, ``adapter`` and ``trust_remote_code`` are used.

    Raises
    ------
    UnsupportedBackboneError
        If none is there or it cannot be read, with what to do.
    """
    path, _ = resolve_adapter(config.path, config.adapter)
    return read_config(path, trust_remote_code=config.trust_remote_code)


def load_processor(
    path: str | os.PathLike[str], *, trust_remote_code: bool = False, image_features: str | None = None
) -> Any:
    """The processor beside a model, its image processing by PIL where torchvision is not installed.

    Where the folder holds no vision tower, ``image_features`` takes the image processor's place. Settings
    that the processor lacks are taken from the model's config; see `processor_check`.

    Parameters
    ----------
    path
        Folder or hub id.
    trust_remote_code
        Let code that comes with the model run.
    image_features
        ``module:function``, see `given_features`.

    Raises
    ------
    ConfigError
        If it does not make as many placeholders of an image as the model makes features.
    UnsupportedBackboneError
        If there is none with a tokenizer, or it needs torchvision.
    """
    processor = _read_processor(path, trust_remote_code, image_features)
    complete_processor(processor, read_config(path, trust_remote_code=trust_remote_code), path)
    return processor


def _shell(path: str, config: Any, trust_remote_code: bool) -> nn.Module | None:
    """The model on the meta device; None where it cannot be built so."""
    try:
        shell = model_without_weights(config, trust_remote_code=trust_remote_code)
    except Exception as error:  # whatever a model's class raises: it is built once more, with its weights
        log.debug("no model without weights: %s", error)
        return None
    if takes_features(path):
        put_stand_in(shell, path)
    return shell


def _read_processor(path: str | os.PathLike[str], trust_remote_code: bool, image_features: str | None) -> Any:
    from transformers import AutoProcessor
    from transformers.utils import is_torchvision_available

    if is_recipe(path):
        path = str(built_folder(path))
    if takes_features(path):
        return FeaturesProcessor(path, image_features)
    # Without torchvision transformers falls back to PIL image processing by itself, but warns each time.
    backend = {} if is_torchvision_available() else {"backend": "pil"}
    try:
        processor = AutoProcessor.from_pretrained(path, trust_remote_code=trust_remote_code, **backend)
    except (ImportError, AttributeError) as error:
        if is_torchvision_available():
            raise
        # What transformers says here names one of its own classes.
        raise UnsupportedBackboneError(
            f"the processor of {path} cannot be built without torchvision, which is not installed (families "
            f"that also take videos need it): pip install torchvision ({error})"
        ) from error
    except (OSError, ValueError, KeyError) as error:
        raise UnsupportedBackboneError(
            f"cannot load a processor from {path}: {error}{hub_advice(path)}"
        ) from error
    if getattr(processor, "tokenizer", None) is None:
        raise UnsupportedBackboneError(f"{path} has no processor with a tokenizer: save it beside the model")
    return processor


def _dtype(name: str | torch.dtype, device: str | torch.device | None) -> str | torch.dtype:
    """The precision to load in: "auto" only where it means that of the checkpoint."""
    if isinstance(name, torch.dtype):
        return name
    if name == "auto":
        on_cpu = device is None or torch.device(device).type == "cpu"
        return torch.float32 if on_cpu else name
    found = getattr(torch, name, None)
    if not isinstance(found, torch.dtype):
        raise UnsupportedBackboneError(f"dtype {name!r}: expected auto, float32, bfloat16 or float16")
    return found


def _check_attention(name: str) -> None:
    if name == "flash_attention_2":
        from transformers.utils import is_flash_attn_2_available

        if not is_flash_attn_2_available():
            raise UnsupportedBackboneError(
                "attn_implementation='flash_attention_2' needs the flash-attn package and a GPU: "
                "install the extra 'flash', or use 'sdpa'"
            )
