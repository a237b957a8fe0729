"""Names that the plug-in and vLLM know each other by."""

from __future__ import annotations

KEY = "dyvte"
"""Of the plug-in's settings in vLLM's ``additional_config``."""

VERSIONS = ">=0.32,<0.33"
"""Of vLLM: those that the plug-in was run with; others are refused when an engine starts."""

ARCHITECTURES = {
    "DyvteLlavaForConditionalGeneration": "LlavaForConditionalGeneration",
    "DyvteLlavaNextForConditionalGeneration": "LlavaNextForConditionalGeneration",
    "DyvteQwen2VLForConditionalGeneration": "Qwen2VLForConditionalGeneration",
    "DyvteQwen2_5_VLForConditionalGeneration": "Qwen2_5_VLForConditionalGeneration",
    "DyvteQwen3VLForConditionalGeneration": "Qwen3VLForConditionalGeneration",
    "DyvteInternVLForConditionalGeneration": "InternVLForConditionalGeneration",
}
"""Ours, by the stock architecture that each one extends."""

LOGGER = "vllm.plugins.dyvte"
"""Below vLLM's own logger, so that its settings hold."""
