"""Eagle-X5 (NVlabs/EAGLE, ``eagle_llama``): language side and projector as LLaVA's class.

The five vision towers, whose features are joined along channels, have no class in transformers: their keys
are omitted and named. Give the model the features of the original towers instead; the projector's input
is as wide as all of them together.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from dyvte.backbones.convert.llava15 import LLAMA_RULES
from dyvte.backbones.convert.renaming import Converted, Rule, convert

_ARCH = "NVlabs/EAGLE eagle/model/eagle_arch.py (EagleMetaModel)"
_PROJECTOR = (
    "NVlabs/EAGLE eagle/model/multimodal_projector/builder.py, type mlp2x_gelu by "
    "scripts/finetune-eagle-x5-vicuna-7b-1.8m.sh"
)
_TOWERS = "NVlabs/EAGLE eagle/model/multimodal_encoder/multi_backbone_channel_concatenation_encoder.py"

RULES = (
    Rule(r"model\.mm_projector\.0\.(weight|bias)", r"model.multi_modal_projector.linear_1.\1", _PROJECTOR),
    Rule(r"model\.mm_projector\.2\.(weight|bias)", r"model.multi_modal_projector.linear_2.\1", _PROJECTOR),
    Rule(r"model\.vision_tower\.vision_towers\.\d+\..+", None, f"{_ARCH}, {_TOWERS}"),
    # eagle/model/language_model/eagle_llama.py: EagleLlamaModel is a LlamaModel
    *LLAMA_RULES,
)


def convert_eagle_x5(state: Mapping[str, Tensor]) -> Converted:
    """Convert the language side and projector of an Eagle-X5 state dict.

    Parameters
    ----------
    state
        Its tensors by name, as the published checkpoint holds them.

    Raises
    ------
    CheckpointError
        If a key is not of the published layout.
    """
    return convert(state, RULES, "LlavaForConditionalGeneration")
