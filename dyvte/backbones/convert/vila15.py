"""VILA-1.5 (NVlabs/VILA): the folders ``llm``, ``vision_tower`` and ``mm_projector`` to LLaVA's class.

The projector fits `LlavaForConditionalGeneration` only where it is an ``mlp2x_gelu``. The downsampling one
(``mlp_downsample``: two by two patches joined, a LayerNorm, two linear layers) has no place there: its keys
are omitted and named, and the model must be given the features of the original projector.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from dyvte.backbones.convert.llava15 import LLAMA_RULES
from dyvte.backbones.convert.renaming import Converted, Rule, convert
from dyvte.errors import CheckpointError

_SAVED = "NVlabs/VILA llava/model/llava_arch.py (LlavaMetaModel.save_pretrained)"
_PROJECTOR = "NVlabs/VILA llava/model/multimodal_projector/base_projector.py (MultimodalProjector)"
_TOWER = "NVlabs/VILA llava/model/multimodal_encoder/siglip_encoder.py (SiglipVisionModel)"

TOWER_RULES = (
    Rule(r"vision_model\.embeddings\.position_ids", None, f"{_TOWER}: a constant"),
    Rule(r"vision_model\.(.+)", r"model.vision_tower.\1", f"{_SAVED}, {_TOWER}"),
)
MLP_RULES = (
    Rule(r"layers\.0\.(weight|bias)", r"model.multi_modal_projector.linear_1.\1", _PROJECTOR),
    Rule(r"layers\.2\.(weight|bias)", r"model.multi_modal_projector.linear_2.\1", _PROJECTOR),
)
# Module 0 has no weights, 1 is the LayerNorm, 2 and 4 are linear.
DOWNSAMPLE_RULES = (Rule(r"layers\.[124]\.(weight|bias)", None, _PROJECTOR),)


def convert_vila15(
    llm: Mapping[str, Tensor],
    vision_tower: Mapping[str, Tensor] | None = None,
    mm_projector: Mapping[str, Tensor] | None = None,
) -> Converted:
    """Convert the state dicts of VILA-1.5's three folders.

    Parameters
    ----------
    llm, vision_tower, mm_projector
        Tensors by their original names; None: omitted, and named as such.

    Raises
    ------
    CheckpointError
        If a key is not of the published layout.
    """
    projector = mm_projector or {}
    # The two types share names; the LayerNorm of the downsampling one is a vector at place 1.
    rules = DOWNSAMPLE_RULES if "layers.1.weight" in projector else MLP_RULES
    parts = [
        convert(part, rule, "LlavaForConditionalGeneration")
        for part, rule in ((llm, LLAMA_RULES), (vision_tower or {}, TOWER_RULES), (projector, rules))
    ]
    if not parts[0].state:
        raise CheckpointError("the state dict of `llm` holds no language model")
    state = {key: tensor for part in parts for key, tensor in part.state.items()}
    left_out = tuple(key for part in parts for key in part.left_out)
    # A part is missing only if none of the three brought it.
    missing = tuple(name for name in parts[0].missing if all(name in part.missing for part in parts))
    return Converted("LlavaForConditionalGeneration", state, left_out, missing)
