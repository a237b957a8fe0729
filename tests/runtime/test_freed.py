"""Memory is really freed, layers are really shorter, and the host is not waited for."""

import copy

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

import dyvte
from dyvte.gates import GateConfig, GateStack
from tests.helpers.batches import QUESTIONS, VISUAL_ID, batch, llava
from tests.helpers.exits import oracle

HEAD_BYTES = 2 * 2 * 8 * 4  # keys and values, 2 K/V heads of size 8, float32


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
