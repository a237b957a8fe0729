"""Backbones: load them, know their decoder stack, their visual tokens and their prompt."""

from .adapter import resolve_adapter
from .describe import Backbone, BackboneShape, describe, describe_config, unwrap
from .encode import encode
from .fingerprint import fingerprint, weights_digest
from .load import load_backbone
from .prompts import PromptTemplate, RenderedPrompt, get_template

__all__ = [
    "Backbone",
    "BackboneShape",
    "PromptTemplate",
    "RenderedPrompt",
    "describe",
    "describe_config",
    "encode",
    "fingerprint",
    "get_template",
    "load_backbone",
    "resolve_adapter",
    "unwrap",
    "weights_digest",
]
