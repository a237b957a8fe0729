"""The word-level tokenizer and the stock LlavaProcessor of the embedded backbone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from dyvte.data.scenes.questions import all_words
from dyvte.data.scenes.render import IMAGE_SIZE

BOS, EOS, PAD, UNK, IMAGE = "<s>", "</s>", "<pad>", "<unk>", "<image>"
PATCH_SIZE = 8
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] == 'user' %}{{ '<s>user ' }}"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] if part['type'] == 'image' %}{{ '<image> ' }}{% endfor %}"
    "{% for part in message['content'] if part['type'] == 'text' %}{{ part['text'] }}{% endfor %}"
    "{% endif %}"
    "{% else %}{{ ' assistant ' }}"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] if part['type'] == 'text' %}{{ part['text'] }}{% endfor %}"
    "{% endif %}{{ '</s>' }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}{{ ' assistant' }}{% endif %}"
)


def word_tokenizer(words: Sequence[str]):
    """A `PreTrainedTokenizerFast` that knows these words and the special tokens; lower-cases its input."""
    from tokenizers import Tokenizer, normalizers, pre_tokenizers
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast

    vocabulary = dict.fromkeys([PAD, BOS, EOS, UNK, IMAGE, *words])
    core = Tokenizer(WordLevel({w: i for i, w in enumerate(vocabulary)}, unk_token=UNK))
    core.normalizer = normalizers.Lowercase()
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
        unk_token=UNK,
        additional_special_tokens=[IMAGE],
        padding_side="left",
        clean_up_tokenization_spaces=False,
    )


def word_processor(words: Sequence[str], image_size: int, patch_size: int, **image_options: Any):
    """The stock `LlavaProcessor` with PIL image processing: (image_size / patch_size)^2 visual tokens."""
    from transformers import LlavaProcessor
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    image_processor = CLIPImageProcessorPil(
        size={"height": image_size, "width": image_size}, do_center_crop=False, **image_options
    )
    return LlavaProcessor(
        image_processor=image_processor,
        tokenizer=word_tokenizer(words),
        patch_size=patch_size,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=CHAT_TEMPLATE,
        image_token=IMAGE,
    )


def build_processor():
    """The processor of the embedded backbone; its words are exactly those of the questions."""
    half = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}
    return word_processor(all_words(), IMAGE_SIZE, PATCH_SIZE, do_resize=True, **half)
