"""LISA (``xinlai/LISA-7B-v1`` and its like): LLaVA, SAM's weights below ``model``, and two layers between.

The language side is LLaVA's first version: the projector is one linear layer. transformers' class has two
with an activation between; with ``projector_hidden_act="linear"`` and an identity as the second it computes
the same. The CLIP tower is not in the file (``merge_lora_weights_and_save_hf_model.py`` leaves it out), it is
``openai/clip-vit-large-patch14``. SAM's keys are those of segment-anything.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from dyvte.backbones.convert.llava15 import LLAMA_RULES, TOWER_RULES
from dyvte.backbones.convert.renaming import Converted, Rule, convert
from dyvte.errors import CheckpointError

_LISA = "dvlab-research/LISA model/LISA.py (LisaMetaModel.initialize_lisa_modules)"
_ARCH = "dvlab-research/LISA model/llava/model/llava_arch.py (LlavaMetaModel: nn.Linear)"
_SAM = "dvlab-research/LISA model/segment_anything/modeling/"
_ENCODER, _PROMPT = f"{_SAM}image_encoder.py", f"{_SAM}prompt_encoder.py"
_DECODER, _TWO_WAY = f"{_SAM}mask_decoder.py", f"{_SAM}transformer.py"
_BUFFERS = f"{_SAM}sam.py: constants of the normalisation"

_BLOCK, _TO_BLOCK = r"image_encoder\.blocks\.(\d+)\.", r"vision_encoder.layers.\1."
_LAYER, _TO_LAYER = r"mask_decoder\.transformer\.layers\.(\d+)\.", r"mask_decoder.transformer.layers.\1."
_WB = r"(weight|bias)"
_ATTENTION = r"(self_attn|cross_attn_token_to_image|cross_attn_image_to_token)"
POSITIONS = "prompt_encoder.shared_embedding.positional_embedding"
_SHARED = "shared_image_embedding.positional_embedding"

PROJECTOR_RULES = (Rule(rf"model\.mm_projector\.{_WB}", r"model.multi_modal_projector.linear_1.\1", _ARCH),)
SAM_RULES = (
    Rule(r"pixel_(mean|std)", None, _BUFFERS),
    Rule(r"image_encoder\.pos_embed", "vision_encoder.pos_embed", _ENCODER),
    Rule(rf"image_encoder\.patch_embed\.proj\.{_WB}", r"vision_encoder.patch_embed.projection.\1", _ENCODER),
    Rule(_BLOCK + rf"norm([12])\.{_WB}", _TO_BLOCK + r"layer_norm\2.\3", _ENCODER),
    Rule(_BLOCK + rf"attn\.(qkv|proj)\.{_WB}", _TO_BLOCK + r"attn.\2.\3", _ENCODER),
    Rule(_BLOCK + r"attn\.rel_pos_([hw])", _TO_BLOCK + r"attn.rel_pos_\2", _ENCODER),
    Rule(_BLOCK + rf"mlp\.(lin[12])\.{_WB}", _TO_BLOCK + r"mlp.\2.\3", f"{_SAM}common.py (MLPBlock)"),
    Rule(r"image_encoder\.neck\.0\.weight", "vision_encoder.neck.conv1.weight", _ENCODER),
    Rule(rf"image_encoder\.neck\.1\.{_WB}", r"vision_encoder.neck.layer_norm1.\1", _ENCODER),
    Rule(r"image_encoder\.neck\.2\.weight", "vision_encoder.neck.conv2.weight", _ENCODER),
    Rule(rf"image_encoder\.neck\.3\.{_WB}", r"vision_encoder.neck.layer_norm2.\1", _ENCODER),
    Rule(r"prompt_encoder\.pe_layer\.positional_encoding_gaussian_matrix", POSITIONS, _PROMPT),
    Rule(
        r"prompt_encoder\.point_embeddings\.([0-3])\.weight", r"prompt_encoder.point_embed.\1.weight", _PROMPT
    ),
    Rule(r"prompt_encoder\.(not_a_point_embed|no_mask_embed)\.weight", r"prompt_encoder.\1.weight", _PROMPT),
    Rule(rf"prompt_encoder\.mask_downscaling\.0\.{_WB}", r"prompt_encoder.mask_embed.conv1.\1", _PROMPT),
    Rule(
        rf"prompt_encoder\.mask_downscaling\.1\.{_WB}", r"prompt_encoder.mask_embed.layer_norm1.\1", _PROMPT
    ),
    Rule(rf"prompt_encoder\.mask_downscaling\.3\.{_WB}", r"prompt_encoder.mask_embed.conv2.\1", _PROMPT),
    Rule(
        rf"prompt_encoder\.mask_downscaling\.4\.{_WB}", r"prompt_encoder.mask_embed.layer_norm2.\1", _PROMPT
    ),
    Rule(rf"prompt_encoder\.mask_downscaling\.6\.{_WB}", r"prompt_encoder.mask_embed.conv3.\1", _PROMPT),
    Rule(_LAYER + rf"{_ATTENTION}\.([qkv]|out)_proj\.{_WB}", _TO_LAYER + r"\2.\3_proj.\4", _TWO_WAY),
    Rule(_LAYER + rf"norm([1-4])\.{_WB}", _TO_LAYER + r"layer_norm\2.\3", _TWO_WAY),
    Rule(_LAYER + rf"mlp\.(lin[12])\.{_WB}", _TO_LAYER + r"mlp.\2.\3", _TWO_WAY),
    Rule(
        rf"mask_decoder\.transformer\.final_attn_token_to_image\.([qkv]|out)_proj\.{_WB}",
        r"mask_decoder.transformer.final_attn_token_to_image.\1_proj.\2",
        _TWO_WAY,
    ),
    Rule(
        rf"mask_decoder\.transformer\.norm_final_attn\.{_WB}",
        r"mask_decoder.transformer.layer_norm_final_attn.\1",
        _TWO_WAY,
    ),
    Rule(r"mask_decoder\.(iou_token|mask_tokens)\.weight", r"mask_decoder.\1.weight", _DECODER),
    Rule(rf"mask_decoder\.output_upscaling\.0\.{_WB}", r"mask_decoder.upscale_conv1.\1", _DECODER),
    Rule(rf"mask_decoder\.output_upscaling\.1\.{_WB}", r"mask_decoder.upscale_layer_norm.\1", _DECODER),
    Rule(rf"mask_decoder\.output_upscaling\.3\.{_WB}", r"mask_decoder.upscale_conv2.\1", _DECODER),
    # a perceptron of three layers: transformers names the first and the last apart
    Rule(
        rf"mask_decoder\.output_hypernetworks_mlps\.(\d+)\.layers\.0\.{_WB}",
        r"mask_decoder.output_hypernetworks_mlps.\1.proj_in.\2",
        _DECODER,
    ),
    Rule(
        rf"mask_decoder\.output_hypernetworks_mlps\.(\d+)\.layers\.1\.{_WB}",
        r"mask_decoder.output_hypernetworks_mlps.\1.layers.0.\2",
        _DECODER,
    ),
    Rule(
        rf"mask_decoder\.output_hypernetworks_mlps\.(\d+)\.layers\.2\.{_WB}",
        r"mask_decoder.output_hypernetworks_mlps.\1.proj_out.\2",
        _DECODER,
    ),
    Rule(
        rf"mask_decoder\.iou_prediction_head\.layers\.0\.{_WB}",
        r"mask_decoder.iou_prediction_head.proj_in.\1",
        _DECODER,
    ),
    Rule(
        rf"mask_decoder\.iou_prediction_head\.layers\.1\.{_WB}",
        r"mask_decoder.iou_prediction_head.layers.0.\1",
        _DECODER,
    ),
    Rule(
        rf"mask_decoder\.iou_prediction_head\.layers\.2\.{_WB}",
        r"mask_decoder.iou_prediction_head.proj_out.\1",
        _DECODER,
    ),
)
HEAD_RULES = (Rule(rf"model\.text_hidden_fcs\.0\.([02])\.{_WB}", r"\1.\2", _LISA),)
RULES = (*PROJECTOR_RULES, *TOWER_RULES, *LLAMA_RULES)
_VISUAL = "model.visual_model."
_FIRST, _SECOND = (
    "model.multi_modal_projector.linear_1.weight",
    "model.multi_modal_projector.linear_2",
)


@dataclass(frozen=True)
class ConvertedLisa:
    """The three parts of a LISA checkpoint.

    Attributes
    ----------
    language
        For ``LlavaForConditionalGeneration``; ``missing`` names the vision tower where it is not in the file.
    sam
        For ``SamModel``.
    text_hidden_fcs
        The two layers between, by their numbers in ``nn.Sequential``.
    """

    language: Converted
    sam: Converted
    text_hidden_fcs: dict[str, Tensor]


def convert_lisa(state: Mapping[str, Tensor]) -> ConvertedLisa:
    """Convert a LISA state dict.

    Parameters
    ----------
    state
        Its tensors by name, as the published checkpoint holds them.

    Raises
    ------
    CheckpointError
        If a key is not of the published layout, or the projector, SAM or the two layers between are absent.
    """
    visual = {key.removeprefix(_VISUAL): t for key, t in state.items() if key.startswith(_VISUAL)}
    between = {key: t for key, t in state.items() if key.startswith("model.text_hidden_fcs.")}
    rest = {key: t for key, t in state.items() if not key.startswith((_VISUAL, "model.text_hidden_fcs."))}
    sam = convert(visual, SAM_RULES, "SamModel")
    head = convert(between, HEAD_RULES, "nn.Sequential").state
    language = convert(rest, RULES, "LlavaForConditionalGeneration")
    wanted = {f"{layer}.{part}" for layer in (0, 2) for part in ("weight", "bias")}
    absent = [f"model.text_hidden_fcs.0.{name}" for name in sorted(wanted - head.keys())]
    absent += [] if POSITIONS in sam.state else [f"{_VISUAL}* (segment-anything)"]
    absent += [] if _FIRST in language.state else ["model.mm_projector.weight"]
    if absent:
        raise CheckpointError(
            f"the source lacks {', '.join(absent)}: is it a LISA checkpoint, and are all its files here?"
        )
    sam.state[_SHARED] = sam.state[POSITIONS]
    first = language.state[_FIRST]
    language.state[f"{_SECOND}.weight"] = torch.eye(len(first), dtype=first.dtype)
    language.state[f"{_SECOND}.bias"] = torch.zeros(len(first), dtype=first.dtype)
    return ConvertedLisa(language, replace(sam, missing=()), head)
