"""Token spans, against hand-written masks."""

import pytest
import torch

from dyvte.spans import find_spans

IMAGE = 9
# left-padded row with one image; a row with two images and text between; a text-only row with right padding
IDS = torch.tensor(
    [
        [0, 1, 9, 9, 4, 5, 6, 2],
        [1, 9, 7, 9, 9, 4, 5, 2],
        [1, 4, 5, 6, 7, 2, 0, 9],
    ]
)
VALID = torch.tensor([[0, 1, 1, 1, 1, 1, 1, 1], [1] * 8, [1, 1, 1, 1, 1, 1, 0, 0]])
ANSWER = torch.tensor([[0, 0, 0, 0, 0, 0, 1, 1], [0, 0, 0, 0, 0, 0, 0, 1], [0, 0, 0, 0, 1, 1, 0, 0]])


def rows(text):
    return torch.tensor([[c == "x" for c in line] for line in text.split()])


def test_every_span_of_padded_rows():
    spans = find_spans(IDS, (IMAGE,), VALID, ANSWER)
    assert torch.equal(spans.valid_BN, VALID.bool())
    assert torch.equal(spans.visual_BN, rows("..xx.... .x.xx... ........"))
    assert torch.equal(spans.prefix_BN, rows(".x...... x....... ........"))
    assert torch.equal(spans.prompt_BN, rows("....xx.. .....xx. xxxx...."))
    assert torch.equal(spans.answer_BN, ANSWER.bool())


def test_without_masks_everything_is_valid_and_prompt_runs_to_the_end():
    spans = find_spans(IDS[1:2], (IMAGE,))
    assert spans.valid_BN.all()
    assert torch.equal(spans.prompt_BN, rows(".....xxx"))
    assert not spans.answer_BN.any()


def test_padding_that_looks_like_an_image_is_none():
    assert not find_spans(IDS, (IMAGE,), VALID).visual_BN[2].any()


def test_several_placeholder_ids():
    assert torch.equal(find_spans(IDS, (IMAGE, 7)).visual_BN[1], rows(".xxxx...")[0])


def test_a_mask_of_another_shape_is_refused():
    with pytest.raises(ValueError, match=r"attention_mask has shape \(3, 7\).*\(3, 8\)"):
        find_spans(IDS, (IMAGE,), VALID[:, :7])
    with pytest.raises(ValueError, match="answer_mask"):
        find_spans(IDS, (IMAGE,), VALID, ANSWER[:2])
