"""Nothing is left behind; memory is really freed; the host is not waited for; misuse is named."""

import copy
import gc
import weakref

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

import dyvte
from dyvte.errors import ExitRuntimeError, NoVisualTokensError, UnsupportedBackboneError
from dyvte.gates import GateConfig, GateStack
from dyvte.policies import OraclePolicy
from tests.helpers.batches import QUESTIONS, VISUAL_ID, batch, llava
from tests.helpers.models import random_image, tiny_llava
from tests.helpers.reference import greedy_cached

HEAD_BYTES = 2 * 2 * 8 * 4  # keys and values, 2 K/V heads of size 8, float32


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


def oracle(exits):
    return dyvte.VisualExit.from_policy(OraclePolicy(exits))


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


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("exits", [[0, 1, 2, 4, -1, 3], [1, 1, 1, 4, -1, 1], [2, 2, 2, 2, -1, 2]])
def test_kv_bytes_are_the_rows_own_and_the_tensors_real_size(exits, side):
    model, processor = llava()
    inputs = batch(processor, padding_side=side)
    valid = inputs["attention_mask"].bool()
    visual = (inputs["input_ids"] == VISUAL_ID) & valid
    with oracle(exits)(model) as run:
        cache = model(**inputs).past_key_values
    bytes_per_layer = run.records[0].kv_bytes
    for index, layer in enumerate(cache.layers):
        gone = torch.tensor(exits) <= index
        kept = int((valid & ~(visual & gone[:, None])).sum())
        storage = layer.keys.untyped_storage().nbytes() + layer.values.untyped_storage().nbytes()
        assert bytes_per_layer[index] == storage
        # one row that stays does not make the others pay: no padding at all behind the first exit
        if gone.any():
            assert storage == kept * HEAD_BYTES
        else:
            assert storage == valid.numel() * HEAD_BYTES


@pytest.mark.parametrize("exits", [[1, 2, 3, 4], [0, 4, 4, 4], [2, 2, 2, 2]])
def test_a_batch_costs_what_its_rows_cost_alone(exits):
    model, processor = llava("eager")  # eager attention is plain products, which the counter knows
    questions = [
        ("what color is it", 1),
        ("is it red ?", 1),
        ("how many are there", 1),
        ("what is left ?", 1),
    ]
    questions = [(" ".join(text.split()[:4]), n) for text, n in questions]

    def flops(rows, exit_layers):
        inputs = batch(processor, rows)
        assert inputs["attention_mask"].all()
        with oracle(exit_layers)(model), FlopCounterMode(display=False) as counter:
            model(**inputs, logits_to_keep=1)
        return counter.get_total_flops()

    alone = sum(flops([question], [k]) for question, k in zip(questions, exits, strict=True))
    assert flops(questions, exits) <= 1.02 * alone
    stock = flops(questions, [4] * 4)
    per_layer = (stock - flops(questions, [0] * 4)) / 4
    # each layer saved saves its share of the work on visual tokens
    saved = per_layer * sum(4 - k for k in exits) / 4
    assert flops(questions, exits) <= stock - 0.97 * saved


def tokens_per_layer(model, inputs, exits):
    """Padded tokens that each layer's MLP really runs on."""
    seen = [0] * 4

    def counting(index):
        def hook(module, args):
            seen[index] += args[0].shape[0] * args[0].shape[1]

        return hook

    layers = model.get_decoder().layers
    handles = [layer.mlp.register_forward_pre_hook(counting(i)) for i, layer in enumerate(layers)]
    try:
        with oracle(exits)(model):
            model(**inputs)
    finally:
        for handle in handles:
            handle.remove()
    return seen


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("exits", [[0, 1, 2, 4, -1, 3], [1, 1, 1, 4, -1, 1], [4, 3, 3, 2, -1, 1]])
def test_unequal_rows_never_cost_more_than_the_rows_present_padded(exits, side):
    model, processor = llava()
    inputs = batch(processor, padding_side=side)
    valid = inputs["attention_mask"].bool()
    text_B = (valid & (inputs["input_ids"] != VISUAL_ID)).sum(1)
    for index, seen in enumerate(tokens_per_layer(model, inputs, exits)):
        # a row without an image goes with the text from the first layer on
        in_text = torch.tensor(exits) <= index
        longest = int(text_B[in_text].max()) if in_text.any() else 0
        padded_stock = int((~in_text).sum()) * valid.shape[1] + int(in_text.sum()) * longest
        assert seen <= padded_stock
        assert in_text[4]


def test_a_row_without_an_image_costs_its_text_only():
    model, processor = llava()
    inputs = batch(processor, (QUESTIONS[3], QUESTIONS[4]))
    width, text = inputs["input_ids"].shape[1], int(inputs["attention_mask"][1].sum())
    assert text < width
    assert tokens_per_layer(model, inputs, [3, -1])[:3] == [width + text] * 3


def test_beams_share_what_they_have_in_common():
    model, processor = llava()
    inputs = batch(processor, QUESTIONS[:2])
    with oracle([1, 4])(model):
        out = model(**inputs)
        layer = out.past_key_values.layers[2]
        size = layer.keys.numel()
        out.past_key_values.batch_repeat_interleave(4)
        assert layer.keys.numel() == size
        assert layer.columns.slots_KB.shape[1] == 8


class Counter(TorchDispatchMode):
    """Counts operations that make the host wait for a device."""

    WAITS = ("_local_scalar_dense", "nonzero", "equal", "masked_select", "unique")

    def __init__(self):
        super().__init__()
        self.waits = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.waits += any(func.__name__.startswith(name) for name in self.WAITS)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("questions", [QUESTIONS, QUESTIONS[:1]])
def test_decode_waits_for_nothing(questions):
    model, processor = llava()
    inputs = batch(processor, questions)
    mask = torch.cat([inputs["attention_mask"], torch.ones_like(inputs["attention_mask"][:, :1])], 1)
    step = {"input_ids": torch.full((len(mask), 1), 9), "attention_mask": mask}

    def waits(exits):
        with exits(model), torch.no_grad():
            cache = model(**inputs).past_key_values
            with Counter() as counter:
                model(**step, past_key_values=cache)
        return counter.waits

    stock = waits(dyvte.VisualExit())
    assert waits(oracle([0, 1, 2, 4, -1, 3][: len(mask)])) <= stock


def test_prefill_copies_to_the_host_once_and_once_per_gate(monkeypatch):
    model, processor = llava()
    inputs = batch(processor)
    copies = []
    cpu = torch.Tensor.cpu
    monkeypatch.setattr(torch.Tensor, "cpu", lambda self, *a, **k: copies.append(1) or cpu(self, *a, **k))

    def count(exits):
        copies.clear()
        with exits(model):
            model(**inputs)
        return len(copies)

    assert count(dyvte.VisualExit.fixed(2)) == 1
    gates = GateStack.init(GateConfig(num_layers=4, hidden_size=32))
    assert count(dyvte.VisualExit(gates, threshold=1.0)) == 1 + 3
    # nobody is asked once all rows have left
    assert count(dyvte.VisualExit(gates, threshold=0.0)) == 1 + 1


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_no_hidden_wait_on_a_gpu():
    model, processor = llava()
    model = copy.deepcopy(model).cuda()
    inputs = {name: value.cuda() for name, value in batch(processor).items()}
    step = torch.full((6, 1), 9, device="cuda")
    with oracle([0, 1, 2, 4, -1, 3])(model), torch.no_grad():
        cache = model(**inputs).past_key_values
        torch.cuda.set_sync_debug_mode("error")
        try:
            model(input_ids=step, past_key_values=cache)
        finally:
            torch.cuda.set_sync_debug_mode("default")


def test_a_cache_taken_out_of_its_block_is_refused():
    model, processor = llava()
    inputs = batch(processor, QUESTIONS[:2])
    with oracle([1, 4])(model):
        cache = model(**inputs).past_key_values
    with pytest.raises(ExitRuntimeError, match="inside `with exits"):
        model(input_ids=torch.full((2, 1), 9), past_key_values=cache)


def test_an_image_without_visual_tokens_is_refused():
    model, processor = llava()
    ids = processor.tokenizer("user what is it ? assistant", return_tensors="pt").input_ids
    pixels = batch(processor, QUESTIONS[:1])["pixel_values"]
    with dyvte.VisualExit.fixed(2)(model), pytest.raises((NoVisualTokensError, ValueError)) as error:
        model(input_ids=ids, pixel_values=pixels)
    # the model itself notices where its config names the token; where it does not, the runtime must
    exits = dyvte.VisualExit(fallback=2, visual_token_ids=(60,))
    with exits(model), pytest.raises(NoVisualTokensError, match="no visual token"):
        model(**batch(processor, QUESTIONS[:1]))
    assert "match" in str(error.value) or "visual" in str(error.value)


def test_masks_and_inputs_that_cannot_be_read_are_named():
    model, processor = llava()
    inputs = batch(processor, QUESTIONS[:1])
    with dyvte.VisualExit.fixed(2)(model):
        with pytest.raises(ExitRuntimeError, match="attention_mask has shape"):
            model(**{**inputs, "attention_mask": inputs["attention_mask"][:, :-1]})
        embeds = model.get_input_embeddings()(inputs["input_ids"])
        with pytest.raises(ExitRuntimeError, match="pass input_ids"):
            model(inputs_embeds=embeds)


@pytest.mark.parametrize("policy", ["exits", "never"])
def test_a_mask_of_four_dimensions_is_refused_where_tokens_leave(policy):
    # which tokens are padding could not be told from it once some have left
    model, processor = llava()
    inputs = batch(processor, QUESTIONS[:1])
    n = inputs["input_ids"].shape[1]
    inputs["attention_mask"] = torch.full((n, n), torch.finfo(torch.float32).min).triu(1)[None, None]
    if policy == "never":
        stock = model(**inputs).logits
        with dyvte.VisualExit()(model):
            assert torch.equal(model(**inputs).logits, stock)
        return
    with dyvte.VisualExit.fixed(2)(model), pytest.raises(ExitRuntimeError, match="two-dimensional"):
        model(**inputs)


@pytest.mark.parametrize("change", [-1, 1])
def test_a_mask_that_does_not_fit_the_cache_is_named_in_decoding(change):
    model, processor = llava()
    inputs = batch(processor, QUESTIONS[:2])
    length = inputs["input_ids"].shape[1] + 1
    step = {"input_ids": torch.full((2, 1), 9), "attention_mask": torch.ones(2, length + change)}
    with dyvte.VisualExit.fixed(2)(model), torch.no_grad():
        cache = model(**inputs).past_key_values
        with pytest.raises(ExitRuntimeError, match=f"length {length + change}, expected {length}"):
            model(**step, past_key_values=cache)
        step["attention_mask"] = torch.ones(2, length)
        assert model(**step, past_key_values=cache).logits.isfinite().all()


def test_something_that_is_no_multimodal_model_is_refused():
    from transformers import LlamaConfig, LlamaForCausalLM

    with (
        pytest.raises(UnsupportedBackboneError, match="not a transformers model"),
        dyvte.VisualExit.fixed(1)(torch.nn.Linear(2, 2)),
    ):
        pass
    text = LlamaForCausalLM(
        LlamaConfig(
            hidden_size=8, intermediate_size=8, num_hidden_layers=2, num_attention_heads=2, vocab_size=9
        )
    )
    with pytest.raises(UnsupportedBackboneError, match="no visual token"), dyvte.VisualExit.fixed(1)(text):
        pass


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
