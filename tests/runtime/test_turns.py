"""What people do with a whole family: sampling, prompt lookup, turns on one cache, images omitted."""

import inspect
import re

import pytest
import torch
import transformers
from transformers import DynamicCache

import dyvte
from dyvte.errors import ExitRuntimeError, NoVisualTokensError
from dyvte.policies import OraclePolicy
from dyvte.runtime.arguments import IMAGE_ARGUMENTS
from tests.helpers import support
from tests.helpers.families import ATTENTION, FAMILIES, build, one_row
from tests.helpers.reference import exit_by_masks, greedy_cached

EXITS = [1, -1, 3]  # rows: one image, no image, two images
GREEDY = {"do_sample": False, "max_new_tokens": 6}


def oracle(exits=EXITS):
    return dyvte.VisualExit.from_policy(OraclePolicy(exits))


def by_masks(model, family, visual_ids, exits=EXITS):
    return exit_by_masks(model, exits, visual_ids, attention=ATTENTION.get(family))


@pytest.mark.full
@pytest.mark.parametrize("family", FAMILIES)
def test_sampled_return_sequences_equal_brute_force(family):
    model, inputs, visual_ids = build(family, "sdpa")
    options = {"max_new_tokens": 6, "do_sample": True, "top_k": 20, "num_return_sequences": 2}
    with by_masks(model, family, visual_ids):
        torch.manual_seed(0)
        expected = model.generate(**inputs, **options, use_cache=False)
    with oracle()(model) as run:
        torch.manual_seed(0)
        assert torch.equal(model.generate(**inputs, **options), expected)
    assert run.exit_layers.tolist() == [k for k in EXITS for _ in range(2)]


@pytest.mark.full
@pytest.mark.parametrize("family", FAMILIES)
def test_prompt_lookup_equals_greedy(family):
    model, inputs, _ = build(family, "sdpa")
    inputs = one_row(family, inputs, 0)
    # a repeated end, so that candidates are there (and wrong) in the very first pass
    inputs["input_ids"] = inputs["input_ids"].clone()
    inputs["input_ids"][0, -6:] = torch.tensor([20, 21, 22, 23, 20, 21])
    for k in (0, 2):
        with oracle([k])(model):
            greedy = model.generate(**inputs, **GREEDY)
            guessed = model.generate(**inputs, **GREEDY, prompt_lookup_num_tokens=2)
        assert torch.equal(guessed, greedy)


def second_text_turn(family, exits):
    model, inputs, visual_ids = build(family, "sdpa")
    more = torch.tensor([[11, 12, 13, 14]]).expand(3, -1)

    def turn(first, **options):
        ids = torch.cat([first, more], 1)
        added = torch.ones(3, ids.shape[1] - inputs["input_ids"].shape[1], dtype=torch.long)
        mask = torch.cat([inputs["attention_mask"], added], 1)
        return model.generate(input_ids=ids, attention_mask=mask, **GREEDY, **options), added

    with by_masks(model, family, visual_ids, exits):
        first = model.generate(**inputs, **GREEDY, use_cache=False)
        again = {n: v for n, v in inputs.items() if n not in ("input_ids", "attention_mask")}
        added = first.shape[1] + more.shape[1] - inputs["input_ids"].shape[1]
        for name in again.keys() & {"token_type_ids", "mm_token_type_ids"}:
            again[name] = torch.nn.functional.pad(again[name], (0, added))
        expected, _ = turn(first, use_cache=False, **again)
    with oracle(exits)(model) as run:
        cache = DynamicCache(config=model.config)
        got_first = model.generate(**inputs, **GREEDY, past_key_values=cache)
        got, _ = turn(got_first, past_key_values=cache)
    assert torch.equal(got_first, first)
    assert torch.equal(got, expected)
    assert len(run.records) == 1


@pytest.mark.parametrize("family", ["qwen2_vl", "paligemma"])
def test_a_second_text_turn_equals_brute_force(family):
    second_text_turn(family, EXITS)


@pytest.mark.full
@pytest.mark.parametrize("exits", [[0, -1, 4], [2, -1, 2]], ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_second_text_turn_equals_brute_force_in_all_families(family, exits):
    second_text_turn(family, exits)


def image_again(inputs, cache):
    """The same prompt and images as a further turn on a cache."""
    mask = torch.cat([inputs["attention_mask"]] * 2, 1)
    return {**inputs, "attention_mask": mask, "past_key_values": cache}


@pytest.mark.parametrize("family", ATTENTION)
def test_a_new_image_in_a_later_turn_is_refused_where_attention_has_a_rule_of_its_own(family):
    model, inputs, _ = build(family, "sdpa")
    with torch.no_grad(), oracle()(model) as run:
        cache = model(**inputs).past_key_values
        with pytest.raises(ExitRuntimeError, match="new image in a later turn"):
            model(**image_again(inputs, cache))
        # a text-only start does not help: the cache already has a past
        text = model(input_ids=torch.tensor([[9, 10, 11]] * 3)).past_key_values
        mask = torch.cat([torch.ones(3, 3, dtype=torch.long), inputs["attention_mask"]], 1)
        with pytest.raises(ExitRuntimeError, match="new image in a later turn"):
            model(**{**inputs, "attention_mask": mask, "past_key_values": text})
    assert len(run.records) == 1


@pytest.mark.parametrize("family", ["llava", "internvl", "paligemma"])
def test_a_new_image_in_a_later_turn_is_stock_where_nothing_leaves(family):
    model, inputs, _ = build(family, "sdpa")

    def two_turns():
        with torch.no_grad():
            return model(**image_again(inputs, model(**inputs).past_key_values)).logits

    stock = two_turns()
    with dyvte.VisualExit()(model) as run:
        assert torch.equal(two_turns(), stock)
    assert [one.exit_layers_B.tolist() for one in run.records] == [[4, -1, 4]] * 2


@pytest.mark.parametrize("family", FAMILIES)
def test_positions_count_visual_tokens_that_no_layer_saw(family):
    model, inputs, visual_ids = build(family, "sdpa")
    with oracle([0, -1, 0])(model) as run:
        _, _, cache = greedy_cached(model, inputs, visual_ids, 3)
    assert cache.get_seq_length() == inputs["input_ids"].shape[1] + 3
    assert run.exit_layers.tolist() == [0, -1, 0]


@pytest.mark.parametrize("family", FAMILIES)
def test_images_without_visual_tokens_are_an_error(family):
    # most models notice by themselves; where one does not, the runtime does
    model, inputs, visual_ids = build(family, "sdpa")
    ids = inputs["input_ids"].clone()
    ids[torch.isin(ids, torch.tensor(visual_ids))] = 9
    with dyvte.VisualExit.fixed(2)(model), pytest.raises((NoVisualTokensError, ValueError)):
        model(**{**inputs, "input_ids": ids})


def test_every_way_to_hand_over_an_image_is_known():
    # or an image could come in by a name that nobody looks at
    table = support.parse(support.FILE.read_text())
    for row in table.values():
        if row.status == "refused":
            continue
        names = inspect.signature(getattr(transformers, row.model_class).forward).parameters
        for name in names:
            if re.search("pixel_values|image_patches|image_embeds|image_hidden|image_features", name):
                # the parts that come beside pixel_values
                extra = name in ("pixel_values_local", "high_res_pixel_values")
                assert extra or name in IMAGE_ARGUMENTS, (row.family, name)


def test_logits_to_keep_changes_nothing_but_the_number_of_logits():
    model, inputs, _ = build("llava", "sdpa")
    with torch.no_grad(), oracle()(model):
        all_of_them = model(**inputs).logits
        for keep in (1, 3, torch.tensor([0, 5, -1])):
            kept = model(**inputs, logits_to_keep=keep).logits
            wanted = all_of_them[:, -keep:] if isinstance(keep, int) else all_of_them[:, keep]
            torch.testing.assert_close(kept, wanted, rtol=0, atol=1e-5)
