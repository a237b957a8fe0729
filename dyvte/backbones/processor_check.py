"""Does a processor make as many placeholders of an image as the model makes features of it?

Processors saved by older versions of transformers lack settings that newer ones need (``patch_size``,
``vision_feature_select_strategy``, ``num_additional_image_tokens``), and transformers tells users to fill
them in from the model's config. It is done here, and the count is checked once, before weights are read: on
shapes alone where the vision side runs on them, else on a vision side of one layer, which makes as many
features; on the loaded model where neither can be.
"""

from __future__ import annotations

import copy
import inspect
import logging
import os
from typing import Any

import torch
from torch import Tensor, nn

from dyvte.backbones.describe import describe, describe_config, model_without_weights, unwrap
from dyvte.backbones.encode import encode
from dyvte.backbones.given_features import takes_features
from dyvte.backbones.prompts import get_template
from dyvte.errors import ConfigError, DyvteError

log = logging.getLogger(__name__)

_PROBE_SIZE = (112, 84)
_ADDED = "num_additional_image_tokens"
# Settings of a processor, and where the model's config says the same.
_SAME = {
    "patch_size": ("vision_config", "patch_size"),
    "vision_feature_select_strategy": ("vision_feature_select_strategy",),
}


def complete_processor(processor: Any, config: Any, path: str | os.PathLike[str]) -> bool:
    """Fill in what a processor lacks, and compare its placeholders with the features of the model's vision
    side, built from its config without weights.

    Parameters
    ----------
    processor
        Its missing settings are set.
    config
        The model's transformers config.
    path
        Where both come from.

    Returns
    -------
    bool
        False if nothing could be compared: the vision side needs its weights to run, or is none of
        transformers'.

    Raises
    ------
    ConfigError
        If the numbers differ, naming the settings that do not fit.
    """
    tokenizer = getattr(processor, "tokenizer", None)
    if tokenizer is not None and tokenizer.pad_token is None and tokenizer.eos_token is not None:
        tokenizer.pad_token = tokenizer.eos_token  # what is padded is masked
    for name, where in _SAME.items():
        value = _value(config, where)
        if hasattr(processor, name) and getattr(processor, name) is None and value is not None:
            setattr(processor, name, value)
            log.warning("%s: the processor has no %s: taken from the model's config, %s", path, name, value)
    probe = None if takes_features(path) else _probe(processor, config)
    features = None if probe is None else _features_without_weights(config, probe)
    if features is None:
        return False
    missing = features - _placeholders(probe, config)
    if missing > 0 and hasattr(processor, _ADDED) and _ADDED not in _saved_settings(processor, path):
        setattr(processor, _ADDED, getattr(processor, _ADDED) + missing)
        log.warning("%s: the processor has no %s: set to %s", path, _ADDED, getattr(processor, _ADDED))
        probe = _probe(processor, config)
    _compare(processor, config, path, _placeholders(probe, config), features)
    return True


def check_processor(processor: Any, model: nn.Module, path: str | os.PathLike[str]) -> None:
    """The comparison of `complete_processor` on a loaded model.

    Parameters
    ----------
    processor
        Of the model.
    model
        Loaded; inside wrappers too.
    path
        Where both come from, for the message.

    Raises
    ------
    ConfigError
        If the numbers differ, or the model cannot take the images that the processor makes.
    """
    model = unwrap(model)
    if any(parameter.numel() == 0 for parameter in model.parameters()):
        return  # weights that lie in shards elsewhere
    probe = None if takes_features(path) else _probe(processor, model.config)
    features = None
    if probe is not None:
        device = next(model.parameters()).device
        features = _features(model, probe, device)
    if features is not None:
        _compare(processor, model.config, path, _placeholders(probe, model.config), features)


def _compare(processor: Any, config: Any, path: Any, placeholders: int, features: int) -> None:
    if placeholders == features:
        return
    differing = {
        name: f"{name} is {getattr(processor, name)!r}, the model's {_value(config, where)!r}"
        for name, where in _SAME.items()
        if hasattr(processor, name) and getattr(processor, name) != _value(config, where)
    }
    if not differing and hasattr(processor, _ADDED):
        added = getattr(processor, _ADDED)
        differing[_ADDED] = f"{_ADDED} is {added}, where {added + features - placeholders} would fit"
    hint = f" ({'; '.join(differing.values())})" if differing else ""
    raise ConfigError(
        f"{path}: the processor makes {placeholders} placeholders of an image, the model {features} features"
        f"{hint}: correct the processor's settings, in processor_config.json beside the model"
    )


def _probe(processor: Any, config: Any) -> dict[str, Tensor] | None:
    """Model inputs of a prompt with one image; None where the processor cannot make any by itself."""
    from PIL import Image

    image = Image.new("RGB", _PROBE_SIZE, (90, 120, 150))
    try:
        template = get_template("auto", processor)
    except ConfigError:
        template = None
    try:
        template = template or get_template("v1", processor)
        inputs, _ = encode(processor, [template.render("probe")], [[image]], padding_side="left")
        describe_config(config)
    except Exception as error:  # said again, with a name, where it is needed
        log.debug("no probe: %s", error)
        return None
    return inputs


def _placeholders(inputs: dict[str, Tensor], config: Any) -> int:
    ids = describe_config(config).visual_token_ids
    return int(torch.isin(inputs["input_ids"], torch.tensor(ids)).sum())


def _features_without_weights(config: Any, probe: dict[str, Tensor]) -> int | None:
    """Number of vision features of the image by the config alone; None where it cannot be told so."""
    from transformers.integrations import is_deepspeed_zero3_enabled

    if is_deepspeed_zero3_enabled():  # a model would be divided among the processes while it is built
        return None
    for build, device, refusal in (
        (model_without_weights, "meta", (ValueError,)),
        (_shallow_vision, "cpu", ()),
    ):
        try:
            model = build(config)
        except Exception as error:
            log.debug("no model without weights: %s", error)
            return None
        features = _features(model, probe, torch.device(device), refusal)
        if features is not None:
            return features
    return None


@torch.no_grad()
def _shallow_vision(config: Any) -> nn.Module:
    """The model on the meta device, but for a vision side of one layer, all zeros, on the CPU."""
    config = copy.deepcopy(config)
    for name in ("num_hidden_layers", "depth"):
        if isinstance(getattr(config.vision_config, name, None), int):
            setattr(config.vision_config, name, 1)
    model = model_without_weights(config)
    first_layer = describe(model).layers[0]
    for part in getattr(model, model.base_model_prefix, model).children():
        if not any(module is first_layer for module in part.modules()):
            part.to_empty(device="cpu")
            for tensor in (*part.parameters(), *part.buffers()):
                tensor.zero_()  # positions among them, which must be some
    return model


@torch.no_grad()
def _features(
    model: nn.Module,
    inputs: dict[str, Tensor],
    device: torch.device,
    refusal: tuple[type[Exception], ...] = (Exception,),
) -> int | None:
    """Number of vision features of the image; None where they cannot be computed.

    Parameters
    ----------
    model
        What computes them.
    inputs
        Of a prompt with the image.
    device
        Of the vision side.
    refusal
        Errors that are the image's fault; others are that of a model which is not as it will be loaded.

    Raises
    ------
    ConfigError
        If the vision side refuses the image.
    """
    compute = getattr(model, "get_image_features", None)
    if compute is None:
        return None
    if "pixel_values_images" in inputs:  # Video-LLaVA's processor still uses its model's former name
        inputs = {**inputs, "pixel_values": inputs["pixel_values_images"]}
    names = [name for name in inspect.signature(compute).parameters if name in inputs]
    if "pixel_values" not in names:
        return None
    images = {name: inputs[name] for name in names if inputs[name].is_floating_point()}
    taken = {name: value.to(device, next(model.parameters()).dtype) for name, value in images.items()}
    # What is no image tells how it is laid out, and is read.
    layout_device = "cpu" if device.type == "meta" else device
    taken |= {name: inputs[name].to(layout_device) for name in names if name not in images}
    try:
        found = compute(**taken)
    except DyvteError:
        raise
    except refusal as error:
        raise ConfigError(f"the model cannot take the images that its processor makes: {error}") from error
    except Exception as error:
        log.debug("the vision side needs weights: %s", error)
        return None
    found = getattr(found, "pooler_output", found)
    parts = [found] if isinstance(found, Tensor) else list(found)
    return sum(part.numel() // part.shape[-1] for part in parts)


def _saved_settings(processor: Any, path: str | os.PathLike[str]) -> dict[str, Any]:
    """What the processor's own file says."""
    try:
        return type(processor).get_processor_dict(str(path))[0]
    except (AttributeError, OSError, ValueError):
        return {}


def _value(config: Any, where: tuple[str, ...]) -> Any:
    for name in where:
        config = getattr(config, name, None)
    return config
