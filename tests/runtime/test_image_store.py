"""The store of images: which are the same, how much memory, what cannot share and what goes wrong."""

from __future__ import annotations

import pytest
import torch

import dyvte
from dyvte.errors import ConfigError
from dyvte.gates import GateConfig, GateStack
from dyvte.reductions import FastV
from tests.helpers.batches import VISUAL_ID, llava
from tests.helpers.exits import ENCODED_ALONE, oracle, run_of
from tests.helpers.models import tiny_llava
from tests.helpers.questions import asked
from tests.helpers.reference import greedy_cached


def test_content_decides_and_no_name():
    model, processor = llava()
    store = dyvte.ImageStore()
    inputs = asked(processor, [1, 1, 1])
    inputs["pixel_values"] = inputs["pixel_values"].clone()
    inputs["pixel_values"][2, 0, 0, 0] += 0.5  # one pixel of one row's picture
    expected, _, _ = run_of(model, inputs, [2, 3, 2], None)
    logits, _, _ = run_of(model, inputs, [2, 3, 2], store)
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-4)
    assert len(store) == 2
    # the same picture behind another text is another image, as it reads that text
    run_of(model, asked(processor, [1], system="answer with yes or no"), [2], store)
    assert len(store) == 3


def test_another_model_and_changed_weights_empty_the_store():
    model, processor = tiny_llava(seed=3)
    other, _ = tiny_llava(seed=4)
    inputs, store = asked(processor, [1, 1]), dyvte.ImageStore()
    run_of(model, inputs, [2, 2], store)
    run_of(other, inputs, [2, 2], store)
    assert store.report().images_computed == 2
    run_of(model, inputs, [2, 2], store)
    for change in (lambda: model.get_decoder().layers[1].mlp.up_proj.weight.mul_(1.5),
                   lambda: model.model.multi_modal_projector.linear_1.weight.mul_(1.5)):  # fmt: skip
        with torch.no_grad():
            change()
        expected, _, _ = run_of(model, inputs, [2, 2], None)
        logits, _, _ = run_of(model, inputs, [2, 2], store)
        torch.testing.assert_close(logits, expected, rtol=0, atol=1e-4)
    assert store.report().images_computed == 5
    store.clear()
    assert (len(store), store.nbytes) == (0, 0)


def test_weights_that_change_inside_a_block_and_models_side_by_side():
    model, processor = tiny_llava(seed=3)
    other, _ = tiny_llava(seed=3)  # what enters the first layer is the same, what layers make of it is not
    with torch.no_grad():
        other.get_decoder().layers[0].mlp.up_proj.weight.mul_(3)
    inputs, store = asked(processor, [1, 1]), dyvte.ImageStore()
    expected = {one: run_of(one, inputs, [2, 3], None, steps=0)[0] for one in (model, other)}
    with torch.no_grad(), oracle([2, 3])(model, images=store), oracle([2, 3])(other, images=store):
        for one in (model, other, model, other):
            logits = greedy_cached(one, inputs, [VISUAL_ID], 0)[0]
            torch.testing.assert_close(logits, expected[one], rtol=0, atol=1e-4)
    with torch.no_grad(), oracle([2, 3])(model, images=store):
        greedy_cached(model, inputs, [VISUAL_ID], 0)
        model.get_decoder().layers[0].mlp.up_proj.weight.mul_(3)
        logits = greedy_cached(model, inputs, [VISUAL_ID], 0)[0]
    torch.testing.assert_close(logits, expected[other], rtol=0, atol=1e-4)


def test_memory_is_bounded_and_reported_and_the_oldest_leaves():
    model, processor = llava()
    sizes = dyvte.ImageStore()
    run_of(model, asked(processor, [1]), [4], sizes, steps=0)
    one = sizes.nbytes
    store = dyvte.ImageStore(int(2.5 * one))
    for image in (1, 2, 1, 3):
        expected, _, _ = run_of(model, asked(processor, [image]), [4], None)
        logits, _, _ = run_of(model, asked(processor, [image]), [4], store)
        torch.testing.assert_close(logits, expected, rtol=0, atol=1e-4)
        assert store.nbytes <= store.max_bytes
    # 2 was used longest ago
    assert store.report().images_dropped >= 1
    computed = store.report().images_computed
    run_of(model, asked(processor, [1]), [4], store)
    assert store.report().images_computed == computed
    run_of(model, asked(processor, [2]), [4], store)
    assert store.report().images_computed == computed + 1
    # more images in one batch than it may keep: right, and within the budget afterwards
    inputs = asked(processor, [4, 5, 6, 7, 4])
    expected, _, _ = run_of(model, inputs, [4, 2, 3, 1, 4], None)
    logits, _, _ = run_of(model, inputs, [4, 2, 3, 1, 4], store)
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-4)
    assert store.nbytes <= store.max_bytes


def test_bytes_are_those_of_the_tensors():
    model, processor = llava()
    store = dyvte.ImageStore()
    run_of(model, asked(processor, [1, 2, 2]), [4, 3, 4], store, [1, 2, 4])
    held, known = 0, set()
    for entry in store._entries.values():
        value = entry.value
        tensors = [value.features] if hasattr(value, "features") else []
        if not tensors:
            tensors = [value.content.states_SD, *value.content.beside, *value.states.values()]
            pairs = [*value.keys_values, *(one for of in value.frozen.values() for one in of.values())]
            tensors += [part for pair in pairs for part in pair]
        for tensor in tensors:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in known:
                known.add(storage.data_ptr())
                held += storage.nbytes()
    assert held == store.nbytes


def test_a_store_too_small_for_one_image_says_so_once_and_shares_none():
    model, processor = llava()
    inputs, store = asked(processor, [1, 1]), dyvte.ImageStore(100)
    expected, _, _ = run_of(model, inputs, [2, 4], None)
    with pytest.warns(UserWarning, match=r"takes up to \d+ bytes, the image store may hold 100"):
        run_of(model, inputs, [2, 4], store)
    # a second time would fail the test
    logits, _, record = run_of(model, inputs, [2, 4], store)
    torch.testing.assert_close(logits, expected, rtol=0, atol=ENCODED_ALONE)
    assert record.not_shared == "the image store is too small for one image"
    assert store.nbytes <= 100
    assert store.report().rows_alone == {record.not_shared: 4}


@pytest.mark.parametrize("layer", [0, 1, 3])
@pytest.mark.parametrize("times", [1, 2, 3])
def test_an_image_that_fails_half_way_does_no_harm(layer, times):
    model, processor = llava()
    inputs, store = asked(processor, [1, 2, 1]), dyvte.ImageStore()
    expected, expected_tokens, _ = run_of(model, inputs, [4, 3, 4], None)
    calls = []

    def explode(*_):
        calls.append(1)
        if len(calls) == times:
            raise ZeroDivisionError

    handle = model.get_decoder().layers[layer].self_attn.o_proj.register_forward_hook(explode)
    try:
        # whichever of prefix, images and text is running
        run_of(model, inputs, [4, 3, 4], store, steps=0)
    except ZeroDivisionError:
        pass
    finally:
        handle.remove()
    for exits in ([4, 3, 4], [1, 1, 1], [4, 3, 4]):
        logits, tokens, _ = run_of(model, inputs, exits, store)
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-4)
    assert torch.equal(tokens, expected_tokens)
    assert len(store) == 2


def test_blocks_that_cannot_share_say_why_and_are_as_without():
    model, processor = llava()
    inputs = asked(processor, [1, 1, 2])
    visual = GateStack.init(GateConfig(num_layers=4, hidden_size=32, features=("mean_prompt", "mean_visual")))
    for exits, reason in (
        (dyvte.VisualExit.fixed(2, positions="rearrange"), "positions='rearrange'"),
        (dyvte.VisualExit.fixed(2, reductions=[FastV(1, 0.5)]), "reductions"),
        (dyvte.VisualExit(visual), "gates that read visual tokens"),
    ):
        logits = []
        for store in (None, dyvte.ImageStore()):
            with torch.no_grad(), exits(model, images=store) as run:
                logits.append(model(**inputs).logits)
        torch.testing.assert_close(*logits, rtol=0, atol=ENCODED_ALONE)
        assert reason in run.records[0].not_shared
        assert store.report().rows_shared == 0


def test_passes_that_cannot_share_say_why_and_are_as_without():
    model, processor = tiny_llava()
    inputs = asked(processor, [1, 1, 2])
    labels = inputs["input_ids"].masked_fill(inputs["input_ids"] == VISUAL_ID, -100)
    store = dyvte.ImageStore()

    def not_shared(**more):
        with dyvte.VisualExit.fixed(2)(model, images=store) as run:
            model(**inputs, **more)
        return run.records[0].not_shared

    assert not_shared() is None
    assert not_shared(labels=labels) == "labels was asked for"
    assert not_shared(output_hidden_states=True) == "output_hidden_states was asked for"
    model.requires_grad_(True)
    assert "gradients are on" in not_shared()
    with torch.no_grad():
        assert not_shared() is None
        model.train()
        assert not_shared() == "the model is in training mode"
    assert store.report().rows_shared == 6


def test_what_is_no_store_is_refused():
    model, _ = llava()
    with pytest.raises(ConfigError, match=r"images must be a dyvte.ImageStore, got int"):
        dyvte.VisualExit.fixed(2)(model, images=5)
    with pytest.raises(ConfigError, match="expected at least 1"):
        dyvte.ImageStore(0)


def test_nothing_is_left_on_the_model():
    model, processor = llava()
    inputs = asked(processor, [1, 1, 2])
    stock = model(**inputs).logits
    names = {name: set(vars(module)) for name, module in model.named_modules()}
    with dyvte.VisualExit.fixed(2)(model, images=dyvte.ImageStore()):
        model(**inputs)
    assert {name: set(vars(module)) for name, module in model.named_modules()} == names
    assert torch.equal(model(**inputs).logits, stock)
