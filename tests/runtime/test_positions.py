"""Positions closed up behind an exit (VTW, Table 6): against brute force with ids of its own per layer."""

from contextlib import contextmanager

import pytest
import torch

import dyvte
from dyvte.errors import ConfigError, UnsupportedBackboneError
from dyvte.policies import OraclePolicy
from tests.helpers.batches import QUESTIONS, VISUAL_ID, batch, llava
from tests.helpers.families import FAMILIES
from tests.helpers.models import random_image, tiny_llava
from tests.helpers.reference import exit_by_masks, greedy_cached, greedy_reference
from tests.runtime.test_exact import EXITS

STEPS = 8


def closed_up(exits, **options):
    return dyvte.VisualExit.from_policy(OraclePolicy(exits), positions="rearrange", **options)


@contextmanager
def renumbered(model, exits_P, visual_ids):
    """Inside, layer i counts the text of rows whose exit is <= i without a gap; token by token, by hand."""
    decoder, now = model.get_decoder(), {}

    def look(module, args, kwargs):
        ids_BN = kwargs["input_ids"]
        valid_BN = kwargs.get("attention_mask")
        now["text"] = [
            [n for n, i in enumerate(row.tolist()) if i not in visual_ids and (mask is None or mask[n])]
            for row, mask in zip(ids_BN, [None] * len(ids_BN) if valid_BN is None else valid_BN, strict=True)
        ]

    def swap(index):
        def hook(module, args, kwargs):
            rows = len(now["text"])
            ids_BN = kwargs["position_ids"].expand(rows, -1).clone()
            for row, text in enumerate(now["text"]):
                if exits_P[row * len(exits_P) // rows] <= index:
                    start = int(ids_BN[row, text[0]])
                    for count, n in enumerate(text):
                        ids_BN[row, n] = start + count
            embeddings = decoder.rotary_emb(args[0], ids_BN)
            return args, {**kwargs, "position_ids": ids_BN, "position_embeddings": embeddings}

        return hook

    handles = [model.register_forward_pre_hook(look, with_kwargs=True)]
    for i, layer in enumerate(decoder.layers):
        handles.append(layer.register_forward_pre_hook(swap(i), with_kwargs=True))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@pytest.mark.parametrize("name", ["mixed", "mixed the other way", "all in the middle", "one stays"])
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_prefill_and_decode_equal_brute_force(attention, side, name):
    model, processor = llava(attention)
    exits = EXITS[name]
    inputs = batch(processor, padding_side=side)
    with renumbered(model, exits, [VISUAL_ID]):
        expected, expected_tokens = greedy_reference(model, inputs, exits, [VISUAL_ID], STEPS)
    with closed_up(exits)(model) as run:
        logits, tokens, cache = greedy_cached(model, inputs, [VISUAL_ID], STEPS)
    assert run.exit_layers.tolist() == exits
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-4)
    assert torch.equal(tokens, expected_tokens)
    # what `generate` counts with is the stock number of tokens all the same
    assert cache.get_seq_length() == inputs["input_ids"].shape[1] + STEPS
    with dyvte.VisualExit.from_policy(OraclePolicy(exits))(model):
        kept, _, _ = greedy_cached(model, inputs, [VISUAL_ID], 0)
    assert (kept[:, 0] - logits[:, 0]).abs().max() > 1e-3  # or this would prove nothing


@pytest.mark.parametrize("text", ["user <image> what is <image> it ? assistant", "<image> what is it ?"])
@pytest.mark.parametrize("k", [0, 2])
def test_images_anywhere_in_the_row(text, k):
    model, processor = llava()
    pictures = [random_image(i) for i in range(text.count("<image>"))]
    inputs = processor(text=text, images=pictures, return_tensors="pt", add_special_tokens=False)
    with renumbered(model, [k], [VISUAL_ID]):
        expected, tokens = greedy_reference(model, inputs, [k], [VISUAL_ID], STEPS)
    with dyvte.VisualExit.fixed(k, positions="rearrange")(model):
        logits, got, _ = greedy_cached(model, inputs, [VISUAL_ID], STEPS)
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-4)
    assert torch.equal(got, tokens)


@pytest.mark.parametrize(
    "options", [{}, {"num_beams": 3}, {"do_sample": True, "num_return_sequences": 2}], ids=str
)
def test_generate_equals_brute_force(options):
    model, processor = llava()
    inputs, exits = batch(processor), EXITS["mixed"]
    options = {"do_sample": False, "max_new_tokens": 8, "min_new_tokens": 8, **options}
    with exit_by_masks(model, exits, [VISUAL_ID]), renumbered(model, exits, [VISUAL_ID]):
        torch.manual_seed(0)
        expected = model.generate(**inputs, **options, use_cache=False)
    with closed_up(exits)(model):
        torch.manual_seed(0)
        assert torch.equal(model.generate(**inputs, **options), expected)


def test_never_and_rows_without_an_image_are_untouched():
    model, processor = llava()
    inputs = batch(processor)
    stock, _, _ = greedy_cached(model, inputs, [VISUAL_ID], 2)
    with dyvte.VisualExit.fixed(4, positions="rearrange")(model):
        assert torch.equal(greedy_cached(model, inputs, [VISUAL_ID], 2)[0], stock)
    with dyvte.VisualExit.fixed(1, positions="rearrange")(model):
        logits, _, _ = greedy_cached(model, inputs, [VISUAL_ID], 2)
    row = next(row for row, (_, images) in enumerate(QUESTIONS) if images == 0)
    torch.testing.assert_close(logits[row, 0], stock[row, 0], rtol=0, atol=1e-4)


@pytest.mark.parametrize("family", ["llava_next", "internvl", "idefics3", "paligemma"])
def test_other_families(family):
    from tests.helpers.families import ATTENTION

    model, inputs, visual_ids = FAMILIES[family]("sdpa")
    exits = [1, -1, 3]
    options = {"do_sample": False, "max_new_tokens": 6}
    with (
        exit_by_masks(model, exits, visual_ids, attention=ATTENTION.get(family)),
        renumbered(model, [1, 4, 3], visual_ids),
    ):
        expected = model.generate(**inputs, **options, use_cache=False)
    with closed_up(exits)(model):
        assert torch.equal(model.generate(**inputs, **options), expected)


@pytest.mark.parametrize(
    ("family", "reason"),
    [
        ("qwen2_vl", "M-RoPE"),
        ("qwen2_5_vl", "M-RoPE"),
        ("qwen3_vl", "M-RoPE|deepstack"),
        ("gemma3", "sliding windows"),
        ("llava over mistral", "sliding windows"),
    ],
)
def test_families_that_cannot_be_renumbered_are_refused_by_name(family, reason):
    model, _, _ = FAMILIES[family]("sdpa")
    kind = model.config.model_type
    with (
        pytest.raises(UnsupportedBackboneError, match=rf"{kind}: .*({reason})"),
        dyvte.VisualExit.fixed(1, positions="rearrange")(model),
    ):
        pass
    with dyvte.VisualExit.fixed(1)(model):  # and the default is served
        pass


def test_angles_that_depend_on_the_whole_length_are_refused(monkeypatch):
    model, _ = llava()
    monkeypatch.setitem(model.get_decoder().config.rope_parameters, "rope_type", "dynamic")
    with pytest.raises(UnsupportedBackboneError, match="'dynamic'"), closed_up([1])(model):
        pass


def test_an_unknown_choice_is_refused():
    with pytest.raises(ConfigError, match="'keep', 'rearrange'"):
        dyvte.VisualExit.fixed(1, positions="compact")


@pytest.mark.parametrize("positions", ["keep", "rearrange"])
@pytest.mark.parametrize("text", ["user what <image> is it ?", "<image> what is it ?"])
def test_gaps_in_the_ids_are_not_taken_for_packed_sequences(text, positions):
    # flash attention reads a jump in a single row's ids as the start of another sequence
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.integrations.sdpa_attention import sdpa_attention_forward
    from transformers.masking_utils import flash_attention_mask
    from transformers.modeling_flash_attention_utils import _is_packed_sequence

    def causal_only(module, query, key, value, attention_mask, **kwargs):
        assert attention_mask is None
        assert not _is_packed_sequence(kwargs.get("position_ids"), len(query))
        return sdpa_attention_forward(module, query, key, value, None, **kwargs)

    AttentionInterface.register("flash_attention_unpacked", causal_only)
    AttentionMaskInterface.register("flash_attention_unpacked", flash_attention_mask)
    model, processor = tiny_llava()
    inputs = processor(text=text, images=[random_image(0)], return_tensors="pt", add_special_tokens=False)
    results = []
    for attention in ("flash_attention_unpacked", "sdpa"):
        model.model.language_model.config._attn_implementation = attention
        with dyvte.VisualExit.fixed(2, positions=positions)(model):
            results.append(greedy_cached(model, inputs, [VISUAL_ID], 3)[0])
    torch.testing.assert_close(*results, rtol=0, atol=1e-5)
