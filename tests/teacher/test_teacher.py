"""The one-pass teacher against L+1 separate masked passes, one row at a time."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import cross_entropy, kl_div

from dyvte.backbones import describe, encode, get_template
from dyvte.errors import DataError, UnsupportedBackboneError
from dyvte.gates import prompt_features
from dyvte.spans import find_spans
from dyvte.teacher import trace_exits
from dyvte.teacher.exits import trace_checked
from tests.helpers.models import random_image, tiny_llava
from tests.helpers.passes import close

LAYERS = 4
QUESTIONS = ["what color is the circle ?", "how many ?", "is there any red square on the left of the image ?"]
ANSWERS = ["red", "two and three objects", "no"]


@pytest.fixture(scope="module", params=["sdpa", "eager"])
def backbone(request: pytest.FixtureRequest):
    return tiny_llava(layers=LAYERS, attn_implementation=request.param)


def batch_of(processor, rows, padding_side: str):
    template = get_template("auto", processor)
    rendered = [template.render(QUESTIONS[row], ANSWERS[row]) for row in rows]
    images = [[random_image(row)] for row in rows]
    return encode(processor, rendered, images, padding_side=padding_side)


def masked_pass(model, inputs, k: int):
    """Logits of one unpadded row whose layers k+1..L cannot see visual keys, and the states after each layer.

    A plain forward with hooks that only replace the attention mask: nothing of the teacher is used.
    """
    ids = inputs["input_ids"]
    visual_N = ids[0] == model.config.image_token_id
    n = ids.shape[1]
    causal = torch.ones(n, n, dtype=torch.bool).tril()
    hidden: list[torch.Tensor] = []
    handles = []
    eager = model.config.text_config._attn_implementation == "eager"

    def set_mask(index):
        def hook(module, args, kwargs):
            allowed = causal & ~visual_N[None, :] if index >= k else causal
            allowed = allowed | torch.eye(n, dtype=torch.bool)
            bias = torch.zeros(n, n).masked_fill(~allowed, torch.finfo(torch.float32).min)
            kwargs["attention_mask"] = (bias if eager else allowed)[None, None]
            return args, kwargs

        return hook

    layers = describe(model).layers
    for index, layer in enumerate(layers):
        handles.append(layer.register_forward_pre_hook(set_mask(index), with_kwargs=True))
        handles.append(layer.register_forward_hook(lambda m, a, out: hidden.append(out)))
    try:
        with torch.no_grad():
            logits = model(**inputs, use_cache=False).logits[0]
    finally:
        for handle in handles:
            handle.remove()
    return logits, hidden


def reference_columns(model, processor, row: int):
    inputs, answer = batch_of(processor, [row], "right")
    before = answer[0].nonzero().flatten() - 1
    labels = inputs["input_ids"][0, before + 1]
    passes = [masked_pass(model, inputs, k) for k in range(LAYERS + 1)]
    full = passes[-1][0][before].double().log_softmax(-1)
    columns = {name: [] for name in ("risk", "reverse_risk", "agreement", "same_answer", "loss")}
    placeholder = model.config.image_token_id
    for logits, _ in passes:
        here = logits[before].double().log_softmax(-1)
        top, top_full = here.clone(), full.clone()
        top[:, placeholder] = top_full[:, placeholder] = -torch.inf
        equal = top.argmax(-1) == top_full.argmax(-1)
        columns["risk"].append(kl_div(here, full, log_target=True, reduction="none").sum(-1).mean())
        columns["reverse_risk"].append(kl_div(full, here, log_target=True, reduction="none").sum(-1).mean())
        columns["agreement"].append(equal.double().mean())
        columns["same_answer"].append(equal.all().double())
        columns["loss"].append(cross_entropy(logits[before].double(), labels))
    spans = find_spans(inputs["input_ids"], [placeholder], inputs["attention_mask"], answer)
    features = torch.stack([prompt_features(h, spans.prompt_BN)[0] for h in passes[-1][1]])
    return {name: torch.stack(values) for name, values in columns.items()}, features


@pytest.mark.parametrize("padding_side", ["left", "right"])
@pytest.mark.parametrize("exits_per_chunk", [None, 1, 100])
def test_one_pass_equals_separate_masked_passes(backbone, padding_side: str, exits_per_chunk) -> None:
    model, processor = backbone
    inputs, answer = batch_of(processor, [0, 1, 2], padding_side)
    assert len(set(answer.sum(1).tolist())) > 1
    assert not inputs["attention_mask"].all()
    trace = trace_exits(model, inputs, answer, sample_ids=["a", "b", "c"], exits_per_chunk=exits_per_chunk)
    for row in range(3):
        columns, features = reference_columns(model, processor, row)
        for name, values in columns.items():
            torch.testing.assert_close(getattr(trace, name)[row].double(), values, atol=1e-4, rtol=0)
        torch.testing.assert_close(trace.features[row], features, atol=1e-4, rtol=0)
    assert trace.sample_ids == ("a", "b", "c")
    assert trace.num_visual.tolist() == [16] * 3
    assert trace.risk[:, 0].min() > 0.05, "a random model whose exits change nothing tests nothing"
    assert trace.risk[:, -1].eq(0).all()
    assert trace.reverse_risk[:, -1].eq(0).all()
    assert trace.same_answer[:, -1].eq(1).all()
    assert trace.num_layers == LAYERS


def test_batch_equals_rows_one_by_one_and_an_unpadded_batch_needs_no_mask(backbone) -> None:
    model, processor = backbone
    inputs, answer = batch_of(processor, [0, 1, 2], "left")
    together = trace_exits(model, inputs, answer)
    for row in range(3):
        alone = trace_exits(model, *batch_of(processor, [row], "left"))
        for name in ("risk", "loss", "features"):
            torch.testing.assert_close(getattr(together, name)[row : row + 1], getattr(alone, name))


def test_nothing_is_left_on_the_model_even_after_an_error(backbone) -> None:
    model, processor = backbone
    inputs, answer = batch_of(processor, [0, 1], "left")
    before = model(**inputs).logits

    def state():
        return {
            name: ("forward" in vars(m), list(m._forward_hooks), list(m._forward_pre_hooks))
            for name, m in model.named_modules()
        }

    clean = state()
    trace_exits(model, inputs, answer)
    assert state() == clean

    def fail(*_):
        raise ArithmeticError("in the middle of the pass")

    handle = describe(model).layers[2].mlp.register_forward_hook(fail)
    with pytest.raises(ArithmeticError):
        trace_exits(model, inputs, answer)
    handle.remove()
    assert state() == clean
    assert torch.equal(model(**inputs).logits, before)


def test_a_wrapper_that_was_there_before_is_put_back(backbone) -> None:
    model, processor = backbone
    layer = describe(model).layers[1]
    calls = []
    plain = layer.forward

    def counting(*args, **kwargs):
        calls.append(1)
        return plain(*args, **kwargs)

    layer.forward = counting
    try:
        trace_exits(model, *batch_of(processor, [0], "left"))
        assert layer.forward is counting
        assert calls
    finally:
        del layer.forward


def flash_stand_in(module, query, key, value, attention_mask, **kwargs):
    """What flash attention computes from a 2D key mask: queries are the last keys; causal after unpadding."""
    assert attention_mask is None or attention_mask.dim() == 2
    batch, heads, num_queries, _ = query.shape
    num_keys = key.shape[2]
    key = key.repeat_interleave(heads // key.shape[1], 1)
    value = value.repeat_interleave(heads // value.shape[1], 1)
    valid = torch.ones(batch, num_keys) if attention_mask is None else attention_mask
    valid = valid.bool()
    order = valid.long().cumsum(1)
    allowed = valid[:, None, :] & (order[:, None, :] <= order[:, -num_queries:, None])
    allowed = (allowed | ~valid[:, -num_queries:, None])[:, None]
    return torch.nn.functional.scaled_dot_product_attention(query, key, value, allowed).transpose(1, 2), None


def test_flash_attention_gets_the_masks_it_can_use(backbone) -> None:
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import flash_attention_mask

    AttentionInterface.register("flash_stand_in", flash_stand_in)
    AttentionMaskInterface.register("flash_stand_in", flash_attention_mask)
    model, processor = backbone
    inputs, answer = batch_of(processor, [0, 1, 2], "left")
    expected = trace_exits(model, inputs, answer)
    other, _ = tiny_llava(layers=LAYERS)
    describe(other).decoder.config._attn_implementation = "flash_stand_in"
    found = trace_exits(other, inputs, answer)
    for name in ("risk", "loss", "features"):
        torch.testing.assert_close(getattr(found, name), getattr(expected, name), atol=1e-4, rtol=0)
    # Frozen visual tokens, and rows that share an image.
    inputs["pixel_values"] = inputs["pixel_values"][[0, 1, 0]]
    expected = trace_exits(model, inputs, answer, freezes=(0, 2), share_images=False)
    found = trace_checked(other, inputs, answer, freezes=(0, 2))
    assert found.num_images == 2
    close(found.trace, expected)
    # A word between the visual tokens: flash attention cannot mask it.
    ids = inputs["input_ids"].clone()
    at = (ids == model.config.image_token_id).nonzero().view(3, -1, 2)[:, 3]
    ids[at[:, 0], at[:, 1]] = 10
    with pytest.raises(
        UnsupportedBackboneError, match="flash attention cannot freeze visual tokens of llava"
    ):
        trace_exits(other, {**inputs, "input_ids": ids}, answer, freezes=(0,))


def test_tracing_and_exits_do_not_mix(backbone) -> None:
    from dyvte.errors import ExitRuntimeError
    from dyvte.runtime import VisualExit

    model, processor = backbone
    with VisualExit.fixed(2)(model), pytest.raises(ExitRuntimeError, match="leave that one"):
        trace_exits(model, *batch_of(processor, [0], "left"))


def test_features_do_not_see_the_answer(backbone) -> None:
    model, processor = backbone
    template = get_template("auto", processor)
    images = [[random_image(0)]]

    def features(answer: str) -> torch.Tensor:
        rendered = [template.render(QUESTIONS[0], answer)]
        return trace_exits(model, *encode(processor, rendered, images, padding_side="left")).features

    torch.testing.assert_close(features("red"), features("two and three blue objects"))


def test_rows_without_an_image_are_the_full_model_at_every_exit(backbone) -> None:
    model, processor = backbone
    template = get_template("auto", processor)
    rendered = [template.render(QUESTIONS[0], "red"), template.render("how many ?", "two", has_image=False)]
    inputs, answer = encode(processor, rendered, [[random_image(0)], []], padding_side="left")
    trace = trace_exits(model, inputs, answer)
    assert trace.num_visual.tolist() == [16, 0]
    torch.testing.assert_close(trace.risk[1], torch.zeros(LAYERS + 1), atol=1e-5, rtol=0)
    columns, _ = reference_columns(model, processor, 0)
    torch.testing.assert_close(trace.risk[0].double(), columns["risk"], atol=1e-4, rtol=0)


def test_refusals_name_the_samples(backbone) -> None:
    model, processor = backbone
    inputs, answer = batch_of(processor, [0, 1], "left")
    nothing = answer.clone()
    nothing[1] = False
    with pytest.raises(DataError, match=r"\['y'\] have no answer token"):
        trace_exits(model, inputs, nothing, sample_ids=["x", "y"])
    after_image = answer.clone()
    after_image[0, int((inputs["input_ids"][0] == model.config.image_token_id).nonzero().max()) + 1] = True
    with pytest.raises(DataError, match=r"\['x'\].*visual"):
        trace_exits(model, inputs, after_image, sample_ids=["x", "y"])
    with pytest.raises(ValueError, match="exits_per_chunk"):
        trace_exits(model, inputs, answer, exits_per_chunk=0)
