"""Drift over forced continuations against whole passes with masks, one question at a time."""

from __future__ import annotations

import pytest
import torch

from dyvte.analysis import get_study
from dyvte.errors import ConfigError
from tests.helpers.reference import exit_by_masks, frozen_by_hooks
from tests.helpers.subjects import alone, subject_of

TOKENS = 40
SCHEDULES = {"fixed-1": (1, 1), "fixed-3": (3, 3), "freeze-1-3": (1, 3)}
"""Freeze and exit layer by name."""


def _whole_pass(model, inputs, ids_1N):
    """(N, V) logits of one pass over the whole sequence."""
    return model(
        input_ids=ids_1N,
        attention_mask=torch.ones_like(ids_1N),
        pixel_values=inputs["pixel_values"],
        use_cache=False,
    ).logits[0]


@torch.no_grad()
def _forced(model, inputs, length, banned):
    ids_1N = inputs["input_ids"]
    for _ in range(length):
        logits_V = _whole_pass(model, inputs, ids_1N)[-1].clone()
        logits_V[banned] = -torch.inf
        ids_1N = torch.cat([ids_1N, logits_V.argmax()[None, None]], 1)
    return ids_1N


@torch.no_grad()
def test_drift_is_that_of_whole_passes_with_masks(world, tmp_path):
    subject = subject_of(
        world,
        tmp_path,
        tokens=TOKENS,
        schedules=("fixed:1", "fixed:3", "freeze:1:3"),
        samples=3,
        batch_size=2,
    )
    found = get_study("drift")(subject).metrics
    model, depth = world.pipeline.model, subject.num_layers
    visual, ends = [model.config.image_token_id], [model.generation_config.eos_token_id]
    truth = {name: ([], [], []) for name in SCHEDULES}
    answer_tokens = []
    # in the order in which the study meets them
    by_id = {q.id: q for q in world.questions}
    order = [by_id[i] for batch in subject.batches() for i in batch.question_ids]
    for question in order:
        inputs = alone(world, question)
        ids_1N = _forced(model, inputs, TOKENS, visual + ends)
        start = inputs["input_ids"].shape[1]

        def said(logits_AV):
            return logits_AV.index_fill(1, torch.tensor(visual), -torch.inf).argmax(1)

        full_AV = _whole_pass(model, inputs, ids_1N)[start - 1 : -1].double()
        own = said(full_AV)
        stops = [p for p, token in enumerate(own.tolist(), start=1) if token in ends]
        answer_tokens.append(stops[0] if stops else TOKENS)
        for name, (f, k) in SCHEDULES.items():
            with exit_by_masks(model, [k], visual), frozen_by_hooks(model, [f], visual):
                one_AV = _whole_pass(model, inputs, ids_1N)[start - 1 : -1].double()
            p_AV, q_AV = full_AV.log_softmax(1), one_AV.log_softmax(1)
            differs = [n for n, same in enumerate(said(one_AV) == own, start=1) if not same]
            kls, first, same_answer = truth[name]
            kls.append((p_AV.exp() * (p_AV - q_AV)).sum(1))
            first.append(differs[0] if differs else None)
            same_answer.append(not differs or differs[0] > answer_tokens[-1])
    assert found["answer_tokens"] == answer_tokens
    for name, (kls, first, same_answer) in truth.items():
        one = found["schedules"][name]
        torch.testing.assert_close(
            torch.tensor(one["kl"], dtype=torch.float64), torch.stack(kls).mean(0), atol=1e-5, rtol=1e-3
        )
        assert one["first_differing"] == first
        assert one["same_answer"] == sum(same_answer) / len(same_answer)
        assert one["exit_layers"] == [SCHEDULES[name][1]] * len(order)
    assert depth > 3
    assert any(p is not None for _, first, _ in truth.values() for p in first)


def test_table_has_the_stretches_that_there_are(world, tmp_path):
    found = get_study("drift")(subject_of(world, tmp_path, tokens=10, samples=2))
    header = list(found.table.header)
    assert header[3:6] == ["KL 1", "KL 2-8", "KL 9-10"]
    assert header[6:8] == ["same through 8", "same through 10"]
    assert [row[0] for row in found.table.rows] == ["fixed-2", "freeze-1-2"]


def test_what_cannot_be_served_is_named_and_no_length_is_refused(world, tmp_path):
    found = get_study("drift")(
        subject_of(world, tmp_path, tokens=4, samples=1, schedules=("fixed:2", "fixed:99"))
    )
    assert len(found.table.rows) == 1
    assert "fixed-99" in found.notes[0]
    with pytest.raises(ConfigError, match="tokens must be at least 1"):
        subject_of(world, tmp_path, tokens=0)
