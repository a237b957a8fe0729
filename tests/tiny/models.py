"""Tiny random multimodal models and processors, built from configs: no hub, no files, seeded."""

from __future__ import annotations

from collections.abc import Sequence

import torch

# fmt: off
WORDS = [
    "user", "assistant", "system", "the", "a", "an", "is", "are", "of", "in", "on", "what", "which", "how",
    "many", "color", "colour", "shape", "red", "green", "blue", "yellow", "black", "white", "left", "right",
    "top", "bottom", "circle", "square", "triangle", "yes", "no", "one", "two", "three", "four", "five",
    "six", "object", "objects", "image", "picture", "there", "any", "than", "more", "less", "answer", "with",
    "and", "or", "not", "?", ".", ",", ":", "!",
]
# fmt: on
BOS, EOS, PAD, UNK, IMAGE = "<s>", "</s>", "<pad>", "<unk>", "<image>"
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] == 'user' %}{{ '<s>user ' }}"
    "{% for part in message['content'] if part['type'] == 'image' %}{{ '<image> ' }}{% endfor %}"
    "{% for part in message['content'] if part['type'] == 'text' %}{{ part['text'] }}{% endfor %}"
    "{% else %}{{ ' assistant ' }}"
    "{% for part in message['content'] if part['type'] == 'text' %}{{ part['text'] }}{% endfor %}"
    "{{ '</s>' }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}{{ ' assistant' }}{% endif %}"
)


def tiny_tokenizer(words: Sequence[str] = WORDS):
    """Word-level fast tokenizer; unknown words become ``<unk>``."""
    from tokenizers import Tokenizer, pre_tokenizers
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast

    vocab = {word: i for i, word in enumerate([PAD, BOS, EOS, UNK, IMAGE, *dict.fromkeys(words)])}
    core = Tokenizer(WordLevel(vocab, unk_token=UNK))
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


def tiny_processor(image_size: int = 16, patch: int = 4):
    """Stock LlavaProcessor with PIL image processing: (image_size / patch)^2 visual tokens an image."""
    from transformers import LlavaProcessor
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    return LlavaProcessor(
        image_processor=CLIPImageProcessorPil(
            size={"height": image_size, "width": image_size}, do_center_crop=False
        ),
        tokenizer=tiny_tokenizer(),
        patch_size=patch,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=CHAT_TEMPLATE,
        image_token=IMAGE,
    )


def tiny_llava(
    layers: int = 4,
    hidden: int = 32,
    *,
    heads: int = 4,
    kv_heads: int = 2,
    image_size: int = 16,
    patch: int = 4,
    seed: int = 0,
    attn_implementation: str = "sdpa",
    std: float = 0.15,
):
    """A random LLaVA (CLIP tower, MLP projector, LLaMA decoder) and its processor.

    Returns
    -------
    model, processor
        Model in eval mode, float32, frozen. `std` is large enough for exits to change the logits clearly.
    """
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

    processor = tiny_processor(image_size, patch)
    tokenizer = processor.tokenizer
    text = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        max_position_embeddings=2048,
        initializer_range=std,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    vision = CLIPVisionConfig(
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=image_size,
        patch_size=patch,
        initializer_range=std,
    )
    config = LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_id=tokenizer.convert_tokens_to_ids(IMAGE),
        vision_feature_layer=-1,
        vision_feature_select_strategy="default",
        image_seq_length=(image_size // patch) ** 2,
        initializer_range=std,
    )
    config._attn_implementation = attn_implementation
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = LlavaForConditionalGeneration(config)
    # Random weights like to say "<image>"; a generated placeholder is no image.
    model.generation_config.suppress_tokens = [tokenizer.convert_tokens_to_ids(IMAGE)]
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    return model.requires_grad_(False).eval(), processor


def random_image(seed: int, size: int = 16):
    """A PIL image of noise."""
    from PIL import Image

    generator = torch.Generator().manual_seed(seed)
    pixels = torch.randint(0, 256, (size, size, 3), generator=generator, dtype=torch.uint8)
    return Image.fromarray(pixels.numpy())
