"""A LLaVA-class model that is given image features: for checkpoints whose vision side has no class here.

Shapes: I images, T visual tokens of an image, W width of a feature.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from dyvte.backbones.convert.renaming import Converted
from dyvte.errors import CheckpointError


class GivenFeatures(nn.Module):
    """Stands in for a vision tower: what it gets as pixels is what comes out as features, (I, T, W)."""

    def forward(self, pixel_values: Tensor, **_: Any) -> Any:
        """Pass on."""
        from transformers.modeling_outputs import BaseModelOutput

        return BaseModelOutput(last_hidden_state=pixel_values, hidden_states=(pixel_values,))


def llava_for_features(
    converted: Converted, text_config: Any, image_token_id: int, **config_options: Any
) -> nn.Module:
    """`LlavaForConditionalGeneration` without a vision tower, holding a converted language side.

    Call it with ``pixel_values`` = features (I, T, W) of the original towers, and T placeholders for each
    image. Where the source's projector was converted it runs here (W is its input width); else the features
    must come from behind the original projector (W is the hidden size). The stand-in is not written by
    ``save_pretrained``: make the model anew each time.

    Parameters
    ----------
    converted
        From `convert_eagle_x5` or `convert_vila15`, its vocabulary grown to that of `text_config`.
    text_config
        Of the decoder: a transformers config, or a dict with its ``model_type``.
    image_token_id
        Id of the placeholder token, of which a prompt holds T for each image.
    config_options
        Further fields of `LlavaConfig`.

    Raises
    ------
    CheckpointError
        If the converted weights do not fit the config.
    """
    from transformers import LlavaConfig, LlavaForConditionalGeneration

    projector = converted.state.get("model.multi_modal_projector.linear_1.weight")
    # As wide as the features and without any layer: it is replaced at once.
    tower = {
        "model_type": "clip_vision_model",
        "hidden_size": 1 if projector is None else projector.shape[1],
        "intermediate_size": 1,
        "num_hidden_layers": 0,
        "num_attention_heads": 1,
        "image_size": 1,
        "patch_size": 1,
    }
    config = LlavaConfig(
        text_config=text_config,
        vision_config=tower,
        image_token_id=image_token_id,
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
        **config_options,
    )
    model = LlavaForConditionalGeneration(config)
    model.model.vision_tower = GivenFeatures()
    if projector is None:
        model.model.multi_modal_projector = nn.Identity()
    state = {key: t for key, t in converted.state.items() if not key.startswith("model.vision_tower.")}
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        raise CheckpointError(f"the converted weights do not fit this config: {error}") from error
    return model.requires_grad_(False).eval()
