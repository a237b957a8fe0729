"""What a test module finds on disk: a tiny backbone, benchmarks and conversations about noise images."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.helpers.fixtures import write_mini_gqa, write_mini_mme
from tests.helpers.models import random_image, tiny_llava

QUESTIONS = ("how many ?", "what color is the circle ?", "is there any red square on the left ?")
END_TOKENS = [2, 31, 34]
"""Words that a random model says soon: with them its answers have different lengths."""


@dataclass(frozen=True)
class World:
    """What the fixture `world` writes for a module that has one of these as ``WORLD``.

    Attributes
    ----------
    gqa
        Questions and images of ``gqa/``, a GQA in its own layout; None: there is none.
    mme
        Images per subtask of ``mme/``; 0: there is none.
    conversations
        Name to the images that ``NAME.json`` is about, `questions` each; the images lie in ``images/``.
    questions
        How many of `QUESTIONS` are asked of each image.
    stops
        Does the backbone, in ``backbone/``, end its answers at any of `END_TOKENS`?
    layers
        Of the backbone.
    """

    gqa: tuple[int, int] | None = None
    mme: int = 0
    conversations: Mapping[str, range] = field(default_factory=dict)
    questions: int = 3
    stops: bool = False
    layers: int = 4

    def write(self, root: Path) -> Path:
        """Write all of it below ``root``."""
        model, processor = tiny_llava(self.layers)
        if self.stops:
            model.generation_config.eos_token_id = END_TOKENS
        model.save_pretrained(root / "backbone")
        processor.save_pretrained(root / "backbone")
        if self.gqa is not None:
            write_mini_gqa(root / "gqa", *self.gqa)
        if self.mme:
            write_mini_mme(root / "mme", self.mme)
        for name, images in self.conversations.items():
            write_conversations(root, name, images, QUESTIONS[: self.questions])
        return root


def write_conversations(root: Path, name: str, images: range, questions: tuple[str, ...]) -> Path:
    """``NAME.json`` about images in ``images/``, each of them asked every question."""
    (root / "images").mkdir(exist_ok=True)
    for image in images:
        random_image(image).save(root / "images" / f"{image}.png")
    entries = [
        conversation(f"{name}-{image}-{number}", f"{image}.png", question)
        for image in images
        for number, question in enumerate(questions)
    ]
    path = root / f"{name}.json"
    path.write_text(json.dumps(entries))
    return path


def conversation(
    sample_id: str, image: str, question: str = QUESTIONS[0], answer: str = "red"
) -> dict[str, Any]:
    """One exchange about an image."""
    turns = [{"from": "human", "value": f"<image>\n{question}"}, {"from": "gpt", "value": answer}]
    return {"id": sample_id, "image": image, "conversations": turns}
