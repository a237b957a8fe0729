"""The gates that the repository ships: for its own backbone, certified, with a decision for every prompt."""

from pathlib import Path

import torch

import dyvte
from dyvte.backbones import encode, get_template, load_backbone
from tests.helpers.models import random_image

CHECKPOINTS = Path(__file__).resolve().parents[1] / "checkpoints"


def test_shipped_gates_decide_on_the_shipped_backbone():
    model, processor = load_backbone(str(CHECKPOINTS / "tiny-llava"))
    exits = dyvte.VisualExit.from_pretrained(CHECKPOINTS / "tiny-llava-gates")
    template = get_template("chat", processor)
    texts = ["what is the background ?", "how many circles are there ?"]
    rendered = [template.render(text, has_image=1) for text in texts]
    inputs = encode(processor, rendered, [[random_image(n, 64)] for n in range(2)], padding_side="left")[0]
    with torch.no_grad(), exits(model) as run:
        model.generate(**inputs, max_new_tokens=4)
    assert (run.freeze_layers <= run.exit_layers).all()
    assert (run.freeze_layers < 10).all()  # a random image needs no ten layers of updates


def test_shipped_gates_say_what_they_promise():
    config = dyvte.VisualExit.from_pretrained(CHECKPOINTS / "tiny-llava-gates").gates.config
    assert config.calibration["certified"]
    assert (config.calibration["alpha"], config.calibration["delta"]) == (0.02, 0.1)
