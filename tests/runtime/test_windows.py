"""Layers with a short window: what their cache keeps, and everything `generate` does with it."""

import pytest
import torch
from transformers import DynamicCache

import dyvte
from dyvte.decoder import Window, layer_windows
from dyvte.errors import ExitRuntimeError
from dyvte.policies import OraclePolicy
from tests.helpers.families import ATTENTION, FAMILIES
from tests.helpers.reference import exit_by_masks
from tests.helpers.zoo.gemma_like import WINDOW

EXITS = [1, -1, 3]


def oracle(exits=EXITS):
    return dyvte.VisualExit.from_policy(OraclePolicy(exits))


@pytest.mark.parametrize("family", ["gemma3", "llava over mistral"])
def test_beam_search_equals_brute_force(family):
    model, inputs, visual_ids = FAMILIES[family]("sdpa")
    options = {"max_new_tokens": 5, "do_sample": False, "num_beams": 2}
    with exit_by_masks(model, EXITS, visual_ids, attention=ATTENTION[family]):
        expected = model.generate(**inputs, **options, use_cache=False)
    with oracle()(model):
        assert torch.equal(model.generate(**inputs, **options), expected)


def every_row_with_an_image(inputs):
    """Without the row that has none, so that the first layers keep the stock cache."""
    kept = {name: value[[0, 2]] if value.shape[0] == 3 else value for name, value in inputs.items()}
    return kept | {"pixel_values": inputs["pixel_values"]}


@pytest.mark.parametrize("exits", [[2, 3], [1, 4], [3, 3]])
@pytest.mark.parametrize("family", ["gemma3", "llava over mistral"])
def test_stock_layers_before_the_first_exit_equal_brute_force(family, exits):
    model, inputs, visual_ids = FAMILIES[family]("sdpa")
    inputs = every_row_with_an_image(inputs)
    for cache in (None, DynamicCache()):  # with the config's sliding layers, and with full ones
        options = {"max_new_tokens": 9, "do_sample": False, "output_logits": True}
        options["return_dict_in_generate"] = True
        with exit_by_masks(model, exits, visual_ids, attention=ATTENTION[family]):
            expected = model.generate(**inputs, **options, use_cache=False)
        with oracle(exits)(model):
            got = model.generate(**inputs, **options, past_key_values=cache)
        assert torch.equal(got.sequences, expected.sequences)
        for a, b in zip(got.logits, expected.logits, strict=True):
            assert (a - b).abs().max() < 1e-4


@pytest.mark.parametrize("family", ["gemma3", "llava over mistral"])
def test_a_second_text_turn_equals_brute_force(family):
    # several new tokens at once on a shortened cache: each has its own reach
    model, inputs, visual_ids = FAMILIES[family]("sdpa")
    turn_BQ = torch.tensor([[11, 12, 13, 14]]).expand(3, -1)
    first = dict(inputs)
    ids_BN, valid_BN = first.pop("input_ids"), first.pop("attention_mask")
    types = first.pop("token_type_ids", None)
    longer = torch.cat([valid_BN, torch.ones_like(turn_BQ)], 1)
    positions_BN = (longer.cumsum(1) - 1).clamp(min=0)
    tokens = ids_BN.shape[1]
    extra = {} if types is None else {"token_type_ids": types}
    with torch.no_grad(), exit_by_masks(model, EXITS, visual_ids, attention=ATTENTION[family]):
        more = {} if types is None else {"token_type_ids": torch.cat([types, torch.zeros_like(turn_BQ)], 1)}
        expected = model(
            input_ids=torch.cat([ids_BN, turn_BQ], 1),
            attention_mask=longer,
            position_ids=positions_BN,
            use_cache=False,
            **first,
            **more,
        ).logits[:, tokens:]
    with torch.no_grad(), oracle()(model):
        cache = model(
            input_ids=ids_BN,
            attention_mask=valid_BN,
            position_ids=positions_BN[:, :tokens],
            use_cache=True,
            **first,
            **extra,
        ).past_key_values
        got = model(
            input_ids=turn_BQ,
            attention_mask=longer,
            position_ids=positions_BN[:, tokens:],
            past_key_values=cache,
        ).logits
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("family", ["gemma3", "llava over mistral"])
def test_prompt_lookup_goes_back_and_changes_nothing(family):
    model, inputs, _ = FAMILIES[family]("sdpa")
    valid_N = inputs["attention_mask"][0].bool()
    inputs = {name: value[:1, valid_N] if value.dim() == 2 else value[:1] for name, value in inputs.items()}
    # a repeated end, so that candidates are there (and wrong) in the very first pass
    inputs["input_ids"] = inputs["input_ids"].clone()
    inputs["input_ids"][0, -6:] = torch.tensor([20, 21, 22, 23, 20, 21])
    for k in (0, 2):
        with oracle([k])(model):
            greedy = model.generate(**inputs, max_new_tokens=8, do_sample=False)
            guessed = model.generate(**inputs, max_new_tokens=8, do_sample=False, prompt_lookup_num_tokens=2)
        assert torch.equal(guessed, greedy)


def test_sliding_layers_store_no_more_than_their_window():
    model, inputs, _ = FAMILIES["llava over mistral"]("sdpa")
    with oracle()(model) as run:
        model.generate(**inputs, max_new_tokens=1)
    per_token = 2 * 2 * 8 * 4  # K and V, two heads of eight float32
    valid_BN = inputs["attention_mask"].bool()
    text_BN = valid_BN & (inputs["input_ids"] != 3)
    near_BN = torch.zeros_like(valid_BN)
    near_BN[:, 1 - WINDOW :] = True
    # layers 0..3; row 1 has no image, rows 0 and 2 leave after layers 1 and 3
    kept = [
        torch.where(torch.tensor([[k >= 1], [True], [k >= 3]]), text_BN, valid_BN) & near_BN for k in range(4)
    ]
    assert run.records[0].kv_bytes == tuple(int(keep.sum()) * per_token for keep in kept)


def test_a_sliding_layer_does_not_go_back_to_what_it_dropped():
    model, inputs, _ = FAMILIES["llava over mistral"]("sdpa")
    with torch.no_grad(), oracle()(model):
        cache = model(**inputs).past_key_values
        with pytest.raises(ExitRuntimeError, match="cannot go back"):
            cache.layers[-1].crop(-2)


@pytest.fixture
def no_4d_masks():
    """Name of an attention function that, like flash attention, is handed 2D masks or none."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.integrations.sdpa_attention import sdpa_attention_forward
    from transformers.masking_utils import flash_attention_mask

    def causal_only(module, query, key, value, attention_mask, **kwargs):
        assert attention_mask is None or attention_mask.dim() == 2
        if attention_mask is not None:
            attention_mask = attention_mask.bool()[:, None, None]
            assert query.shape[2] == 1, "only decode steps need a padding mask here"
        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)

    name = "flash_attention_stand_in"
    AttentionInterface.register(name, causal_only)
    AttentionMaskInterface.register(name, flash_attention_mask)
    return name


def one_row(inputs):
    valid_N = inputs["attention_mask"][0].bool()
    return {name: value[:1, valid_N] if value.dim() == 2 else value[:1] for name, value in inputs.items()}


def test_without_4d_masks_a_short_window_is_refused_and_a_long_one_is_served(no_4d_masks):
    model, inputs, _ = FAMILIES["llava over mistral"]("sdpa")
    text, inputs = model.model.language_model.config, one_row(inputs)
    text._attn_implementation = no_4d_masks
    with pytest.raises(ExitRuntimeError, match="cannot express a sliding window"), oracle([2])(model):
        model(**inputs)
    text.sliding_window = 28  # the prompt has 25 tokens: the window gets short while decoding
    results = []
    for text._attn_implementation in (no_4d_masks, "sdpa"):
        with oracle([2])(model):
            results.append(model.generate(**inputs, max_new_tokens=9, do_sample=False))
    assert torch.equal(*results)


def test_windows_are_read_from_the_text_config():
    from transformers import CONFIG_MAPPING

    sliding = layer_windows(CONFIG_MAPPING["mistral"](sliding_window=5, num_hidden_layers=2), 2)
    assert sliding == (Window("sliding", 5),) * 2
    assert layer_windows(CONFIG_MAPPING["llama"](), 2) == (None, None)
    gemma = CONFIG_MAPPING["gemma3_text"](
        sliding_window=7, num_hidden_layers=2, layer_types=["sliding_attention", "full_attention"]
    )
    assert layer_windows(gemma, 2) == (Window("sliding", 7), None)


def test_a_chunk_is_counted_from_the_first_real_token():
    query, key = torch.tensor([[[5], [8]]]), torch.tensor([[[3, 4, 7, 8]]])
    assert Window("chunked", 4).reaches(query, key).tolist() == [
        [[False, True, True, False], [False, False, False, True]]
    ]
    assert Window("sliding", 4).reaches(query, key).tolist() == [
        [[True, True, True, True], [False, False, True, True]]
    ]
