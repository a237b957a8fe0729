"""Stored images that all rows read at once: the same as with a copy for each row."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

import dyvte
from dyvte.runtime import shared_groups
from dyvte.runtime.shared_reading import Read, own_mask
from tests.helpers.batches import llava
from tests.helpers.exits import oracle
from tests.helpers.questions import asked

IMAGES = (1, 1, 2, 1, 2, 1, 2, 2, None)
SCHEDULES = [
    ([4, 4, 4, 4, 4, 4, 4, 4, -1], None),
    ([0, 1, 2, 4, 3, 1, 2, 4, -1], None),
    ([4, 4, 4, 4, 4, 3, 3, 3, -1], [2, 2, 2, 2, 2, 1, 1, 1, -1]),
]


@pytest.fixture
def apart(monkeypatch):
    """How often a layer read images without copying them."""
    calls = []
    read = shared_groups.reading_apart
    monkeypatch.setattr(shared_groups, "reading_apart", lambda *args: calls.append(args[0]) or read(*args))
    return calls


def logits_of(model, inputs, schedule):
    with torch.no_grad(), oracle(*schedule)(model, images=dyvte.ImageStore()):
        return model(**inputs, use_cache=False).logits[inputs["attention_mask"].bool()]


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_all_rows_at_once_read_what_each_reads_of_its_copy(schedule, dtype, apart, monkeypatch):
    model, processor = llava("sdpa")
    model = copy.deepcopy(model).to(dtype)
    inputs = asked(processor, IMAGES, padding_side="right")
    inputs["pixel_values"] = inputs["pixel_values"].to(dtype)
    found = logits_of(model, inputs, schedule)
    assert apart
    taken = len(apart)
    monkeypatch.setattr(shared_groups, "may_read_apart", lambda *_: False)
    copied = logits_of(model, inputs, schedule)
    assert len(apart) == taken
    close = {torch.float32: 1e-5, torch.bfloat16: 0.1}[dtype]
    torch.testing.assert_close(found, copied, atol=close, rtol=close)


def test_few_rows_and_other_kernels_copy(apart):
    model, processor = llava("sdpa")
    two = asked(processor, (1, 2), padding_side="right")
    logits_of(model, two, ([4, 4], None))  # an image for each row: nothing to gain
    with sdpa_kernel(SDPBackend.MATH):
        many = asked(processor, IMAGES, padding_side="right")
        logits_of(model, many, SCHEDULES[0])
    eager, processor = llava("eager")
    logits_of(eager, asked(processor, IMAGES, padding_side="right"), SCHEDULES[0])
    assert not apart


def test_what_the_parts_do_not_hold_is_left_to_the_layers_own_attention(monkeypatch):
    """An option that the parts know nothing of: the keys and values are copied after all."""
    model, processor = llava("sdpa")
    inputs = asked(processor, IMAGES, padding_side="right")
    expected = logits_of(model, inputs, SCHEDULES[0])
    monkeypatch.setattr("dyvte.runtime.shared_reading._HARMLESS", frozenset())
    monkeypatch.setattr("dyvte.runtime.shared_reading._FLASH", lambda *_: pytest.fail("read apart"))
    torch.testing.assert_close(logits_of(model, inputs, SCHEDULES[0]), expected, atol=1e-5, rtol=1e-5)


def test_a_borrowed_token_that_is_hidden_ends_it():
    seen = torch.ones(2, 1, 3, 7).tril(4).bool()
    real_RT = torch.tensor([[True, True, True], [True, True, False]])
    own = own_mask(seen, [Read(slice(0, 2), 0, 4)], real_RT)
    ninf = -math.inf
    assert own[0, 0].tolist() == [[0, ninf, ninf], [0, 0, ninf], [0, 0, 0]]
    assert own[1, 0, 2].tolist() == [0, 0, 0]  # padding
    window = seen.clone()
    window[0, 0, 2, 0] = False
    assert own_mask(window, [Read(slice(0, 2), 0, 4)], real_RT) is None
    assert own_mask(window, [Read(slice(0, 2), 1, 3)], real_RT) is not None
    by_head = seen.expand(2, 4, 3, 7)
    assert own_mask(by_head, [Read(slice(0, 2), 0, 4)], real_RT) is None
