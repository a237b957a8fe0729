"""What is watched while the model answers, against the stock model's own attentions."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from dyvte.analysis import Subject, get_study
from dyvte.analysis.distance import Distances
from dyvte.analysis.last_token import LastToken
from dyvte.analysis.stages import Flows, stage_ends
from dyvte.analysis.watching import KINDS, watch
from tests.helpers.families import build, one_row
from tests.helpers.subjects import LAYERS, NEW, SIDE, VISUAL, greedy
from tests.helpers.subjects import alone as _alone
from tests.helpers.subjects import subject_of as _subject


def _parts(world, inputs):
    """Columns of the prompt before, on and behind the image."""
    is_visual = inputs["input_ids"][0] == world.pipeline.model.config.image_token_id
    first, last = (edge(is_visual.nonzero().flatten().tolist()) for edge in (min, max))
    return slice(0, first), slice(first, last + 1), slice(last + 1, len(is_visual))


def _steps(world, question):
    """Per output token, per layer: attention of the predicting token to the four kinds, step by step."""
    inputs = _alone(world, question)
    made = greedy(world.eager, inputs, return_dict_in_generate=True, output_attentions=True)
    parts = _parts(world, inputs)
    prompt = inputs["input_ids"].shape[1]
    rows = []
    for step in made.attentions:
        row = []
        for weights in step:
            last = weights[0, :, -1].mean(0)
            row.append([*(float(last[part].sum()) for part in parts), float(last[prompt:].sum())])
        rows.append(row)
    return torch.tensor(rows, dtype=torch.float64)  # outputs, layers, kinds


def test_last_token_attention_is_what_generation_shows_step_by_step(world, tmp_path):
    subject = _subject(world, tmp_path)
    found = get_study("last_token")(subject).metrics
    steps = [_steps(world, question) for question in subject.sampled]
    longest = max(map(len, steps))
    assert len({len(one) for one in steps}) > 1 or longest == NEW
    by_output = [torch.stack([one[t] for one in steps if len(one) > t]).mean(0) for t in range(longest)]
    assert found["questions_with_output_token"] == [sum(len(s) > t for s in steps) for t in range(longest)]
    torch.testing.assert_close(
        torch.tensor(found["all"], dtype=torch.float64), torch.stack(by_output, 1), atol=2e-6, rtol=0
    )
    every = torch.cat(steps)
    torch.testing.assert_close(
        torch.tensor(found["per_layer"], dtype=torch.float64), every.mean(0), atol=2e-6, rtol=0
    )
    assert found["kinds"] == list(KINDS)
    assert found["tokens_per_question"][1] == VISUAL


def _stock_attention(world, question):
    """(L, H, N, N) and the columns of the three parts of a prompt."""
    inputs = _alone(world, question)
    output = world.eager(**inputs, output_attentions=True)
    return torch.cat(output.attentions).double(), _parts(world, inputs)


def test_attention_over_distance_on_a_four_by_four_grid(world, tmp_path):
    subject = _subject(world, tmp_path)
    found = get_study("distance")(subject).metrics
    sums, pairs = torch.zeros(LAYERS, SIDE, dtype=torch.float64), torch.zeros(SIDE)
    for question in subject.sampled:
        weights, (_, visual, _) = _stock_attention(world, question)
        among = weights.mean(1)[:, visual, visual]
        for query in range(VISUAL):
            for key in range(query + 1):
                apart = max(abs(query // SIDE - key // SIDE), abs(query % SIDE - key % SIDE))
                sums[:, apart] += among[:, query, key]
                pairs[apart] += 1
    assert found["pairs"] == pairs.tolist()
    torch.testing.assert_close(
        torch.tensor(found["mean_weight"], dtype=torch.float64), sums / pairs, atol=1e-6, rtol=0
    )
    within = sums.cumsum(1) / sums.sum(1, keepdim=True)
    torch.testing.assert_close(
        torch.tensor(found["share_within"], dtype=torch.float64), within, atol=1e-6, rtol=0
    )


def test_text_to_vision_and_rho_are_the_stock_models(world, tmp_path):
    subject = _subject(world, tmp_path)
    by_id = {one["question_id"]: one for one in get_study("text_to_vision")(subject).metrics["questions"]}
    rho = torch.tensor(get_study("head_rho")(subject).metrics["rho"], dtype=torch.float64)
    expected_rho = torch.zeros_like(rho)
    for question in subject.sampled:
        weights, (system, visual, instruction) = _stock_attention(world, question)
        lines = weights.mean(1)[:, instruction, visual].mean(-1)
        found = by_id[question.id]
        torch.testing.assert_close(
            torch.tensor(found["mean_weight"], dtype=torch.float64), lines, atol=1e-6, rtol=0
        )
        assert found["tokens"][-1] == "assistant"
        assert found["visual_tokens"] == VISUAL
        to_text = weights[..., system].sum((2, 3)) + weights[..., instruction].sum((2, 3))
        expected_rho += weights[..., visual].sum((2, 3)) / to_text / len(subject.sampled)
    torch.testing.assert_close(rho, expected_rho, atol=0, rtol=1e-4)


def test_flows_between_text_and_image(world, tmp_path):
    subject = _subject(world, tmp_path)
    flows = Flows(LAYERS)
    watch(subject, flows.see)
    from_text, from_image = [], []
    for question in subject.sampled:
        weights, (_, visual, instruction) = _stock_attention(world, question)
        mean = weights.mean(1)
        to_image, to_first = mean[..., visual].sum(-1), mean[..., 0]
        to_text = 1 - to_image - to_first
        from_text.append(torch.stack([to_image, to_text, to_first], -1)[:, instruction])
        from_image.append(torch.stack([to_image, to_text], -1)[:, visual])
    expected = torch.cat([torch.cat(from_text, 1).mean(1), torch.cat(from_image, 1).mean(1)], 1)
    torch.testing.assert_close(flows.means_L5(), expected, atol=2e-6, rtol=0)


@pytest.mark.parametrize(
    ("curve", "ends"),
    [
        ([0.9, 0.8, 0.1, 0.1, 0.6, 0.7], (2, 5)),
        ([0.9, 0.1, 0.1, 0.2], (1, None)),
        ([0.1, 0.9, 0.5], (None, None)),
        ([0.5, 0.5, 0.5], (None, None)),
    ],
)
def test_ends_of_the_stages(curve, ends):
    assert stage_ends(curve) == ends


class _Given(Subject):
    """One batch of given inputs."""

    def batches(self, questions=None):
        yield SimpleNamespace(inputs=self._memory["inputs"], question_ids=("0",))


@pytest.mark.parametrize(
    "family",
    [
        "qwen2_5_vl",
        "gemma3",
        *(
            pytest.param(name, marks=pytest.mark.full)
            for name in ("llava", "llava_next", "internvl", "idefics3", "mistral3", "qwen2_vl", "qwen3_vl")
        ),
        pytest.param("paligemma", marks=pytest.mark.full),
        pytest.param("llava_onevision", marks=pytest.mark.full),
    ],
)
def test_any_family_is_watched(family):
    """The layers that the studies see are those that the eager model reports, in every family."""
    model, inputs, ids = build(family, "sdpa")
    eager, _, _ = build(family, "eager")
    alone = one_row(family, inputs, 0)
    pipeline = SimpleNamespace(model=model)
    subject = _Given(SimpleNamespace(), pipeline, None, [], _memory={"inputs": alone})
    expected = torch.cat(eager(**alone, output_attentions=True).attentions).mean(1)
    seen = {}
    with torch.no_grad():
        watch(subject, lambda batch, index, weights: seen.update({index: (batch, weights)}))
    assert sorted(seen) == list(range(subject.num_layers))
    got = torch.cat([seen[index][1] for index in sorted(seen)])
    torch.testing.assert_close(got, expected.float(), atol=1e-5, rtol=1e-4)
    spans = seen[0][0].spans
    assert torch.equal(spans.visual_BN, torch.isin(alone["input_ids"], torch.tensor(ids)))
    if family != "llava_onevision":  # its grid is not known
        found = Distances(subject.num_layers)
        watch(subject, found.see)
        at = spans.visual_BN[0].nonzero().flatten()
        among = got[:, at][:, :, at].double()
        same = seen[0][0].places_BN3[0, at, 0]
        among = among * (same[:, None] == same[None])
        torch.testing.assert_close(found.sums_LD.sum(1), among.sum((1, 2)), atol=1e-5, rtol=1e-4)


def test_answers_of_different_lengths_count_where_they_are(world):
    """Two rows, one with one output token and one with two, by hand."""
    sums = LastToken(1, 3)
    valid = torch.tensor([[0, 1, 1, 1, 1, 0], [1, 1, 1, 1, 1, 1]]).bool()
    answer = torch.tensor([[0, 0, 0, 0, 1, 0], [0, 0, 0, 0, 1, 1]]).bool()
    kinds = torch.zeros(2, 6, 4)
    kinds[:, 1, 0] = kinds[:, 2, 1] = kinds[:, 3, 2] = kinds[:, 4, 3] = kinds[1, 5, 3] = kinds[1, 0, 0] = 1
    mean = torch.rand(2, 6, 6)
    batch = SimpleNamespace(
        spans=SimpleNamespace(valid_BN=valid, answer_BN=answer), kinds_BN4=kinds, question_ids=("a", "b")
    )
    sums.see(batch, 0, mean)
    first = [(mean[row, 3] @ kinds[row]) for row in (0, 1)]
    expected = torch.stack([(first[0] + first[1]) / 2, mean[1, 4] @ kinds[1]])
    torch.testing.assert_close(sums.means_LT4()[0].float(), expected)
    assert sums.counts_T.tolist() == [2, 1, 0]
