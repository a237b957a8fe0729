"""Stored images: the same answers as without, each image computed once and no deeper than it is read."""

from __future__ import annotations

from contextlib import contextmanager

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import dyvte
from dyvte.decoder import vision
from dyvte.gates import GateConfig, GateStack
from dyvte.runtime import shared_apart
from tests.helpers.batches import VISUAL_ID, llava
from tests.helpers.exits import oracle, run_of
from tests.helpers.families import FAMILIES
from tests.helpers.models import tiny_llava
from tests.helpers.passes import about_images, padded
from tests.helpers.questions import asked
from tests.helpers.reference import greedy_reference

IMAGES = (1, 1, 2, 1, 2, None)  # by number; None: a row without
SCHEDULES = {
    "each at its own layer": ([0, 1, 2, 4, 3, -1], None),
    "never": ([4, 4, 4, 4, 4, -1], None),
    "all in the middle": ([2, 2, 2, 2, 2, -1], None),
    "frozen, then gone": ([4, 3, 3, 4, 2, -1], [1, 2, 0, 4, 1, -1]),
    "frozen to the end": ([4, 4, 4, 4, 4, -1], [2, 2, 2, 2, 2, -1]),
}


@contextmanager
def rows_of_calls(layers):
    """By layer: (rows, tokens) of each call of its MLP."""
    seen = [[] for _ in layers]
    with pytest.MonkeyPatch.context() as patch:
        for layer, own in zip(layers, seen, strict=True):
            # no hook: under hooks no layer is cut short
            patch.setattr(layer.mlp, "forward", noting(layer.mlp.forward, own))
        yield seen


def noting(forward, own):
    def noted(states):
        own.append(tuple(states.shape[:2]))
        return forward(states)

    return noted


# --- the same answers ---


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_prefill_and_decode_equal_brute_force_whatever_the_store_knows(attention, side):
    model, processor = llava(attention)
    inputs = asked(processor, IMAGES, padding_side=side)
    used = dyvte.ImageStore()
    for exits, freezes in SCHEDULES.values():
        given = None if freezes is None else [4 if f < 0 else f for f in freezes]
        expected, expected_tokens = greedy_reference(model, inputs, exits, [VISUAL_ID], 3, freezes_B=given)
        for store in (dyvte.ImageStore(), used):
            logits, tokens, record = run_of(model, inputs, exits, store, freezes)
            torch.testing.assert_close(logits, expected, rtol=0, atol=1e-4)
            assert torch.equal(tokens, expected_tokens)
            assert record.exit_layers_B.tolist() == exits
            assert record.shared_B.tolist() == [image is not None for image in IMAGES]
    assert len(used) == used.report().images_computed == 2


def test_a_run_again_ends_in_the_same_bits():
    """Whatever the memory of this process looks like, and with several threads."""
    model, processor = llava()
    inputs = asked(processor, [1, 2, 3, 2, 1, 3])
    threads, kept, ends = torch.get_num_threads(), [], []
    torch.set_num_threads(2)
    try:
        for again in range(12):
            kept.append([bytearray(64 + 16 * again) for _ in range(997 * again)])
            logits, _, _ = run_of(model, inputs, [3, 4, 2, 4, 1, 4], dyvte.ImageStore(), [1, 2, 0, 4, 1, 3])
            ends.append(logits)
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(logits, ends[0]) for logits in ends)


@pytest.mark.parametrize("threads", [1, 2])
def test_new_images_of_one_pass_have_the_bits_that_each_has_alone(threads, monkeypatch):
    model, processor = llava()
    inputs, before = asked(processor, [1, 2, 3, 2, 1, 3]), torch.get_num_threads()
    kept = []
    torch.set_num_threads(threads)
    try:
        for apart in (False, True):
            if apart:
                monkeypatch.setattr(shared_apart.ApartLayers, "_products_of", lambda *_: None)
                monkeypatch.setattr(vision, "_products", lambda *_: None)
            store = dyvte.ImageStore()
            logits, _, _ = run_of(model, inputs, [3, 4, 2, 4, 1, 4], store, [1, 2, 0, 4, 1, 3])
            kept.append((logits, tensors_of(store)))
    finally:
        torch.set_num_threads(before)
    (one, together), (other, alone) = kept
    assert torch.equal(one, other)
    assert len(together) == len(alone) > 30
    assert all(map(torch.equal, together, alone))


def tensors_of(store):
    """All that a store holds of its images, in an order that does not depend on the run."""
    found = []
    for entry in store._entries.values():
        if hasattr(entry.value, "features"):
            found.append(entry.value.features)
            continue
        found += [part for known in entry.value.keys_values for part in known]
        found += [states for _, states in sorted(entry.value.states.items())]
        for _, by_layer in sorted(entry.value.frozen.items()):
            found += [part for _, known in sorted(by_layer.items()) for part in known]
    return found


@pytest.fixture
def memory_is_nan():
    """Memory that is allocated and not written to holds NaN."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("family", ["llava", "qwen2_vl", "idefics3"])
@pytest.mark.usefixtures("memory_is_nan")
def test_nothing_is_read_that_nobody_wrote(family):
    (model, inputs, visual_ids), _, images = about_images(family, "sdpa")
    exits = [2 if image >= 0 else -1 for image in images]
    for side in ("left", "right"):
        store = dyvte.ImageStore()
        for _ in range(2):
            logits, _, _ = run_of(model, padded(inputs, side), exits, store, visual_ids=visual_ids)
            assert logits.isfinite().all()


FAST = {
    ("qwen3_vl", "sdpa"),
    ("qwen2_5_vl", "eager"),
    ("gemma3", "sdpa"),
    ("smolvlm", "eager"),
    ("mistral3", "sdpa"),
    ("paligemma", "sdpa"),
    ("llava over mistral", "eager"),
}
CASES = [
    pytest.param(*case, id=" ".join(case), marks=() if case in FAST else pytest.mark.full)
    for case in ((name, attention) for name in FAMILIES for attention in ("sdpa", "eager"))
]


@pytest.mark.parametrize(("family", "attention"), CASES)
def test_every_family_gives_what_its_rows_give_alone(family, attention):
    (model, inputs, visual_ids), _, images = about_images(family, attention)
    layers = len(model.get_decoder().layers)
    for side in ("left", "right"):
        placed, store = padded(inputs, side), dyvte.ImageStore()
        for exits, freezes in (
            (range(6), None),
            ([layers] * 6, None),
            ([layers] * 6, [1] * 6),
            ([layers, layers - 1, 2, layers, 1, layers], [0, 1, 2, 0, 1, 2]),
        ):
            exits = [min(k, layers) if i >= 0 else -1 for k, i in zip(exits, images, strict=True)]
            if freezes is not None:
                freezes = [min(f, k) if k >= 0 else -1 for f, k in zip(freezes, exits, strict=True)]
            how = {"freezes": freezes, "visual_ids": visual_ids}
            expected, expected_tokens, alone = run_of(model, placed, exits, None, **how)
            logits, tokens, record = run_of(model, placed, exits, store, **how)
            torch.testing.assert_close(logits, expected, rtol=0, atol=1e-4)
            assert torch.equal(tokens, expected_tokens)
            # what a row costs by itself is said as before
            assert record.kv_bytes_alone == alone.kv_bytes == alone.kv_bytes_alone
            assert torch.equal(record.visual_tokens_BL, alone.visual_tokens_BL)
        shares = family != "paligemma"
        assert record.shared_B.tolist() == [shares and image >= 0 for image in images]
        assert len(store) == 2 * shares
        if not shares:
            assert record.not_shared == "paligemma: its image tokens see the text behind them"
            assert store.report().rows_alone == {record.not_shared: 5 * 4}


@pytest.mark.parametrize(
    "options",
    [
        {"num_beams": 3},
        {"do_sample": True, "num_return_sequences": 2, "top_k": 20},
        {"use_cache": False},
        {"repetition_penalty": 1.3},
    ],
    ids=str,
)
def test_generate_says_the_same(options):
    model, processor = llava()
    inputs = asked(processor, IMAGES)
    given = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False, **options}
    answers = []
    for store in (None, dyvte.ImageStore()):
        with oracle([0, 1, 2, 4, 3, -1])(model, images=store) as run:
            torch.manual_seed(0)
            answers.append(model.generate(**inputs, **given))
    assert torch.equal(*answers)
    assert run.records[0].shared_B.any()
    assert len(store) == 2


@pytest.mark.parametrize("freeze_head", [False, True])
def test_gates_decide_the_same(freeze_head):
    model, processor = llava()
    inputs = asked(processor, IMAGES)
    config = GateConfig(num_layers=4, hidden_size=32, architecture="compact", freeze_head=freeze_head)
    store, found = dyvte.ImageStore(), set()
    for seed in range(8):
        gates, generator = GateStack.init(config), torch.Generator().manual_seed(seed)
        for parameter in gates.parameters():
            torch.nn.init.normal_(parameter, std=0.5, generator=generator)
        records = []
        for images in (None, store):
            with torch.no_grad(), dyvte.VisualExit(gates)(model, images=images) as run:
                model(**inputs)
            records.append(run.records[0])
        alone, shared = records
        assert torch.equal(alone.exit_layers_B, shared.exit_layers_B)
        assert torch.equal(alone.freeze_layers_B, shared.freeze_layers_B)
        for name in ("gate_logits_BL", "freeze_logits_BL"):
            torch.testing.assert_close(
                getattr(shared, name), getattr(alone, name), rtol=0, atol=1e-4, equal_nan=True
            )
        found |= set(zip(alone.freeze_layers_B.tolist(), alone.exit_layers_B.tolist(), strict=True))
    assert len(found) > 4


def test_rows_that_cannot_share_stand_beside_others():
    model, processor = llava()
    inputs = asked(processor, IMAGES, padding_side="right")
    # a row that ends with its image
    visual = inputs["input_ids"][0] == VISUAL_ID
    inputs["attention_mask"][0, int(visual.nonzero()[-1]) + 1 :] = 0
    with pytest.warns(UserWarning, match="no text after the image"):
        expected, expected_tokens, _ = run_of(model, inputs, [2, 1, 3, 4, 0, -1], None)
    with pytest.warns(UserWarning, match="no text after the image"):
        logits, tokens, record = run_of(model, inputs, [2, 1, 3, 4, 0, -1], dyvte.ImageStore())
    assert record.shared_B.tolist() == [False, True, True, True, True, False]
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-4)
    assert torch.equal(tokens, expected_tokens)


# --- once, and no deeper than it is read ---


def test_an_image_gets_as_deep_as_it_is_read_and_every_layer_runs_on_it_once():
    model, processor = llava()
    store = dyvte.ImageStore()

    def images_run(images, exits):
        """By layer: on how many images it ran whole, states behind it included."""
        with rows_of_calls(model.get_decoder().layers) as seen:
            run_of(model, asked(processor, images), exits, store, steps=0)
        return [sum(rows for rows, tokens in of_layer if tokens == 16) for of_layer in seen]

    # behind layer 2 all rows are text: of that layer keys and values are enough
    assert images_run([1, 1, 2], [2, 2, 1]) == [1, 0, 0, 0]
    # one goes a layer deeper; another is new
    assert images_run([1, 2, 3], [3, 2, 2]) == [2, 1, 0, 0]
    assert images_run([1, 2, 3, 3], [3, 0, 2, 1]) == [0, 0, 0, 0]
    assert images_run([2, 2], [4, 1]) == [0, 1, 1, 0]
    report = store.report()
    assert (report.images, report.images_computed, report.rows_shared) == (3, 3, 12)


def test_the_vision_tower_sees_every_image_once():
    model, processor = llava()
    store, seen = dyvte.ImageStore(), []
    handle = model.model.vision_tower.register_forward_pre_hook(
        lambda _, args, kwargs: seen.append(len(kwargs.get("pixel_values", args[0] if args else ()))),
        with_kwargs=True,
    )
    try:
        for images in ([1, 1, 2], [2, 3, 1], [3, 2]):
            with dyvte.VisualExit.fixed(2)(model, images=store):
                model.generate(**asked(processor, images), max_new_tokens=2)
    finally:
        handle.remove()
    assert seen == [2, 1]


def test_exits_of_one_block_serve_another():
    model, processor = llava()
    inputs, store = asked(processor, [1, 1]), dyvte.ImageStore()
    run_of(model, inputs, [4, 4], store, steps=0)
    with rows_of_calls(model.get_decoder().layers) as seen:
        run_of(model, inputs, [1, 3], store, steps=0)
    assert all(tokens < 16 for of_layer in seen for _, tokens in of_layer)  # text alone


def test_the_cache_holds_an_image_once():
    model, processor = llava()
    inputs = asked(processor, [1] * 5)
    _, _, alone = run_of(model, inputs, [4] * 5, None, steps=0)
    _, _, shared = run_of(model, inputs, [4] * 5, dyvte.ImageStore(), steps=0)
    width = 2 * 2 * 8 * 4  # keys and values, 2 heads of size 8, float32
    texts = int(inputs["attention_mask"].sum())
    begins = (
        int((inputs["input_ids"][0] == VISUAL_ID).nonzero()[-1] - inputs["attention_mask"][0].argmax()) + 1
    )
    assert shared.kv_bytes == ((texts - 4 * begins) * width,) * 4
    assert alone.kv_bytes == shared.kv_bytes_alone == (inputs["input_ids"].numel() * width,) * 4


def test_flops_of_32_questions_about_one_image():
    # LLaVA-1.5's proportions: 35 tokens, an image of 576, 40 of the question
    rows, layers, size, before, visual, text = 32, 4, 64, 35, 576, 40
    model, _ = tiny_llava(layers, size, image_size=96, heads=1, kv_heads=1)
    ids = torch.randint(7, 40, (rows, before + visual + text))
    ids[:, before : before + visual], ids[:, :before] = VISUAL_ID, ids[:1, :before].clone()
    inputs = {"input_ids": ids, "pixel_values": torch.randn(1, 3, 96, 96).expand(rows, -1, -1, -1)}

    def flops(run):
        # of attention functions torch counts the plain one
        with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            run()
        return counter.get_total_flops()

    def prefill(exits, store):
        with oracle(exits)(model, images=store):
            model(**inputs, logits_to_keep=1)

    weights = 2 * (4 * size * size + 3 * size * 2 * size)
    tower = flops(lambda: model.model.get_image_features(inputs["pixel_values"][:1]))
    head = 2 * size * model.config.text_config.vocab_size * rows
    for exits, most in (([layers] * rows, 0.10), ([2, 1, 3, 3] * 8, None)):
        shared = flops(lambda exits=exits: prefill(exits, dyvte.ImageStore()))
        if most is not None:
            assert shared < most * flops(lambda exits=exits: prefill(exits, None))
        # the image once to its deepest exit, and the texts
        once = tower + head
        for layer in range(layers):
            seen = before + visual * (layer < max(exits))
            once += seen * weights + 4 * size * (before * before + (seen - before) * seen)
            for k in exits:
                once += text * weights + 4 * size * text * (before + visual * (layer < k) + text)
        assert shared < 1.03 * once
