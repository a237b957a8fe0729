"""A stock `LlavaProcessor` made from parts, for the backbones that come with dyvte and for tiny models."""

from __future__ import annotations

from typing import Any

HALF = {"do_resize": True, "image_mean": [0.5] * 3, "image_std": [0.5] * 3}
"""Image options of the embedded backbones: resized, pixels from -1 to 1."""


def llava_processor(
    tokenizer: Any,
    image_size: int,
    patch_size: int,
    *,
    chat_template: str,
    image_token: str,
    **image_options: Any,
) -> Any:
    """The stock processor with PIL image processing: (image_size / patch_size)^2 visual tokens.

    Parameters
    ----------
    tokenizer
        It knows ``image_token``.
    image_size, patch_size
        In pixels.
    chat_template
        Jinja, kept by the processor.
    image_token
        The placeholder in prompts.
    image_options
        Further arguments of the CLIP image processor.
    """
    from transformers import LlavaProcessor
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    image_processor = CLIPImageProcessorPil(
        size={"height": image_size, "width": image_size}, do_center_crop=False, **image_options
    )
    return LlavaProcessor(
        image_processor=image_processor,
        tokenizer=tokenizer,
        patch_size=patch_size,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=chat_template,
        image_token=image_token,
    )
