"""How vLLM comes to know our models, and how an engine is told to use them."""

from __future__ import annotations

import logging
from typing import Any

from dyvte.plugins.vllm.names import ARCHITECTURES, KEY, LOGGER


def register() -> None:
    """Entry point ``vllm.general_plugins``: make our architectures known. It imports no model."""
    try:
        from vllm import ModelRegistry
        from vllm.model_executor.models.config import MODELS_CONFIG_MAP

        from dyvte.plugins.vllm.checks import config_hook
    except ImportError as error:
        # An engine that has nothing to do with us must start all the same.
        logging.getLogger(LOGGER).warning("dyvte's plug-in does not know this vLLM: %s", error)
        return
    for ours, stock in ARCHITECTURES.items():
        ModelRegistry.register_model(ours, f"dyvte.plugins.vllm.families:{ours}")
        MODELS_CONFIG_MAP[ours] = config_hook(MODELS_CONFIG_MAP.get(stock))


def engine_arguments(model: str, policy: str, **options: Any) -> dict[str, Any]:
    """What ``vllm.LLM`` takes beside ``model``: ``LLM(model, **engine_arguments(model, "freeze:8:24"))``.

    Parameters
    ----------
    model
        Folder or hub id.
    policy, options
        As in `dyvte.plugins.vllm.options.EngineConfig`.

    Raises
    ------
    UnsupportedBackboneError
        The plug-in does not serve the model's architecture.
    """
    from dyvte.backbones.describe import read_config
    from dyvte.plugins.vllm.options import our_architecture

    ours = our_architecture(read_config(model))
    return {
        "hf_overrides": {"architectures": [ours]},
        "additional_config": {KEY: {"policy": policy, **options}},
    }
