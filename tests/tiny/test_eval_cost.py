"""The cost model against torch's own FLOP counter on a model that really runs."""

from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from dyvte.backbones import get_template
from dyvte.evaluation.asking import Asker, answer, encode_questions
from dyvte.evaluation.base import Question
from dyvte.evaluation.cost import decoder_shape, layer_flops, score_row_flops
from dyvte.evaluation.policies import parse_policies, with_reductions
from dyvte.evaluation.records import unpack_layers

from .models import random_image, tiny_llava

LAYERS = 4


@pytest.fixture(scope="module")
def asker():
    model, processor = tiny_llava(LAYERS, attn_implementation="eager")
    return Asker(model, processor, get_template("chat", processor), max_new_tokens=1)


@pytest.fixture(scope="module")
def batch(asker, tmp_path_factory):
    path = tmp_path_factory.mktemp("images") / "0.png"
    random_image(0).save(path)
    text = "what color is the circle ?"
    question = Question(id="a", image=path, text=text, answer="red", image_id="0", kind="")
    return encode_questions(asker, [question], [text])


def _measure(asker, batch, policy: str, reduction: str):
    """Counted FLOPs of the whole forward, and the answer that says what each layer processed."""
    named = with_reductions(parse_policies([policy]), [reduction])[0]
    with FlopCounterMode(display=False) as counter, torch.inference_mode(False):
        given = answer(asker, batch, named.exits())
    return counter.get_total_flops(), given[0]


@pytest.mark.parametrize(
    ("policy", "reduction"),
    [
        ("fixed:2", "none"),
        ("fixed:0", "none"),
        ("never", "fastv:1:0.5"),
        ("fixed:3", "fastv:2:0.25"),
        ("never", "random_tokens:2:1"),
    ],
)
def test_what_is_saved_is_what_torch_counts_less(asker, batch, policy, reduction):
    """Vision tower, head and rotary angles stay the same, so the difference is that of the layers."""
    full_flops, full = _measure(asker, batch, "never", "none")
    flops, given = _measure(asker, batch, policy, reduction)
    shape = decoder_shape(asker.model.config)
    layers = [(unpack_layers(one.text_tokens), unpack_layers(one.visual_tokens)) for one in (full, given)]
    costs = [float(layer_flops(shape, [text_L], [visual_L]).sum()) for text_L, visual_L in layers]
    tokens_L = [sum(pair) for pair in zip(*layers[1], strict=True)]
    score_row = score_row_flops(shape, [tokens_L], [given.score_layers])[0]
    assert full_flops - flops == costs[0] - costs[1] - score_row
    assert (score_row > 0) == ("fastv" in reduction)
    assert costs[1] < costs[0]
