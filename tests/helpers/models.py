"""Tiny random multimodal models and processors, built from configs: no hub, no files, seeded."""

from __future__ import annotations

import torch

from dyvte.data.scenes.processor import IMAGE, word_processor

# fmt: off
WORDS = [
    "user", "assistant", "system", "the", "a", "an", "is", "are", "of", "in", "on", "what", "which", "how",
    "many", "color", "colour", "shape", "red", "green", "blue", "yellow", "black", "white", "left", "right",
    "top", "bottom", "circle", "square", "triangle", "yes", "no", "one", "two", "three", "four", "five",
    "six", "object", "objects", "image", "picture", "there", "any", "than", "more", "less", "answer", "with",
    "and", "or", "not", "?", ".", ",", ":", "!",
]
# fmt: on


def tiny_processor(image_size: int = 16, patch: int = 4):
    """The embedded backbone's kind of processor, for other words: (image_size / patch)^2 visual tokens."""
    return word_processor(WORDS, image_size, patch)


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
