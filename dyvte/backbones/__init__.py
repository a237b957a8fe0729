"""Backbones: load them, know their decoder stack, their visual tokens and their prompt."""

from .adapter import resolve_adapter
from .attention import watched_attention
from .describe import Backbone, BackboneShape, describe, describe_config, unwrap
from .encode import encode, takes_videos
from .fingerprint import fingerprint, weights_digest
from .grids import visual_places
from .load import load_backbone
from .padding import ImagePadding, check_image_padding, image_padding, set_image_padding
from .prompts import PromptTemplate, RenderedPrompt, get_template

__all__ = [
    "Backbone",
    "BackboneShape",
    "ImagePadding",
    "PromptTemplate",
    "RenderedPrompt",
    "check_image_padding",
    "describe",
    "describe_config",
    "encode",
    "fingerprint",
    "get_template",
    "image_padding",
    "load_backbone",
    "resolve_adapter",
    "set_image_padding",
    "takes_videos",
    "unwrap",
    "visual_places",
    "watched_attention",
    "weights_digest",
]
