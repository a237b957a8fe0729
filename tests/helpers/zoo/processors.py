"""Processors of the tiny families: transformers' own classes over a word-level tokenizer made here.

Token ids are those that the families' models use (see ``common``). Nothing is downloaded.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tests.helpers.models import WORDS
from tests.helpers.zoo.common import BOS, CLIP, END, EOS, IMAGE, PAD, START, VIDEO

# A turn as ChatML has it, the image part as the family writes it (chat templates of Qwen2-VL and InternVL3).
_CHATML = (
    "{{% for message in messages %}}<|im_start|>{{{{ message['role'] }}}}\n"
    "{{% for part in message['content'] %}}{{% if part['type'] == 'image' %}}{image}"
    "{{% else %}}{{{{ part['text'] }}}}{{% endif %}}{{% endfor %}}<|im_end|>\n{{% endfor %}}"
    "{{% if add_generation_prompt %}}<|im_start|>assistant\n{{% endif %}}"
)


def tokenizer(image: str, *, start: str, end: str, video: str, eos: str = "</s>") -> Any:
    """Ids 0..6 as in ``common``, then an unknown token, ChatML's start of turn, and words: 64 in all."""
    from tokenizers import Tokenizer, pre_tokenizers
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast

    special = {PAD: "<pad>", BOS: "<s>", EOS: eos, IMAGE: image, START: start, END: end, VIDEO: video}
    names = [special[index] for index in range(7)] + ["<unk>", "<|im_start|>"]
    words = [*names, *dict.fromkeys(WORDS)][:64]
    core = Tokenizer(WordLevel({word: index for index, word in enumerate(words)}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        bos_token="<s>",
        eos_token=eos,
        pad_token="<pad>",
        unk_token="<unk>",
        additional_special_tokens=[image, start, end, video, "<|im_start|>"],
        padding_side="left",
        clean_up_tokenization_spaces=False,
    )


def llava() -> Any:
    """LLaVA-1.5: 16 tokens an image."""
    from transformers import LlavaProcessor
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    size = CLIP["image_size"]
    return LlavaProcessor(
        image_processor=CLIPImageProcessorPil(
            size={"shortest_edge": size}, crop_size={"height": size, "width": size}
        ),
        tokenizer=tokenizer("<image>", start="<a>", end="<b>", video="<v>"),
        patch_size=CLIP["patch_size"],
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        image_token="<image>",
    )


def llava_next() -> Any:
    """The whole image and its tiles."""
    from transformers import LlavaNextProcessor
    from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil

    size = CLIP["image_size"]
    return LlavaNextProcessor(
        image_processor=LlavaNextImageProcessorPil(
            size={"shortest_edge": size},
            crop_size={"height": size, "width": size},
            image_grid_pinpoints=[[16, 16], [16, 32]],
        ),
        tokenizer=tokenizer("<image>", start="<a>", end="<b>", video="<v>"),
        patch_size=CLIP["patch_size"],
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        image_token="<image>",
    )


def qwen2_vl() -> Any:
    """As many tokens as the image is large."""
    from transformers import Qwen2VLProcessor

    return _qwen(Qwen2VLProcessor)


def qwen2_5_vl() -> Any:
    """As Qwen2-VL."""
    from transformers import Qwen2_5_VLProcessor

    return _qwen(Qwen2_5_VLProcessor)


def qwen3_vl() -> Any:
    """As Qwen2-VL."""
    from transformers import Qwen3VLProcessor

    return _qwen(Qwen3VLProcessor)


def internvl() -> Any:
    """Four tokens a tile."""
    from transformers import InternVLProcessor
    from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import GotOcr2ImageProcessorPil

    words = tokenizer("<IMG_CONTEXT>", start="<img>", end="</img>", video="<video>", eos="<|im_end|>")
    for name, token in (("start_image", START), ("end_image", END), ("context_image", IMAGE)):
        setattr(words, f"{name}_token", words.convert_ids_to_tokens(token))
        setattr(words, f"{name}_token_id", token)
    words.video_token = "<video>"
    return _without_videos(InternVLProcessor)(
        image_processor=GotOcr2ImageProcessorPil(
            size={"height": 16, "width": 16}, crop_to_patches=True, min_patches=1, max_patches=3
        ),
        tokenizer=words,
        image_seq_length=4,
        chat_template=_CHATML.format(image="<IMG_CONTEXT>\n"),
    )


def _qwen(kind: Any) -> Any:
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    words = tokenizer(
        "<|image_pad|>",
        start="<|vision_start|>",
        end="<|vision_end|>",
        video="<|video_pad|>",
        eos="<|im_end|>",
    )
    return _without_videos(kind)(
        image_processor=Qwen2VLImageProcessorPil(
            patch_size=4, merge_size=2, temporal_patch_size=2, min_pixels=64, max_pixels=1024
        ),
        tokenizer=words,
        chat_template=_CHATML.format(image="<|vision_start|><|image_pad|><|vision_end|>"),
    )


def _without_videos(kind: Any) -> Any:
    """The processor class itself; its video half, which needs torchvision, is not asked for."""

    class ForImages(kind):  # type: ignore[misc, valid-type]
        def check_argument_for_proper_class(self, argument_name: str, argument: Any) -> Any:
            if argument_name == "video_processor":
                return type(argument)
            return super().check_argument_for_proper_class(argument_name, argument)

    ForImages.__name__ = kind.__name__
    return ForImages


# family -> its processor
PROCESSORS: dict[str, Callable[[], Any]] = {
    "llava": llava,
    "llava_next": llava_next,
    "qwen2_vl": qwen2_vl,
    "qwen2_5_vl": qwen2_5_vl,
    "internvl": internvl,
}
