"""Square padding of images: LLaVA-1.5 was trained with it, but its converted processors crop instead.

LLaVA-1.5 (``image_aspect_ratio: pad``, llava/mm_utils.py) centres an image on a square of its longer side,
coloured ``int(255 * mean)``, before it resizes. The CLIP processor that converted checkpoints carry resizes
the shorter side and crops the rest away, so that the model never sees the ends of a wide image.
"""

from __future__ import annotations

from typing import Any, Literal, get_args

from dyvte.errors import ConfigError, GateMismatchError

ImagePadding = Literal["auto", "square", "none"]

# Processors that resize, crop and normalise, and nothing else: padding first is all that changes.
_PLAIN = ("CLIPImageProcessor", "SiglipImageProcessor", "LlavaImageProcessor")
# LLaVA-1.5 and those trained with its recipe; VILA and LLaVA-NeXT resize or tile.
_TRAINED_PADDED = ("llava", "vipllava")


def set_image_padding(processor: Any, padding: ImagePadding, model_type: str) -> None:
    """Give a processor the image padding that is wanted.

    Parameters
    ----------
    processor
        Its image processor is replaced by the stock LLaVA one of the same settings, the PIL version: it
        alone gives the original's pixels exactly.
    padding
        "square", "none", or "auto": square for a LLaVA-1.5 backbone with a CLIP processor that crops; a LLaVA
        image processor keeps what its own settings say.
    model_type
        Of the backbone's config.

    Raises
    ------
    ConfigError
        If "square" is asked of a processor that does more than resize, crop and normalise.
    """
    if padding not in get_args(ImagePadding):
        raise ConfigError(f"image_padding {padding!r}: expected one of {', '.join(get_args(ImagePadding))}")
    images = getattr(processor, "image_processor", None)
    kind = _kind(images)
    if padding == "auto":
        crops = kind == "CLIPImageProcessor" and bool(getattr(images, "do_center_crop", False))
        if not (crops and model_type in _TRAINED_PADDED):
            return
    wanted = padding != "none"
    if wanted == (image_padding(processor) == "square"):
        return
    if kind not in _PLAIN:
        raise ConfigError(
            f"image_padding: square is for CLIP-like image processors, this one is {type(images).__name__}, "
            "which lays images out its own way: use auto or none"
        )
    processor.image_processor = _padding_processor(images, wanted)


def image_padding(processor: Any) -> str:
    """ "square" if the processor pads images to a square as LLaVA-1.5 does, else "none".

    Parameters
    ----------
    processor
        Of a transformers model; its image processor is looked at.
    """
    images = getattr(processor, "image_processor", None)
    return "square" if _kind(images) == "LlavaImageProcessor" and images.do_pad else "none"


def check_image_padding(trained: str | None, found: str, where: str) -> None:
    """See that gates meet images padded as those they were trained on.

    Parameters
    ----------
    trained
        What the gates saw; None: not recorded.
    found
        What the processor does now.
    where
        What uses the gates, for the message.

    Raises
    ------
    GateMismatchError
        They were trained with other padding than ``found``.
    """
    if trained not in (None, found):
        raise GateMismatchError(
            f"{where}: image padding is {found!r}, but the gates were trained with {trained!r}: set "
            f"image_padding to {trained!r}, or the model sees other images than the gates learned from"
        )


def _kind(images: Any) -> str:
    name = type(images).__name__
    return next((kind for kind in _PLAIN if name in (kind, f"{kind}Pil", f"{kind}Fast")), name)


def _padding_processor(images: Any, wanted: bool) -> Any:
    from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil

    settings = {name: value for name, value in images.to_dict().items() if name != "image_processor_type"}
    # What the class of the given one does not do at all, the LLaVA one would do by default.
    settings["do_center_crop"] = bool(settings.get("do_center_crop"))
    return LlavaImageProcessorPil(**{**settings, "do_pad": wanted})
