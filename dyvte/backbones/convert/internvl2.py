"""InternVL2 (``OpenGVLab/InternVL2-*``, `InternVLChatModel`) to `InternVLForConditionalGeneration`.

InternLM2 decoders become LLaMA ones: their joint ``wqkv`` is taken apart. LLaMA, Qwen2 and Phi-3 decoders
keep their names. Only pixel shuffle version 2 is what transformers computes.

Shapes: G key/value groups, R query heads of one group, d head size, D hidden size.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from dyvte.backbones.convert.renaming import Converted, Rule, convert
from dyvte.errors import CheckpointError

_CHAT = "OpenGVLab/InternVL internvl_chat/internvl/model/internvl_chat/modeling_internvl_chat.py"
_VIT = "OpenGVLab/InternVL internvl_chat/internvl/model/internvl_chat/modeling_intern_vit.py"
_LM2 = "OpenGVLab/InternVL internvl_chat/internvl/model/internlm2/modeling_internlm2.py"
# which names the InternLM2 keys too
_HF = "huggingface/transformers models/internvl/convert_internvl_weights_to_hf.py"

_LAYER = r"vision_model\.encoder\.layers\.(\d+)\."
_TO = r"model.vision_tower.encoder.layer.\1."
_TEXT = r"language_model\.model\.layers\.(\d+)\."
_TO_TEXT = r"model.language_model.layers.\1."

VISION_RULES = (
    Rule(r"vision_model\.embeddings\.class_embedding", "model.vision_tower.embeddings.cls_token", _VIT),
    Rule(
        r"vision_model\.embeddings\.position_embedding",
        "model.vision_tower.embeddings.position_embeddings",
        _VIT,
    ),
    Rule(
        r"vision_model\.embeddings\.patch_embedding\.(weight|bias)",
        r"model.vision_tower.embeddings.patch_embeddings.projection.\1",
        _VIT,
    ),
    Rule(_LAYER + r"ls([12])", _TO + r"lambda_\2", _VIT),
    Rule(_LAYER + r"attn\.([qkv]_proj)\.(weight|bias)", _TO + r"attention.\2.\3", f"{_VIT}, after the split"),
    Rule(_LAYER + r"attn\.([qk]_norm)\.weight", _TO + r"attention.\2.weight", _VIT),
    Rule(_LAYER + r"attn\.proj\.(weight|bias)", _TO + r"attention.projection_layer.\2", _VIT),
    Rule(_LAYER + r"mlp\.(fc[12])\.(weight|bias)", _TO + r"mlp.\2.\3", _VIT),
    Rule(_LAYER + r"norm1\.(weight|bias)", _TO + r"layernorm_before.\2", _VIT),
    Rule(_LAYER + r"norm2\.(weight|bias)", _TO + r"layernorm_after.\2", _VIT),
)
PROJECTOR_RULES = (
    Rule(r"mlp1\.0\.(weight|bias)", r"model.multi_modal_projector.layer_norm.\1", _CHAT),
    Rule(r"mlp1\.1\.(weight|bias)", r"model.multi_modal_projector.linear_1.\1", _CHAT),
    Rule(r"mlp1\.3\.(weight|bias)", r"model.multi_modal_projector.linear_2.\1", _CHAT),
)
INTERNLM2_RULES = (
    Rule(r"language_model\.model\.tok_embeddings\.weight", "model.language_model.embed_tokens.weight", _LM2),
    Rule(_TEXT + r"attention\.([qkv]_proj)\.weight", _TO_TEXT + r"self_attn.\2.weight", f"{_LM2}, split"),
    Rule(_TEXT + r"attention\.wo\.weight", _TO_TEXT + "self_attn.o_proj.weight", _LM2),
    Rule(_TEXT + r"feed_forward\.w1\.weight", _TO_TEXT + "mlp.gate_proj.weight", _LM2),
    Rule(_TEXT + r"feed_forward\.w2\.weight", _TO_TEXT + "mlp.down_proj.weight", _LM2),
    Rule(_TEXT + r"feed_forward\.w3\.weight", _TO_TEXT + "mlp.up_proj.weight", _LM2),
    Rule(_TEXT + r"attention_norm\.weight", _TO_TEXT + "input_layernorm.weight", _LM2),
    Rule(_TEXT + r"ffn_norm\.weight", _TO_TEXT + "post_attention_layernorm.weight", _LM2),
    Rule(r"language_model\.output\.weight", "lm_head.weight", _LM2),
)
# The decoders that are transformers' own classes (modeling_internvl_chat.py chooses among them).
OTHER_TEXT_RULES = (
    Rule(
        r"language_model\.model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq", None, f"{_CHAT}: a constant"
    ),
    Rule(
        r"language_model\.model\.(embed_tokens\.weight|norm\.weight|layers\..+)",
        r"model.language_model.\1",
        f"{_CHAT}, {_HF}",
    ),
    Rule(r"language_model\.lm_head\.weight", "lm_head.weight", f"{_CHAT}, {_HF}"),
)
RULES = (*VISION_RULES, *PROJECTOR_RULES, *INTERNLM2_RULES, *OTHER_TEXT_RULES)


def convert_internvl2(
    state: Mapping[str, Tensor], *, num_attention_heads: int, num_key_value_heads: int
) -> Converted:
    """Convert an InternVL2 state dict.

    Parameters
    ----------
    state
        Its tensors by name, as the published checkpoint holds them.
    num_attention_heads, num_key_value_heads
        Of the decoder (``llm_config``): they say how an InternLM2 ``wqkv`` is laid out.

    Raises
    ------
    CheckpointError
        If a key is not of the published layout, or a joint weight does not divide.
    """
    split: dict[str, Tensor] = {}
    for key, tensor in state.items():
        if ".attn.qkv." in key:
            split.update(_split_vision(key, tensor))
        elif key.endswith(".attention.wqkv.weight"):
            split.update(_split_text(key, tensor, num_attention_heads, num_key_value_heads))
        else:
            split[key] = tensor
    return convert(split, RULES, "InternVLForConditionalGeneration")


def _split_vision(key: str, joint: Tensor) -> dict[str, Tensor]:
    # modeling_intern_vit.py: rows are all queries, all keys, all values
    return {
        key.replace(".attn.qkv.", f".attn.{name}_proj."): part.contiguous()
        for name, part in zip("qkv", joint.chunk(3), strict=True)
    }


def _split_text(key: str, joint: Tensor, heads: int, groups: int) -> dict[str, Tensor]:
    # modeling_internlm2.py: group by group, each its query heads, then one key and one value head
    per_group = heads // groups + 2
    if heads % groups or joint.shape[0] % (groups * per_group):
        raise CheckpointError(
            f"{key} has {joint.shape[0]} rows, which do not divide into {groups} groups of {per_group} heads"
        )
    joint_GRdD = joint.unflatten(0, (groups, per_group, -1))
    parts = {"q": joint_GRdD[:, :-2], "k": joint_GRdD[:, -2:-1], "v": joint_GRdD[:, -1:]}
    return {
        key.replace(".attention.wqkv.", f".attention.{name}_proj."): part.flatten(0, 2).contiguous()
        for name, part in parts.items()
    }
