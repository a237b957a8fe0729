"""PEFT adapters on a backbone: found, loaded, and told apart from the backbone without them."""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from dyvte.backbones.built import built_folder, is_recipe
from dyvte.errors import UnsupportedBackboneError

ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"
LORA_RECORD = "dyvte_lora.json"
"""How ``dyvte train --lora`` made the adapter beside it."""


def resolve_adapter(
    path: str | os.PathLike[str], adapter: str | os.PathLike[str] | None = None
) -> tuple[str, str | None]:
    """Where the backbone is and where its adapter, if there is one.

    Parameters
    ----------
    path
        A model (folder or hub id), or the folder of a PEFT adapter: then the backbone is the one that its
        ``adapter_config.json`` names; or a recipe (``checkpoints/smol-llava``), which is built when it is
        missing.
    adapter
        A PEFT adapter (folder or hub id) to put on the model at ``path``.

    Raises
    ------
    UnsupportedBackboneError
        If an adapter names no backbone, or one that is not there; if two adapters are given; if a folder is
        both a model and an adapter and it is not said which is meant.
    """
    folder = Path(path)
    if not (folder / ADAPTER_CONFIG).is_file():
        return _whole(path), None if adapter is None else str(adapter)
    is_model = (folder / "config.json").is_file()
    if is_model and adapter is None:
        raise UnsupportedBackboneError(
            f"{path} holds a model and an adapter: name the adapter to use as model.adapter (this folder or "
            "another), or remove its adapter_config.json"
        )
    if is_model:
        return str(path), str(adapter)
    if adapter is not None:
        raise UnsupportedBackboneError(
            f"{path} is a PEFT adapter, and model.adapter is {adapter}: one adapter at a time; give the "
            "backbone as model.path"
        )
    base = _read_config(folder).get("base_model_name_or_path")
    if not base:
        raise UnsupportedBackboneError(
            f"{folder / ADAPTER_CONFIG} names no base_model_name_or_path: give the backbone as model.path "
            "and this folder as model.adapter"
        )
    if not Path(base).is_dir() and str(base).startswith(("/", ".", "~")):
        raise UnsupportedBackboneError(
            f"{path} is a PEFT adapter of the backbone {base}, which is not there: give the backbone as "
            "model.path and this folder as model.adapter"
        )
    return _whole(base), str(path)


def _whole(path: str | os.PathLike[str]) -> str:
    """The path of a model; a recipe is built first."""
    return str(built_folder(path) if is_recipe(path) else path)


def check_adapter(adapter: str | os.PathLike[str]) -> None:
    """Raise UnsupportedBackboneError where PEFT is not installed, or an adapter's files are not there."""
    folder = Path(adapter)
    if folder.is_dir():
        for name in (ADAPTER_CONFIG, ADAPTER_WEIGHTS):
            if not (folder / name).is_file():
                raise UnsupportedBackboneError(f"{adapter} has no {name}: give the folder of a PEFT adapter")
    elif str(adapter).count("/") > 1 or str(adapter).startswith((".", "/", "~")):
        raise UnsupportedBackboneError(f"no adapter folder at {adapter}: check the path")
    import_peft()


def load_adapter(model: nn.Module, adapter: str | os.PathLike[str]) -> Any:
    """``model`` inside a ``PeftModel`` that holds the adapter, not merged, for inference.

    Raises
    ------
    UnsupportedBackboneError
        If PEFT is not installed, or the adapter is not whole, adds tokens of its own, or belongs to a model
        of another shape.
    """
    check_adapter(adapter)
    peft = import_peft()
    with wrapping_quietly(), warnings.catch_warnings():
        # PEFT leaves what it does not find at its initial value and only warns.
        warnings.filterwarnings("error", message="Found missing adapter keys", category=UserWarning)
        try:
            loaded = peft.PeftModel.from_pretrained(model, str(adapter))
        except (OSError, ValueError, KeyError, TypeError, RuntimeError, UserWarning) as error:
            raise UnsupportedBackboneError(
                f"the adapter at {adapter} does not fit the backbone: {error}"
            ) from error
        _check_all_used(loaded, adapter)
    if any(getattr(one, "is_prompt_learning", False) for one in loaded.peft_config.values()):
        raise UnsupportedBackboneError(
            f"the adapter at {adapter} puts tokens of its own before the prompt, so positions in the prompt "
            "no longer say where the visual tokens are: use LoRA or another adapter of the weights"
        )
    return loaded


def _check_all_used(loaded: Any, adapter: str | os.PathLike[str]) -> None:
    """Refuse an adapter of which a part has no place: PEFT passes over it without a word."""
    from peft import get_peft_model_state_dict
    from peft.utils import load_peft_weights

    stored = load_peft_weights(str(adapter), device="cpu").keys()
    placed = get_peft_model_state_dict(loaded, save_embedding_layers=False).keys()
    # whole modules that were saved with it, such as embeddings, go by the model's own names
    if unused := sorted(stored - placed - loaded.state_dict().keys()):
        shown = ", ".join(unused[:3]) + (f" and {len(unused) - 3} more" if len(unused) > 3 else "")
        raise UnsupportedBackboneError(
            f"the adapter at {adapter} does not fit the backbone: it holds weights for modules that are not "
            f"there ({shown}). Give the backbone that it was trained on"
        )


@contextmanager
def wrapping_quietly() -> Iterator[None]:
    """Without the warning that PEFT sets off in transformers by asking every model for an old name."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", r".is_gradient_checkpointing. is deprecated", FutureWarning)
        yield


def import_peft() -> Any:
    """PEFT, or an error that says how to get it."""
    try:
        import peft
    except ImportError as error:
        raise UnsupportedBackboneError(
            f"adapters need the package peft, which cannot be imported ({error}): pip install 'dyvte[train]'"
        ) from error
    return peft


def adapter_parameters(model: nn.Module, *, active: bool = False) -> Iterator[tuple[str, Tensor, float]]:
    """Name, tensor and scaling of everything that adapters add to a model; active ones only if asked.

    An adapter switched off (``disable_adapter()``) is not active. PEFT's layers are known by the attributes
    that all of them have, so that PEFT itself is not needed to find none.
    """
    for module_name, module in model.named_modules():
        names = getattr(module, "adapter_layer_names", None)
        if not isinstance(names, (tuple, list)) or not hasattr(module, "active_adapters"):
            continue
        wanted = set(module.active_adapters)
        if active and module.disable_adapters:
            continue
        scaling = getattr(module, "scaling", {})
        for name in names:
            for adapter, part in _items(getattr(module, name, None)):
                if active and adapter not in wanted:
                    continue
                value = scaling.get(adapter, 1.0) if isinstance(scaling, dict) else 1.0
                found = part.named_parameters() if isinstance(part, nn.Module) else [("", part)]
                for parameter_name, tensor in found:
                    yield f"{module_name}.{name}.{parameter_name}", tensor, float(value)


def _items(parts: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(parts, (nn.ModuleDict, nn.ParameterDict)):
        yield from parts.items()


def _read_config(folder: Path) -> dict[str, Any]:
    try:
        values = json.loads((folder / ADAPTER_CONFIG).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UnsupportedBackboneError(f"{folder / ADAPTER_CONFIG} cannot be read: {error}") from error
    if not isinstance(values, dict):
        raise UnsupportedBackboneError(f"{folder / ADAPTER_CONFIG}: expected a JSON object")
    return values
