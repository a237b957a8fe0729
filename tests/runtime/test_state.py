"""Nothing is left behind on the model, whatever happens inside the block."""

import gc
import weakref

import pytest
import torch

import dyvte
from dyvte.errors import ExitRuntimeError
from tests.helpers.batches import QUESTIONS, VISUAL_ID, batch, llava
from tests.helpers.exits import oracle
from tests.helpers.models import random_image, tiny_llava
from tests.helpers.reference import greedy_cached


def snapshot(model):
    """Every attribute of every module, down to the identity of hook entries and instance attributes."""
    state = {}
    for name, module in model.named_modules():
        for key, value in vars(module).items():
            state[name, key] = dict(value) if isinstance(value, dict) else value
    return state


def same(before, after):
    return before.keys() == after.keys() and all(
        before[k] is after[k]
        or (isinstance(before[k], dict) and before[k] == after[k])
        or before[k] == after[k]
        for k in before
        if not isinstance(before[k], torch.Tensor)
    )


def test_nothing_is_left_on_the_model():
    model, processor = llava()
    model.generate(**batch(processor), max_new_tokens=2)  # transformers installs its own hooks on first use
    before = snapshot(model)
    with oracle([0, 1, 2, 4, -1, 3])(model):
        assert not same(before, snapshot(model))
        model.generate(**batch(processor), max_new_tokens=2)
    assert same(before, snapshot(model))


@pytest.mark.parametrize("where", ["layer", "vision", "user code"])
def test_nothing_is_left_after_an_exception_and_the_next_block_works(where):
    model, processor = llava()
    inputs = batch(processor)
    with oracle([0, 1, 2, 4, -1, 3])(model):
        expected, _, _ = greedy_cached(model, inputs, [VISUAL_ID], 2)
    before = snapshot(model)

    def explode(*_):
        raise ZeroDivisionError

    target = model.get_decoder().layers[2].mlp if where == "layer" else model.model.vision_tower
    block = oracle([0, 1, 2, 4, -1, 3])

    def run_and_fail():
        with block(model) as run:
            if where == "user code":
                raise ZeroDivisionError
            handle = target.register_forward_hook(explode)
            try:
                model(**inputs)
            finally:
                handle.remove()
                assert run.records == []

    with pytest.raises(ZeroDivisionError):
        run_and_fail()
    assert same(before, snapshot(model))
    # and within one block, after a failed pass
    with block(model) as run:
        if where != "user code":
            handle = target.register_forward_hook(explode)
            with pytest.raises(ZeroDivisionError):
                model(**inputs)
            handle.remove()
        got, _, _ = greedy_cached(model, inputs, [VISUAL_ID], 2)
    assert torch.equal(got, expected)
    assert len(run.records) == 1


def changed(before, after):
    """(module, attribute) of everything a block changed."""
    return {
        key
        for key in before.keys() | after.keys()
        if not same(*({key: s[key]} if key in s else {} for s in (before, after)))
    }


@pytest.mark.parametrize("order", ["inner first", "outer first"])
@pytest.mark.parametrize("fails", ["inner model", "outer model", "user code"])
def test_nothing_is_left_on_nested_models_after_an_exception(fails, order):
    a, processor = llava()
    b, _ = tiny_llava(layers=3, seed=5)
    inputs = batch(processor, QUESTIONS[:2])
    models = {"outer model": a, "inner model": b}
    for model in models.values():
        model.generate(**inputs, max_new_tokens=2)
    before = [snapshot(model) for model in models.values()]
    blocks = [dyvte.VisualExit.fixed(1)(a), dyvte.VisualExit.fixed(2)(b)]
    for block in blocks:
        block.__enter__()
    touched = [changed(old, snapshot(model)) for old, model in zip(before, models.values(), strict=True)]
    # the very objects: each layer's forward, and the hooks of every module on the way to the decoder
    for names, model in zip(touched, models.values(), strict=True):
        layers = [n for n, m in model.named_modules() if m in set(model.get_decoder().layers)]
        assert {(name, "forward") for name in layers} <= names
        assert any(attribute == "_forward_pre_hooks" for _, attribute in names)

    def explode(*_):
        raise ZeroDivisionError

    error = None
    try:
        if fails == "user code":
            raise ZeroDivisionError
        handle = models[fails].get_decoder().layers[2].mlp.register_forward_hook(explode)
        try:
            models[fails](**inputs)
        finally:
            handle.remove()
    except ZeroDivisionError as caught:
        error = caught
    for block in blocks[::-1] if order == "inner first" else blocks:
        block.__exit__(type(error), error, error.__traceback__)
    for old, model, names in zip(before, models.values(), touched, strict=True):
        now = snapshot(model)
        assert same(old, now)
        assert all((key in now) == (key in old) and now.get(key) == old.get(key) for key in names)


def test_a_block_that_fails_while_it_enters_leaves_nothing(monkeypatch):
    model, processor = llava()
    inputs = batch(processor, QUESTIONS[:1])
    stock = model(**inputs).logits
    before = snapshot(model)
    decoder = model.get_decoder()

    def refuse(*_, **__):
        raise ZeroDivisionError

    # the decoder's hooks are the last thing that is installed
    monkeypatch.setattr(type(decoder), "register_forward_hook", refuse)
    with pytest.raises(ZeroDivisionError), dyvte.VisualExit.fixed(1)(model):
        pass
    monkeypatch.undo()
    assert same(before, snapshot(model))
    assert torch.equal(model(**inputs).logits, stock)


def test_blocks_on_two_models_interleave_and_one_model_nests_not():
    a, processor = llava()
    b, _ = tiny_llava(layers=3, seed=5)
    inputs = batch(processor, QUESTIONS[:2])
    with dyvte.VisualExit.fixed(1)(a):
        only_a = a(**inputs).logits
    with dyvte.VisualExit.fixed(2)(b):
        only_b = b(**inputs).logits
    outer, inner = dyvte.VisualExit.fixed(1)(a), dyvte.VisualExit.fixed(2)(b)
    before_a, before_b = snapshot(a), snapshot(b)
    outer.__enter__()
    inner.__enter__()
    with pytest.raises(ExitRuntimeError, match="inside a dyvte block already"), dyvte.VisualExit.fixed(1)(a):
        pass
    with pytest.raises(ExitRuntimeError, match="already active"):
        outer.__enter__()
    assert torch.equal(a(**inputs).logits, only_a)
    outer.__exit__(None, None, None)
    assert torch.equal(b(**inputs).logits, only_b)
    inner.__exit__(None, None, None)
    assert same(before_a, snapshot(a))
    assert same(before_b, snapshot(b))


def test_an_existing_instance_forward_is_put_back():
    model, processor = tiny_llava()
    layer = model.get_decoder().layers[1]
    original = layer.forward
    calls = []

    def offloading_forward(*args, **kwargs):
        calls.append(1)
        return original(*args, **kwargs)

    layer.forward = offloading_forward
    with dyvte.VisualExit.fixed(1)(model):
        model(**batch(processor, QUESTIONS[:1]))
    assert calls == [1]
    assert layer.__dict__["forward"] is offloading_forward


def test_the_block_keeps_no_tensor_alive():
    model, processor = llava()
    inputs = batch(processor)
    with oracle([0, 1, 2, 4, -1, 3])(model) as run:
        out = model(**inputs)
        keys = weakref.ref(out.past_key_values.layers[3].keys)
        del out
        gc.collect()
        assert keys() is None
    assert run.exit_layers.tolist() == [0, 1, 2, 4, -1, 3]


@pytest.mark.filterwarnings(
    "ignore:.is_gradient_checkpointing. is deprecated:FutureWarning"
)  # peft asks for it
def test_peft_wrapped_backbone():
    from peft import LoraConfig, get_peft_model

    model, processor = tiny_llava()
    inputs = batch(processor)
    wrapped = get_peft_model(model, LoraConfig(target_modules=["q_proj"], init_lora_weights=False))
    with oracle([0, 1, 2, 4, -1, 3])(wrapped) as run:
        got = wrapped.generate(**inputs, max_new_tokens=4)
    with oracle([0, 1, 2, 4, -1, 3])(wrapped.get_base_model()):
        assert torch.equal(got, wrapped.get_base_model().generate(**inputs, max_new_tokens=4))
    assert run.exit_layers.tolist() == [0, 1, 2, 4, -1, 3]


def test_images_of_one_row_need_not_be_neighbours():
    model, processor = llava()
    text = "user <image> what is <image> or not ? assistant"
    inputs = processor(text=text, images=[random_image(1), random_image(2)], return_tensors="pt")
    from tests.helpers.reference import greedy_reference

    expected, _ = greedy_reference(model, inputs, [2], [VISUAL_ID], 3)
    with dyvte.VisualExit.fixed(2)(model):
        got, _, _ = greedy_cached(model, inputs, [VISUAL_ID], 3)
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-4)
