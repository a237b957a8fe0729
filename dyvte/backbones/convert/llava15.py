"""``liuhaotian/llava-v1.5-*`` to `LlavaForConditionalGeneration`.

Checkpoints of the original repository hold a LLaMA with two parts below its ``model``. The vision tower is
in the file only where it was saved with the rest; else take the CLIP weights that the config names
(``mm_vision_tower``). ``<image>`` is not in the vocabulary: see `grow_vocabulary`.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from dyvte.backbones.convert.renaming import Converted, Rule, convert

_ARCH = "haotian-liu/LLaVA llava/model/llava_arch.py (LlavaMetaModel)"
_PROJECTOR = "haotian-liu/LLaVA llava/model/multimodal_projector/builder.py (mlp2x_gelu)"
_TOWER = "haotian-liu/LLaVA llava/model/multimodal_encoder/clip_encoder.py (CLIPVisionTower)"
_LLAMA = "huggingface/transformers models/llama/modeling_llama.py (LlamaForCausalLM)"
_OLD = "huggingface/transformers models/llava/convert_llava_weights_to_hf.py"

LLAMA_RULES = (
    Rule(r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq", None, f"{_OLD}: a constant"),
    Rule(r"model\.(embed_tokens|norm)\.weight", r"model.language_model.\1.weight", _LLAMA),
    Rule(r"model\.layers\.(\d+\..+)", r"model.language_model.layers.\1", _LLAMA),
    Rule(r"lm_head\.weight", "lm_head.weight", _LLAMA),
)
PROJECTOR_RULES = (
    Rule(r"model\.mm_projector\.0\.(weight|bias)", r"model.multi_modal_projector.linear_1.\1", _PROJECTOR),
    Rule(r"model\.mm_projector\.2\.(weight|bias)", r"model.multi_modal_projector.linear_2.\1", _PROJECTOR),
)
TOWER_RULES = (
    Rule(
        r"model\.vision_tower\.vision_tower\.vision_model\.embeddings\.position_ids",
        None,
        f"{_TOWER}: a constant",
    ),
    Rule(
        r"model\.vision_tower\.vision_tower\.vision_model\.(.+)",
        r"model.vision_tower.\1",
        f"{_ARCH}, {_TOWER}",
    ),
)
RULES = (*PROJECTOR_RULES, *TOWER_RULES, *LLAMA_RULES)


def convert_llava15(state: Mapping[str, Tensor]) -> Converted:
    """Convert an original LLaVA-1.5 state dict.

    Parameters
    ----------
    state
        Its tensors by name, as ``liuhaotian/llava-v1.5-*`` holds them.

    Raises
    ------
    CheckpointError
        If a key is not of the published layout (LLaVA-1.6's ``image_newline``, for one, is not).
    """
    return convert(state, RULES, "LlavaForConditionalGeneration")
