"""Groups that take turns on one model: each gives what one call of the greedy generation gives it alone."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from dyvte.backbones import describe, generate_greedily
from dyvte.backbones.sizes import decoder_shape
from dyvte.evaluation.generation import Batch
from dyvte.policies import FixedPolicy, NeverPolicy, OraclePolicy
from dyvte.runtime import VisualExit
from dyvte.runtime.cache import layer_bytes
from dyvte.serving.answerer import Answerer
from dyvte.serving.asking import Collected
from dyvte.serving.groups import RowGroup
from dyvte.serving.jobs import Decoding, Job
from dyvte.serving.schedules import ServedSchedule
from tests.helpers.families import FAMILIES, build, one_row

LENGTHS = (3, 9, 6)
EXITS = (1, 4, 3)  # the second row has no image
# The quick ones: text that counts on behind the image's own positions is kept on the model between passes.
QUICK = ("llava", "qwen2_vl")


class Given(Answerer):
    """Prompts that are encoded already."""

    def encode(self, jobs):
        inputs = self.menu
        rows = [f"row{at}" for at in range(len(inputs["input_ids"]))]
        return Batch(0, tuple(rows), dict(inputs), inputs["attention_mask"].sum(1))


def group_of(model, inputs, exits, lengths):
    """A group of one job for each row, and where its answers are collected."""
    words = SimpleNamespace(decode=lambda tokens, skip_special_tokens: " ".join(map(str, tokens)))
    answerer = Given(
        pipeline=SimpleNamespace(
            model=model, processor=SimpleNamespace(tokenizer=words), max_new_tokens=9, device=model.device
        ),
        menu=inputs,
        reductions=(),
        backbone=describe(model),
        shape=decoder_shape(model.config),
        context=None,
        ends=frozenset(),
    )
    collected = [Collected() for _ in exits]
    jobs = [
        Job(
            id=f"row{at}",
            prompt=None,
            images=[],
            schedule=ServedSchedule(NeverPolicy() if k == 4 else FixedPolicy(k), str(k)),
            decoding=Decoding(max_tokens=length),
            emit=collected[at].add,
        )
        for at, (k, length) in enumerate(zip(exits, lengths, strict=True))
    ]
    return RowGroup(answerer, jobs), collected


def at_once(model, inputs, exits, lengths):
    """One call of the greedy generation; nothing ends it but length."""
    with VisualExit.from_policy(OraclePolicy(list(exits)))(model):
        ids = generate_greedily(model, inputs, max(lengths), eos_token_id=None)
    new = ids[:, inputs["input_ids"].shape[1] :].tolist()
    return [" ".join(map(str, row[:length])) for row, length in zip(new, lengths)]


@pytest.mark.parametrize(
    "family", [pytest.param(name, marks=[] if name in QUICK else [pytest.mark.full]) for name in FAMILIES]
)
@torch.inference_mode()
def test_two_groups_in_turns(family, monkeypatch):
    model, inputs, _ = build(family, "sdpa")
    monkeypatch.setattr(model.generation_config, "eos_token_id", None)
    single = one_row(family, inputs, 0)
    expected = at_once(model, inputs, EXITS, LENGTHS), at_once(model, single, EXITS[:1], (7,))
    first, of_first = group_of(model, inputs, EXITS, LENGTHS)
    second, of_second = group_of(model, single, EXITS[:1], (7,))
    turns = 0
    while not (first.is_over and second.is_over):
        first.go_on(lambda count: count >= 2)
        second.go_on(lambda count: True)
        turns += 1
    assert turns >= 4
    assert [one.answer().texts[0] for one in of_first] == expected[0]
    assert [one.answer().texts[0] for one in of_second] == expected[1]


@torch.inference_mode()
def test_rows_that_have_ended_give_back_their_memory(monkeypatch):
    model, inputs, _ = build("llava", "sdpa")
    monkeypatch.setattr(model.generation_config, "eos_token_id", None)
    group, collected = group_of(model, inputs, (1, 4, 3), (2, 2, 9))
    group.go_on(lambda count: True)
    before = [layer_bytes(layer) for layer in group._cache.layers]
    group.go_on()  # two of the three end
    assert group.live_rows == 1
    alone, _ = group_of(model, one_row("llava", inputs, 2), (3,), (9,))
    alone.go_on(lambda count: count >= 2)
    for at, (layer, own) in enumerate(zip(group._cache.layers, alone._cache.layers, strict=True)):
        if at > 0:  # rows of different length lie in one buffer behind the first exit
            assert layer_bytes(layer) == layer_bytes(own)
        assert layer_bytes(layer) < before[at]
    group.go_on()
    expected = at_once(model, one_row("llava", inputs, 2), (3,), (9,))
    assert collected[2].answer().texts[0] == expected[0]
