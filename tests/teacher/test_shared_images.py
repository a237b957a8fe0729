"""One visual stream for all questions about an image: the same traces, with the image computed once."""

from __future__ import annotations

from contextlib import contextmanager

import pytest
import torch

from dyvte.backbones import describe, encode, get_template
from dyvte.gates import FEATURES
from dyvte.teacher import trace_exits
from dyvte.teacher.exits import trace_checked
from tests.helpers.families import FAMILIES
from tests.helpers.models import random_image, tiny_llava
from tests.helpers.passes import about_images, close, padded

QUESTIONS = ["what color is the circle ?", "how many ?", "is there any red square on the left of the image ?"]
FAST = {
    ("llava", "eager"),
    ("qwen3_vl", "sdpa"),
    ("gemma3", "sdpa"),
    ("paligemma", "eager"),
    ("smolvlm", "sdpa"),
}
CASES = [
    pytest.param(*case, id=" ".join(case), marks=() if case in FAST else pytest.mark.full)
    for case in ((name, attention) for name in FAMILIES for attention in ("sdpa", "eager"))
]


@contextmanager
def tokens_seen(module: torch.nn.Module):
    """How many tokens (or images) each call of a module was given."""
    seen: list[int] = []
    handle = module.register_forward_pre_hook(
        lambda _, args, kwargs: seen.append(len(next(iter((*args, *kwargs.values()))))), with_kwargs=True
    )
    try:
        yield seen
    finally:
        handle.remove()


@pytest.mark.parametrize(("name", "attention"), CASES)
@pytest.mark.parametrize("side", ["left", "right"])
def test_shared_traces_are_those_of_separate_rows(name: str, attention: str, side: str) -> None:
    (model, inputs, _), answer, images = about_images(name, attention)
    inputs = padded({**inputs, "answer": answer}, side)
    answer = inputs.pop("answer").bool()
    how = {"freezes": (0, 2), "exits": None}
    separate = trace_checked(model, inputs, answer, share_images=False, **how)
    shared = trace_checked(model, inputs, answer, **how)
    assert (separate.trace.num_visual > 0).tolist() == [image >= 0 for image in images]
    assert separate.num_images == 5
    close(shared.trace, separate.trace)
    assert torch.equal(shared.is_greedy_B, separate.is_greedy_B)
    if name == "paligemma":
        assert shared.num_images == 5
        assert shared.not_shared == "paligemma: its image tokens see the text behind them"
    else:
        assert (shared.num_images, shared.not_shared) == (2, None)
    every = {"freezes": (1,), "exits": (0, 3), "features": FEATURES, "exits_per_chunk": 1}
    close(
        trace_exits(model, inputs, answer, **every),
        trace_exits(model, inputs, answer, share_images=False, **every),
    )


# --- which rows share ---


@pytest.fixture(scope="module")
def llava():
    return tiny_llava(layers=3)


def batch_of(processor, images, questions=QUESTIONS, answers=("red", "two and three objects", "no")):
    template = get_template("auto", processor)
    rendered = [template.render(question, answers[i % len(answers)]) for i, question in enumerate(questions)]
    return encode(processor, rendered, [[image] for image in images], padding_side="left")


def traced(llava, images, questions=QUESTIONS):
    model, processor = llava
    inputs, answer = batch_of(processor, images, questions)
    shared = trace_checked(model, inputs, answer)
    close(shared.trace, trace_exits(model, inputs, answer, share_images=False))
    return shared


def test_equal_pictures_share_and_a_changed_pixel_does_not(llava) -> None:
    image = random_image(0)
    other = image.copy()
    assert traced(llava, [image, other, image]).num_images == 1
    red, green, blue = other.getpixel((3, 3))
    other.putpixel((3, 3), ((red + 128) % 256, green, blue))
    found = traced(llava, [image, other, image])
    assert (found.num_images, found.not_shared) == (2, None)
    assert traced(llava, [random_image(row) for row in range(3)]).num_images == 3


def test_an_image_behind_the_question_is_not_shared(llava) -> None:
    model, processor = llava
    inputs, answer = batch_of(processor, [random_image(0)] * 3)
    ids, visual = inputs["input_ids"], inputs["input_ids"] == model.config.image_token_id
    moved = []
    for row in range(3):
        # One word of the question before the image: text that differs.
        first = int(visual[row].nonzero()[0])
        last = int(visual[row].nonzero()[-1])
        order = list(range(ids.shape[1]))
        order.insert(first, order.pop(last + 1 + row))
        moved.append(ids[row, order])
    inputs["input_ids"] = torch.stack(moved)
    found = trace_checked(model, inputs, answer)
    assert (found.num_images, found.not_shared) == (3, None)
    close(found.trace, trace_exits(model, inputs, answer, share_images=False))


def test_every_image_and_its_tokens_are_computed_once(llava) -> None:
    model, processor = llava
    images = [random_image(0), random_image(1), random_image(0), random_image(1), random_image(1)]
    inputs, answer = batch_of(processor, images, [QUESTIONS[i % 3] for i in range(5)])
    backbone = describe(model)
    with tokens_seen(model.model.vision_tower) as seen:
        assert trace_checked(model, inputs, answer).num_images == 2
    assert seen == [2]
    with tokens_seen(backbone.layers[1].mlp) as seen:
        trace_exits(model, inputs, answer)
    assert seen[0] == 2  # rows of the first call: the images
    assert not any("get_image_features" in vars(module) for module in model.modules())


def test_rows_of_any_length_get_what_they_get_alone(llava) -> None:
    model, processor = llava
    questions = [QUESTIONS[i % 3] + " or not" * (6 * (i % 2)) for i in range(6)]
    images, answers = [random_image(i // 3) for i in range(6)], ["red", "two and three objects", "no"]
    inputs, answer = batch_of(processor, images, questions, answers)
    together = trace_checked(model, inputs, answer, freezes=(0, 1))
    assert together.num_images == 2
    for row in range(6):
        alone = batch_of(processor, images[row : row + 1], questions[row : row + 1], answers[row % 3 :])
        found = trace_exits(model, *alone, freezes=(0, 1), sample_ids=[str(row)])
        close(together.trace.rows([row]), found)


def test_a_batch_without_images_is_the_full_model_everywhere(llava) -> None:
    model, processor = llava
    template = get_template("auto", processor)
    rendered = [template.render(question, "red", has_image=False) for question in QUESTIONS[:2]]
    inputs, answer = encode(processor, rendered, [[], []], padding_side="left")
    found = trace_checked(model, inputs, answer, freezes=(0, 2))
    assert (found.num_images, found.not_shared) == (0, None)
    for risk in (found.trace.risk, found.trace.grid.risk.nan_to_num()):
        torch.testing.assert_close(risk, torch.zeros_like(risk), atol=1e-5, rtol=0)
