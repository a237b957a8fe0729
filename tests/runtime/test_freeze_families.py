"""Frozen visual tokens on every family, whatever its masks, positions and caches: equal to brute force."""

import itertools

import pytest
import torch
from transformers import DynamicCache

import dyvte
from dyvte.errors import UnsupportedBackboneError
from dyvte.gates import GateConfig, GateStack
from dyvte.policies import OraclePolicy
from tests.helpers import support
from tests.helpers.families import ATTENTION, FAMILIES, build, one_row
from tests.helpers.reference import exit_by_masks, frozen_by_hooks, greedy_cached, greedy_reference
from tests.helpers.zoo import generic
from tests.runtime.test_families import GREEDY, LAYERS, right_padded, stock
from tests.runtime.test_flash import NAME, calls  # noqa: F401
from tests.runtime.test_windows import every_row_with_an_image

# rows: one image, no image, two images; layers that update the image, and that read it
FAST = {"sdpa": ([1, 0, 0], [3, -1, 2]), "eager": ([0, 0, 2], [4, -1, 4])}
REST = [
    ([2, 0, 4], [3, -1, 4]),
    ([0, 0, 1], [1, -1, 2]),
    ([3, 0, 0], [4, -1, 0]),
    ([1, 0, 1], [4, -1, 4]),
]
CAUSAL = [family for family in FAMILIES if family not in ATTENTION]


def schedule(freezes, exits):
    return dyvte.VisualExit.from_policy(OraclePolicy(exits, freezes))


def check(family, attention, freezes, exits, **options):
    model, inputs, visual_ids = build(family, attention)
    options = GREEDY | options
    masks = exit_by_masks(model, exits, visual_ids, attention=ATTENTION.get(family))
    with masks, frozen_by_hooks(model, freezes, visual_ids):
        expected = model.generate(**inputs, **options, use_cache=False)
    with schedule(freezes, exits)(model) as run:
        got = model.generate(**inputs, **options)
    assert torch.equal(got.sequences, expected.sequences)
    if options.get("num_beams", 1) > 1:
        return
    assert run.exit_layers.tolist() == exits
    for step, (a, b) in enumerate(zip(got.logits, expected.logits, strict=True)):
        assert (a - b).abs().max() < 1e-4, (freezes, exits, step)
    # frozen rows must differ from the full model, or this proves nothing; what the last layer makes of visual
    # tokens nobody reads
    change_B = (got.logits[0] - stock(family, attention).logits[0]).abs().amax(1)
    assert all(change_B[row] > 1e-3 for row in (0, 2) if freezes[row] < LAYERS - 1 or exits[row] < LAYERS)


@pytest.mark.parametrize("attention", FAST)
@pytest.mark.parametrize("family", FAMILIES)
def test_generate_equals_brute_force(family, attention):
    check(family, attention, *FAST[attention])


@pytest.mark.full
@pytest.mark.parametrize("layers", [*FAST.values(), *REST], ids=str)
@pytest.mark.parametrize("attention", FAST)
@pytest.mark.parametrize("family", FAMILIES)
def test_generate_equals_brute_force_at_more_schedules(family, attention, layers):
    check(family, attention, *layers)


@pytest.mark.full
@pytest.mark.parametrize("family", FAMILIES)
def test_beam_search_equals_brute_force(family):
    check(family, "sdpa", *FAST["sdpa"], max_new_tokens=6, num_beams=3, num_return_sequences=2)


@pytest.mark.parametrize("family", ["llava", "qwen3_vl", "paligemma", "gemma3", "llava over mistral"])
def test_right_padding_equals_brute_force(family):
    model, inputs, visual_ids = build(family, "sdpa")
    inputs, (freezes, exits) = right_padded(inputs), FAST["sdpa"]
    expected_logits, expected_tokens = greedy_reference(
        model, inputs, exits, visual_ids, 8, attention=ATTENTION.get(family), freezes_B=freezes
    )
    with schedule(freezes, exits)(model):
        logits, tokens, _ = greedy_cached(model, inputs, visual_ids, 8)
    torch.testing.assert_close(logits, expected_logits, rtol=0, atol=1e-4)
    assert torch.equal(tokens, expected_tokens)


@pytest.mark.parametrize("family", ["internvl", "qwen2_5_vl", "gemma3"])
def test_each_row_equals_its_batch_of_one(family):
    model, inputs, visual_ids = build(family, "sdpa")
    freezes, exits = FAST["sdpa"]
    with schedule(freezes, exits)(model):
        together, tokens, _ = greedy_cached(model, inputs, visual_ids, 4)
    for row in range(3):
        with schedule(freezes[row : row + 1], exits[row : row + 1])(model):
            alone, alone_tokens, _ = greedy_cached(model, one_row(family, inputs, row), visual_ids, 4)
        torch.testing.assert_close(alone[0], together[row], rtol=0, atol=1e-4)
        assert torch.equal(alone_tokens[0], tokens[row])


@pytest.mark.parametrize("layers", [([0, 1], [4, 4]), ([1, 2], [2, 4]), ([2, 4], [4, 4])], ids=str)
@pytest.mark.parametrize("family", ["gemma3", "llava over mistral"])
def test_short_windows_on_stock_cache_layers_equal_brute_force(family, layers):
    # no row without an image: the first layers, and frozen ones, keep the stock cache
    model, inputs, visual_ids = build(family, "sdpa")
    inputs, (freezes, exits) = every_row_with_an_image(inputs), layers
    for cache in (None, DynamicCache()):  # with the config's sliding layers, and with full ones
        masks = exit_by_masks(model, exits, visual_ids, attention=ATTENTION[family])
        with masks, frozen_by_hooks(model, freezes, visual_ids):
            expected = model.generate(**inputs, **GREEDY, use_cache=False)
        with schedule(freezes, exits)(model):
            got = model.generate(**inputs, **GREEDY, past_key_values=cache)
        assert torch.equal(got.sequences, expected.sequences)
        for a, b in zip(got.logits, expected.logits, strict=True):
            assert (a - b).abs().max() < 1e-4


@pytest.mark.parametrize("family", CAUSAL)
def test_flash_attention_is_never_handed_a_4d_mask(family, calls, monkeypatch):  # noqa: F811
    # text that reads frozen tokens goes another way, everything else as ever
    model, inputs, visual_ids = build(family, "sdpa")
    config, policy = model.get_decoder().config, schedule(*FAST["sdpa"])
    with policy(model):
        expected, expected_tokens, _ = greedy_cached(model, inputs, visual_ids, 4)
    calls.clear()
    with monkeypatch.context() as patch, policy(model):
        patch.setattr(config, "_attn_implementation_internal", NAME)
        got, tokens, _ = greedy_cached(model, inputs, visual_ids, 4)
    assert len(calls) >= 4 * 4  # at least the decode steps
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-4)
    assert torch.equal(tokens, expected_tokens)
    assert config is model.get_decoder().layers[0].self_attn.config


def test_deepstack_is_added_to_frozen_states_as_to_others():
    # behind its first layers, by the decoder: a frozen layer hands on what it was given
    model, inputs, _ = build("qwen3_vl", "sdpa")
    visual_BN = inputs["input_ids"] == model.config.image_token_id
    with schedule([0, 0, 0], [4, -1, 4])(model):
        states = model(**inputs, output_hidden_states=True).hidden_states[:LAYERS]
    moved = [bool((b - a)[visual_BN].abs().amax() > 1e-3) for a, b in itertools.pairwise(states)]
    depth = len(model.config.vision_config.deepstack_visual_indexes)
    assert moved == [False] + [True] * depth + [False] * (LAYERS - 2 - depth)


def test_a_family_without_query_projections_is_refused_by_name():
    model = generic.tiny(support.transformers.FuyuForCausalLM, support.default_config("fuyu"))
    with pytest.raises(UnsupportedBackboneError, match=r"fuyu cannot be frozen.*layer 1.*query_key_value"):
        dyvte.VisualExit.fixed(3, freeze_layer=1)(model).__enter__()
    config = model.get_decoder().config
    fields = {"num_layers": config.num_hidden_layers, "hidden_size": config.hidden_size}
    gates = GateStack.init(GateConfig(**fields, freeze_head=True))
    with pytest.raises(UnsupportedBackboneError, match="fuyu cannot be frozen"):
        dyvte.VisualExit(gates)(model).__enter__()
    assert not any("forward" in vars(module) for module in model.modules())
    with dyvte.VisualExit(GateStack.init(GateConfig(**fields)))(model):
        pass  # nor do gates without a freeze head ask for it
    with dyvte.VisualExit.fixed(3, freeze_layer=3)(model):
        pass  # an exit it can do
