"""Backbones: load them, know their decoder stack, their visual tokens and their prompt."""

from dyvte.backbones.adapter import resolve_adapter
from dyvte.backbones.attention import watched_attention
from dyvte.backbones.config import BackboneConfig
from dyvte.backbones.describe import (
    Backbone,
    BackboneShape,
    describe,
    describe_config,
    has_deepstack,
    unwrap,
)
from dyvte.backbones.encode import encode, takes_videos
from dyvte.backbones.fingerprint import fingerprint, weights_digest
from dyvte.backbones.greedy import decoding_identity, generate_greedily
from dyvte.backbones.grids import visual_places
from dyvte.backbones.load import load_backbone, open_backbone, read_model_config
from dyvte.backbones.padding import ImagePadding, check_image_padding, image_padding, set_image_padding
from dyvte.backbones.prompts import PromptTemplate, RenderedPrompt, get_template

__all__ = [
    "Backbone",
    "BackboneConfig",
    "BackboneShape",
    "ImagePadding",
    "PromptTemplate",
    "RenderedPrompt",
    "check_image_padding",
    "decoding_identity",
    "describe",
    "describe_config",
    "encode",
    "fingerprint",
    "generate_greedily",
    "get_template",
    "has_deepstack",
    "image_padding",
    "load_backbone",
    "open_backbone",
    "read_model_config",
    "resolve_adapter",
    "set_image_padding",
    "takes_videos",
    "unwrap",
    "visual_places",
    "watched_attention",
    "weights_digest",
]
