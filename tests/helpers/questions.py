"""Several questions about a few pictures."""

from __future__ import annotations

from collections.abc import Sequence

from dyvte.backbones import encode, get_template
from tests.helpers.models import random_image

QUESTIONS = (
    "what color is the circle ?",
    "how many",
    "is there any red square on the left of the image ?",
    "is there any square",
    "left or right ?",
)


def asked(processor, images: Sequence[int | None], *, padding_side: str = "left", system: str = "") -> dict:
    """Model inputs: a question about each of these pictures, by number; None: one without a picture."""
    template = get_template("chat", processor)
    rendered = [
        template.render(QUESTIONS[row % len(QUESTIONS)], has_image=image is not None, system=system)
        for row, image in enumerate(images)
    ]
    pictures = [[] if image is None else [random_image(image)] for image in images]
    return encode(processor, rendered, pictures, padding_side=padding_side)[0]
