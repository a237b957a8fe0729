"""Prompts that together hold every kind of row: short, long, without an image, with two images."""

from __future__ import annotations

from functools import cache

from dyvte.backbones import encode, get_template
from tests.helpers.models import random_image, tiny_llava

VISUAL_ID = 4  # "<image>" in the tiny tokenizer
QUESTIONS = (
    ("what color is the circle ?", 1),
    ("is there any square", 1),
    ("how many", 1),
    ("is yes or no and ? ? what of the image", 1),
    ("is there any square", 0),
    ("left or right", 2),
)


@cache
def llava(attn_implementation: str = "sdpa", layers: int = 4):
    """One tiny model for a whole test run; nobody may change it."""
    return tiny_llava(layers=layers, attn_implementation=attn_implementation)


def batch(processor, questions=QUESTIONS, padding_side: str = "left"):
    """Model inputs for (question, number of images) pairs."""
    template = get_template("chat", processor)
    rendered = [template.render(text, has_image=images) for text, images in questions]
    pictures = [[random_image(10 * row + i) for i in range(n)] for row, (_, n) in enumerate(questions)]
    return encode(processor, rendered, pictures, padding_side=padding_side)[0]
