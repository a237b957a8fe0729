"""Policies in a batch of every kind of row, on either side of the padding, with beams, and row by row.

What each decides is its row of `tests.helpers.rows`. The matrix (`test_matrix.py`) holds it to that with
reductions and on other families.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from dyvte import VisualExit
from dyvte.policies import parse_policy
from tests.helpers.batches import QUESTIONS, VISUAL_ID, batch, llava
from tests.helpers.reference import greedy_cached, greedy_reference
from tests.helpers.rows import POLICY_ROWS
from tests.runtime.test_gates import features_by_hand


@dataclass(frozen=True)
class Batch:
    """Six rows, one without an image, one with two."""

    inputs: dict[str, Any]
    folder: Path
    ids: Sequence[str] = ("a", "b", "c", "d", "e", "f")
    has_image: Sequence[bool] = tuple(images > 0 for _, images in QUESTIONS)

    def prompt_states(self) -> torch.Tensor:
        """From the full model's hidden states, one row and layer at a time."""
        return features_by_hand(llava()[0], self.inputs)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", POLICY_ROWS)
def test_a_policy_follows_its_rule_and_the_answers_follow_from_its_exits(name, side, tmp_path):
    model, processor = llava()
    inputs = batch(processor, padding_side=side)
    subject = Batch(inputs, tmp_path)
    decided = POLICY_ROWS[name](subject)
    expected = decided.exits
    if name in ("random", "gates", "oracle"):
        assert len(set(expected)) >= 3, expected
    logits, tokens = greedy_reference(model, inputs, expected, [VISUAL_ID], 8, freezes_B=decided.freezes)
    with VisualExit.from_policy(parse_policy(decided.policy))(model) as run:
        run.sample_ids = list(subject.ids)
        got, got_tokens, _ = greedy_cached(model, inputs, [VISUAL_ID], 8)
        beams = model.generate(**inputs, max_new_tokens=2, num_beams=2, do_sample=False)
    assert run.records[0].exit_layers_B.tolist() == expected
    assert run.exit_layers.tolist() == [k for k in expected for _ in range(2)]
    assert beams.shape[0] == 6
    torch.testing.assert_close(got, logits, rtol=0, atol=1e-4)
    assert torch.equal(got_tokens, tokens)


@pytest.mark.parametrize("name", POLICY_ROWS)
def test_a_row_leaves_alone_as_it_does_in_company(name, tmp_path):
    model, processor = llava()
    inputs = batch(processor)
    subject = Batch(inputs, tmp_path)
    decided = POLICY_ROWS[name](subject)
    policy = VisualExit.from_policy(parse_policy(decided.policy))
    with policy(model) as run:
        for row in (0, 3):
            keep = inputs["attention_mask"][row].bool()
            run.sample_ids = list(subject.ids[row : row + 1])
            model(
                input_ids=inputs["input_ids"][row : row + 1, keep],
                pixel_values=inputs["pixel_values"][row : row + 1],
            )
            assert run.exit_layers.tolist() == [decided.exits[row]]
