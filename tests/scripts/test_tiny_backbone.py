"""The embedded backbone's training tricks change nothing: packed rows equal single questions."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.nn import functional as F

pytest.importorskip("sklearn")

import itertools

import dyvte
from dyvte.data.scenes.processor import build_processor
from dyvte.data.scenes.questions import ask_many
from dyvte.data.scenes.render import render
from dyvte.data.scenes.world import draw_scene
from tiny_backbone.model import build_model, pixels_to_input
from tiny_backbone.optim import schedule
from tiny_backbone.packing import GROUP, PackedAttention, install, make_batch, packed_loss, tokenize
from tiny_backbone.vision import cell_labels


@pytest.fixture(scope="module")
def processor():
    return build_processor()


def test_fast_tokenizer_and_pixels_equal_the_processor(processor):
    vocabulary = processor.tokenizer.get_vocab()
    for index in range(20):
        scene = draw_scene("train", index)
        for q in ask_many(scene, np.random.default_rng(index), 24):
            text = f"{q.text} assistant {q.answer}</s>"
            assert tokenize(text, vocabulary) == processor.tokenizer(text).input_ids
    from PIL import Image

    pixels = render(scene)
    stock = processor.image_processor(Image.fromarray(pixels), return_tensors="pt")["pixel_values"]
    torch.testing.assert_close(pixels_to_input(pixels[None]), stock, atol=1e-6, rtol=0)


@pytest.mark.parametrize("with_exits", [False, True])
def test_packed_rows_equal_single_questions(processor, with_exits):
    tokenizer = processor.tokenizer
    model = build_model(tokenizer, seed=3).eval()
    num_layers = model.config.text_config.num_hidden_layers
    batch = make_batch("train", 5, 2, 16, 2, tokenizer.get_vocab(), seed=0)
    if with_exits:
        rng = torch.Generator().manual_seed(0)
        batch.exits = [torch.randint(1, num_layers + 1, (2, GROUP), generator=rng) for _ in batch.tokens]
    prefix = torch.tensor([[tokenizer.bos_token_id, tokenizer.get_vocab()["user"]]])
    pixels = pixels_to_input(batch.images)

    losses = []
    with torch.no_grad():
        for g, (tokens, labels) in enumerate(zip(batch.tokens, batch.labels, strict=True)):
            for b in range(2):
                for q in range(GROUP):
                    ids, target = tokens[b, q], labels[b, q]
                    length = int((target >= 0).nonzero().max()) + 1
                    visual = torch.full((1, 64), model.config.image_token_id)
                    whole = torch.cat([prefix, visual, ids[None, :length]], dim=1)
                    k = int(batch.exits[g][b, q]) if with_exits else num_layers
                    with dyvte.VisualExit.fixed(k)(model):
                        logits = model(input_ids=whole, pixel_values=pixels[b : b + 1]).logits[0]
                    wanted = (target[:length] >= 0).nonzero().flatten()
                    at = wanted + 66 - 1
                    losses.append(F.cross_entropy(logits[at], target[wanted], reduction="none"))
        attention = PackedAttention(2, 64)
        install(attention, model)
        hidden = model.model.vision_tower(pixels, output_hidden_states=True).hidden_states[-1][:, 1:]
        features = model.model.multi_modal_projector(hidden)
        packed = packed_loss(model, attention, features, batch, prefix)
    torch.testing.assert_close(packed["loss"], torch.cat(losses).mean(), atol=2e-5, rtol=0)
    assert packed["right"].shape == (2, 16)


def test_vision_labels_name_every_cell():
    scene = draw_scene("train", 11)
    labels = cell_labels(scene)
    for item, row in zip(scene.cells, labels, strict=True):
        assert (item is None) == (row[0] == 0)
        assert (row[2] >= 0) == (item is not None and item.kind == "digit")
        if row[2] >= 0:
            assert str(row[2]) == item.name


def test_schedule_warms_up_stays_and_decays_to_zero():
    values = [schedule(s, 1000, warmup=100, decay_share=0.6) for s in range(1000)]
    assert values[0] == pytest.approx(0.01)
    assert values[99:400] == [1.0] * 301
    assert values[700] == pytest.approx(0.5)
    assert values[-1] == pytest.approx(1 / 600)
    assert all(a >= b for a, b in itertools.pairwise(values[399:]))
