"""The matrix of policies: each one, by its command line form, against the rule it is said to follow.

A policy without a row here fails the first test.
"""

import hashlib
import json
import math

import pytest
import torch

from dyvte import VisualExit
from dyvte.policies import POLICIES, parse_policy
from tests.helpers.batches import QUESTIONS, VISUAL_ID, batch, llava
from tests.helpers.reference import greedy_cached, greedy_reference
from tests.runtime.test_gates import features_by_hand, make_gates

LAYERS = 4
IDS = ["a", "b", "c", "d", "e", "f"]
GIVEN = dict(zip(IDS, [3, 0, 4, 1, -1, 2], strict=True))
THRESHOLD = 0.75


def first_gate_above(model, inputs, folder):
    """The gates' decisions from the full model's states; their folder is written on the way."""
    features = features_by_hand(model, inputs)
    medians = make_gates(2)(features)[[0, 1, 2, 3, 5]].median(0).values
    gates = make_gates(2, offsets=tuple((1.0 - medians).tolist()))
    gates.save_pretrained(folder)
    cut = math.log(THRESHOLD / (1 - THRESHOLD))
    return [next((k for k in range(1, LAYERS) if row[k - 1] > cut), LAYERS) for row in gates(features)]


def drawn(seed, low, high, sample_id):
    """The published draw: the first eight bytes of a SHA-256, modulo the range."""
    digest = hashlib.sha256(f"{seed}\0{sample_id}".encode()).hexdigest()
    return low + int(digest[:16], 16) % (high - low + 1)


# name -> (model, inputs, folder) -> command line form, exit layer of each row that has an image, and where it
# is another its freeze layer
MATRIX = {
    "never": lambda *_: ("never", [LAYERS] * 6),
    "fixed": lambda *_: ("fixed:2", [2] * 6),
    "freeze": lambda *_: ("freeze:1:3", [3] * 6, [1] * 6),
    "random": lambda *_: ("random:1-3:7", [drawn(7, 1, 3, i) for i in IDS]),
    "gates": lambda model, inputs, folder: (
        f"gates:{folder}@{THRESHOLD}",
        first_gate_above(model, inputs, folder),
    ),
    "oracle": lambda model, inputs, folder: (
        f"oracle:{write(folder.with_suffix('.json'), GIVEN)}",
        list(GIVEN.values()),
    ),
}


def write(path, content):
    path.write_text(json.dumps(content))
    return path


def test_every_policy_has_its_row():
    assert sorted(MATRIX) == sorted(POLICIES)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", MATRIX)
def test_a_policy_follows_its_rule_and_the_answers_follow_from_its_exits(name, side, tmp_path):
    model, processor = llava()
    inputs = batch(processor, padding_side=side)
    text, exits, *freezes = MATRIX[name](model, inputs, tmp_path / "policy")
    expected = [k if images else -1 for k, (_, images) in zip(exits, QUESTIONS, strict=True)]
    if name in ("random", "gates", "oracle"):
        assert len(set(expected)) >= 3, expected
    logits, tokens = greedy_reference(
        model, inputs, expected, [VISUAL_ID], 8, freezes_B=freezes[0] if freezes else None
    )
    with VisualExit.from_policy(parse_policy(text))(model) as run:
        run.sample_ids = IDS
        got, got_tokens, _ = greedy_cached(model, inputs, [VISUAL_ID], 8)
        beams = model.generate(**inputs, max_new_tokens=2, num_beams=2, do_sample=False)
    assert run.records[0].exit_layers_B.tolist() == expected
    assert run.exit_layers.tolist() == [k for k in expected for _ in range(2)]
    assert beams.shape[0] == 6
    torch.testing.assert_close(got, logits, rtol=0, atol=1e-4)
    assert torch.equal(got_tokens, tokens)


@pytest.mark.parametrize("name", MATRIX)
def test_a_row_leaves_alone_as_it_does_in_company(name, tmp_path):
    model, processor = llava()
    inputs = batch(processor)
    text, exits, *_ = MATRIX[name](model, inputs, tmp_path / "policy")
    policy = VisualExit.from_policy(parse_policy(text))
    with policy(model) as run:
        for row in (0, 3):
            keep = inputs["attention_mask"][row].bool()
            run.sample_ids = IDS[row : row + 1]
            model(
                input_ids=inputs["input_ids"][row : row + 1, keep],
                pixel_values=inputs["pixel_values"][row : row + 1],
            )
            assert run.exit_layers.tolist() == [exits[row]]
