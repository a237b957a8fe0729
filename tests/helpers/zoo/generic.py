"""A tiny random model of any image-text-to-text class, made from its default config by shrinking it.

The text decoder becomes four narrow layers. Of everything else only the depth is cut: it is built but not
run. Image placeholders are embedded like ordinary tokens, which is all that a decoder sees of an image.
"""

from __future__ import annotations

import dataclasses
import importlib
import inspect
from collections.abc import Sequence
from typing import Any

import torch
from transformers import PreTrainedConfig

from tests.helpers.zoo.common import BOS, EOS, IMAGE, PAD, START, VIDEO, make, one_none_two

LAYERS = 4
WIDTHS = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 512,
    "initializer_range": 0.15,
    "pad_token_id": PAD,
    "bos_token_id": BOS,
    "eos_token_id": EOS,
    # short enough to matter
    "sliding_window": 8,
    "attention_chunk_size": 8,
    # per-layer embeddings
    "vocab_size_per_layer_input": 64,
    "hidden_size_per_layer_input": 8,
    # mixture of experts
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "moe_num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_k": 2,
    "moe_topk": 2,
    "top_k_experts": 2,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "moe_intermediate_size": 16,
    "expert_intermediate_size": 16,
    "shared_expert_intermediate_size": 16,
    "intermediate_size_mlp": 64,
    "dense_intermediate_size": 64,
    # latent attention
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "qk_head_dim": 16,
    "v_head_dim": 8,
}
# One entry per layer.
PER_LAYER = (
    "layer_types",
    "no_rope_layers",
    "mlp_layer_types",
    "num_key_value_heads_per_layer",
    "swiglu_limits",
    "swiglu_limits_shared",
)
# What a decoder cannot be built without, though its default config omits it.
NEEDED = {
    "deepseek_ocr2_text": {
        "mlp_layer_types": ["dense", "dense", "sparse", "sparse"],
        "num_experts_per_tok": 2,
    },
    "cohere_compass_text": {
        "rope_parameters": {
            kind: {"rope_type": "default", "rope_theta": 10000.0}
            for kind in ("full_attention", "sliding_attention")
        }
    },
    "step3p5": {"sliding_window": 8},
}
NEEDED_AROUND = {
    "granite4_vision": {
        "deepstack_layer_map": [[-1, 0]],
        "downsample_rate": "1/2",
        "spatial_target_layers": [1],
    },
}
DEPTHS = (
    "num_hidden_layers",
    "depth",
    "num_layers",
    "n_layers",
    "encoder_layers",
    "num_encoder_layers",
    "num_global_layers",
    "hidden_layers",
)


def tiny(model_class: Any, config: PreTrainedConfig, attention: str = "eager") -> Any:
    """The model; whatever cannot be built that small raises what transformers raises."""
    text = config.get_text_config(decoder=True)
    for part in sub_configs(config):
        if part is not config and part is not text:
            _cut_depth(part)
    small = tiny_text(text)
    if text is config:
        config = small
    else:
        _replace(config, text, small)
        for name in ("vocab_size", "hidden_size", "pad_token_id"):
            _set(config, name, WIDTHS[name])
    for name, token in (("image_token", IMAGE), ("video_token", VIDEO)):
        _set(config, f"{name}_id", token)
        _set(config, f"{name}_index", token)
    for name, value in NEEDED_AROUND.get(config.model_type, {}).items():
        setattr(config, name, value)
    if not hasattr(config, "vision_start_token_id"):
        # the omni models' position code asks for it, their default config has none
        config.vision_start_token_id = START
    config._attn_implementation = attention
    return make(model_class, config)


def tiny_text(text: PreTrainedConfig) -> PreTrainedConfig:
    """A decoder config of the same class, made anew so that what it derives fits its small sizes."""
    kind, deep = type(text), text.num_hidden_layers
    known = {field.name: field.type for field in dataclasses.fields(kind)}
    given = {}
    for name, value in WIDTHS.items():
        # What a family leaves unset by default may switch on another architecture.
        if name in known and _get(kind, name) is not None:
            given[name] = [value, value] if isinstance(_get(kind, name), (list, tuple)) else value
    if "qk_rope_head_dim" in known:
        # latent attention: every head has its own keys, and their size is a sum
        given.pop("head_dim", None)
        given["num_key_value_heads"] = given["num_attention_heads"]
    elif "head_dim" in known:
        given["head_dim"] = WIDTHS["head_dim"]
    if "global_head_dim" in dir(kind) or "global_head_dim" in inspect.getsource(kind):
        given["global_head_dim"] = WIDTHS["head_dim"]
    for name in PER_LAYER:
        values = _get(text, name)
        if isinstance(values, (list, tuple)) and len(values) == deep > LAYERS and name in known:
            given[name] = _sample(values)
    given |= NEEDED.get(kind.model_type, {})
    rope = _tiny_mrope(text, given)
    return kind(**given, **({"rope_parameters": rope} if rope else {}))


def _sample(values: Sequence[Any]) -> list[Any]:
    """Both ends, so that kinds that alternate and kinds that come last are there, then any kind omitted."""
    picked = [*values[: LAYERS // 2], *values[-LAYERS // 2 :]]
    absent = [kind for kind in dict.fromkeys(values) if kind not in picked]
    for place, kind in zip(range(1, LAYERS), absent, strict=False):
        picked[place] = kind
    return picked


def _tiny_mrope(text: PreTrainedConfig, given: dict[str, Any]) -> dict[str, Any] | None:
    rope = _get(text, "rope_parameters")
    name = type(text).__module__.replace("configuration_", "modeling_")
    if not isinstance(rope, dict) or not {"rope_type", "rope_theta", "mrope_section"} & set(rope):
        return None
    if "mrope_section" not in inspect.getsource(importlib.import_module(name)):
        return None
    size = given.get("head_dim") or given["hidden_size"] // given["num_attention_heads"]
    pairs = int(size * rope.get("partial_rotary_factor", 1)) // 2
    rope = {**rope, "mrope_section": [pairs // 4, pairs // 4, pairs - 2 * (pairs // 4)]}
    if rope.get("rope_type") == "mrope":
        rope["rope_type"] = "default"
    return rope


def _get(config: Any, name: str) -> Any:
    try:
        return getattr(config, name, None)
    except AttributeError:
        return None


def _replace(config: PreTrainedConfig, old: PreTrainedConfig, new: PreTrainedConfig) -> None:
    for part in sub_configs(config):
        for name, value in vars(part).items():
            if value is old:
                setattr(part, name, new)


def inputs() -> dict[str, torch.Tensor]:
    """Rows with one image, none and two, as placeholders only."""
    return one_none_two([IMAGE] * 6)


def sub_configs(config: PreTrainedConfig) -> list[PreTrainedConfig]:
    """The config and all configs inside it."""
    found = [config]
    for value in vars(config).values():
        if isinstance(value, PreTrainedConfig):
            found += sub_configs(value)
    return found


def _cut_depth(part: PreTrainedConfig) -> None:
    for name in DEPTHS:
        if isinstance(getattr(part, name, None), int):
            _set(part, name, 1)
    heads = getattr(part, "num_attention_heads", None)
    if heads and getattr(part, "hidden_size", 0) % heads:
        # one family's own default cannot be built
        part.num_attention_heads = 1
    for name in ("deepstack_visual_indexes", "fullatt_block_indexes"):
        _set(part, name, [0])


def _set(config: PreTrainedConfig, name: str, value: Any) -> None:
    if hasattr(config, name) and getattr(config, name) is not None:
        setattr(config, name, value)
