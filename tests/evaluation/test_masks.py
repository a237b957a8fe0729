"""Masks in answers: with exits and freezes they are those of brute force, as far as the scores."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import SamModel

import dyvte
from dyvte.backbones import BackboneConfig, get_template
from dyvte.backbones.greedy import generate_greedily
from dyvte.backbones.segmenter import Segmenter, token_states
from dyvte.errors import ConfigError
from dyvte.evaluation.generation import Pipeline, answer, encode_questions
from dyvte.evaluation.masks import masks_of
from dyvte.evaluation.runner import EvalConfig, run_policies
from dyvte.evaluation.settings import parse_policies, with_reductions
from dyvte.tasks.answers.masks import find_mask
from dyvte.tasks.base import get_benchmark
from dyvte.tasks.reasonseg import true_mask
from tests.backbones.test_lisa import sam_config
from tests.helpers.models import tiny_llava
from tests.helpers.passes import separate_pass

NEW = 5
QUERIES = ("what color is the circle ?", "where ?", "is there a red square in the image ?", "how many ?")


@pytest.fixture(scope="module")
def pipeline():
    model, processor = tiny_llava()
    model.generation_config.eos_token_id = None
    with torch.random.fork_rng():
        torch.manual_seed(1)
        head = Segmenter(SamModel(sam_config()), 32, None)
        for parameter in head.parameters():
            parameter.data.normal_(std=0.3)
    head.requires_grad_(False).eval()
    return Pipeline(model, processor, get_template("auto", processor), NEW, segmenter=head)


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("reasonseg")
    rng = np.random.default_rng(0)
    for n, text in enumerate(QUERIES):
        pixels = rng.integers(0, 255, (20 + n, 28, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(root / f"{n}.png")
        shapes = [{"label": "target", "points": [[2, 2], [20, 3], [11, 17]]}]
        (root / f"{n}.json").write_text(json.dumps({"text": [text], "is_sentence": n > 1, "shapes": shapes}))
    return root


@torch.no_grad()
def by_brute_force(model, inputs, f, k):
    """New tokens and the states they are chosen from: whole forwards without a cache, with hooks that hide
    and hold visual tokens."""
    inputs = dict(inputs)
    visual = model.config.image_token_id
    tokens, states = [], []
    for _ in range(NEW):
        logits, layers = separate_pass(model, inputs, f, k)
        states.append(model.model.language_model.norm(layers[-1])[:, -1])
        logits[..., visual] = -torch.inf
        tokens.append(logits[:, -1].argmax(-1))
        inputs["input_ids"] = torch.cat([inputs["input_ids"], tokens[-1][:, None]], 1)
        inputs["attention_mask"] = torch.cat(
            [inputs["attention_mask"], torch.ones_like(tokens[-1])[:, None]], 1
        )
    return torch.stack(tokens, 1), states


@pytest.mark.parametrize(("f", "k"), [(4, 4), (2, 2), (0, 0), (1, 3), (0, 4)])
def test_masks_under_exits_and_freezes_are_those_of_brute_force(pipeline, root, f, k):
    model, head = pipeline.model, pipeline.segmenter
    questions = get_benchmark("reasonseg").load(root)
    batch = encode_questions(pipeline, questions, [q.text for q in questions])
    expected, expected_states = by_brute_force(model, batch.inputs, f, k)
    exits = dyvte.VisualExit.fixed(k, freeze_layer=f)
    with exits(model) as run, token_states(model) as states:
        tokens = generate_greedily(model, batch.inputs, NEW)[:, -NEW:]
    assert run.exit_layers.tolist() == [k] * 4
    assert torch.equal(tokens, expected)
    images = [row[0] for row in batch.images]
    with torch.no_grad():
        embeddings = head.embed(images)
        for one, other in zip(states, expected_states, strict=True):
            torch.testing.assert_close(one, other, atol=1e-4, rtol=0)
            torch.testing.assert_close(head(one, embeddings), head(other, embeddings), atol=1e-4, rtol=1e-4)
    # a token that some answers hold, as [SEG], at another place in each
    asked = int(expected[0, 2])
    with_token = Segmenter(head.sam, 32, asked)
    with_token.text_hidden_fcs = head.text_hidden_fcs
    found = answer(replace(pipeline, segmenter=with_token), batch, exits)
    rows = expected.tolist()
    for row, one in enumerate(found):
        mask = find_mask(one.prediction)
        assert (mask is not None) == (asked in rows[row])
        if mask is not None:
            state = expected_states[rows[row].index(asked)][row : row + 1]
            assert (mask == head.masks(state, [images[row]])[0]).all()


def test_exits_change_masks_through_the_state_alone(pipeline, root):
    """Otherwise the tests above would say nothing."""
    questions = get_benchmark("reasonseg").load(root)
    batch = encode_questions(pipeline, questions, [q.text for q in questions])
    full, early = (
        [find_mask(one.prediction) for one in answer(pipeline, batch, dyvte.VisualExit.fixed(k))]
        for k in (4, 1)
    )
    assert any((a != b).any() for a, b in zip(full, early, strict=True))


def config_of(root, output, **changes):
    return EvalConfig(
        **{
            "model": BackboneConfig(path="tiny"),
            "benchmark": "reasonseg",
            "data": root,
            "output": output,
            "question_suffix": "",
            "batch_size": 3,
            "max_new_tokens": NEW,
            "timing_batches": 0,
            **changes,
        }
    )


def test_eval_scores_the_masks_that_it_wrote(pipeline, root, tmp_path):
    benchmark = get_benchmark("reasonseg")
    questions = benchmark.load(root)
    config = config_of(root, tmp_path / "out")
    policies = with_reductions(parse_policies(("never", "fixed:1"), 0), ("none",))
    results = run_policies(pipeline, benchmark, questions, policies, config)
    for result, k in zip(results, (4, 1), strict=True):
        predictions = benchmark.read_predictions(result.folder / "predictions.jsonl", questions)
        batch = encode_questions(pipeline, questions, [q.text for q in questions])
        with dyvte.VisualExit.fixed(k)(pipeline.model), token_states(pipeline.model) as states:
            tokens = generate_greedily(pipeline.model, batch.inputs, NEW)[:, -NEW:]
        masks = masks_of(pipeline.segmenter, pipeline.model, batch.images, tokens, states)
        overlaps = []
        for question, mask in zip(questions, masks, strict=True):
            assert (find_mask(predictions.texts[question.id]) == mask).all()
            truth = true_mask(question) == 1
            overlaps.append((truth & mask).sum() / ((truth | mask).sum() + 1e-5))
        assert result.scores.scores["giou"] == pytest.approx(100 * np.mean(overlaps))
        submitted = benchmark.read_predictions(result.folder / benchmark.submission_name, questions)
        again = benchmark.score(questions, submitted)
        assert again["ciou"] == result.scores.scores["ciou"]


def test_without_a_head_nothing_is_asked(pipeline, root, tmp_path):
    benchmark = get_benchmark("reasonseg")
    policies = with_reductions(parse_policies(("never",), 0), ("none",))
    config = config_of(root, tmp_path / "out", mask_head=str(tmp_path / "nowhere"))
    with pytest.raises(ConfigError, match="nowhere is no mask head"):
        run_policies(replace(pipeline, segmenter=None), benchmark, benchmark.load(root), policies, config)
