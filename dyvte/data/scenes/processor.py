"""The word-level tokenizer and the stock LlavaProcessor of the embedded backbone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from dyvte.backbones.llava_processor import HALF, llava_processor
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
    """The stock `LlavaProcessor` around a tokenizer of these words.

    Parameters
    ----------
    words
        In the order of their ids.
    image_size, patch_size
        Of the vision tower, in pixels.
    **image_options
        Of the image processor.
    """
    tokenizer = word_tokenizer(words)
    return llava_processor(
        tokenizer, image_size, patch_size, chat_template=CHAT_TEMPLATE, image_token=IMAGE, **image_options
    )


def build_processor():
    """The processor of the embedded backbone; its words are exactly those of the questions."""
    return word_processor(all_words(), IMAGE_SIZE, PATCH_SIZE, **HALF)
