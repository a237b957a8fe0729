"""Flash attention by construction: whatever the exits, it is handed 2D masks or none, never a 4D one.

A stand-in takes its place: it refuses any other mask, is causal by itself (aligned to the last key), hides
what a 2D mask hides, and counts its calls.
"""

import pytest
import torch
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import flash_attention_mask

import dyvte
from dyvte.policies import OraclePolicy
from tests.helpers.families import ATTENTION, FAMILIES, build
from tests.helpers.passes import about_images
from tests.helpers.reference import greedy_cached

NAME = "flash_attention_two_dimensional"
CAUSAL = [family for family in FAMILIES if family not in ATTENTION]
EXITS = ([1, -1, 3], [0, -1, 4], [2, -1, 2])


@pytest.fixture
def calls():
    """(query length, key length, has a mask) of every call."""
    seen = []

    def stand_in(module, query, key, value, attention_mask, **kwargs):
        if attention_mask is not None and attention_mask.dim() != 2:
            raise AssertionError(f"handed a mask of shape {tuple(attention_mask.shape)}")
        queries, keys = query.shape[2], key.shape[2]
        seen.append((queries, keys, attention_mask is not None))
        allowed = torch.ones(queries, keys, dtype=torch.bool).tril(keys - queries)[None, None]
        if attention_mask is not None:
            assert attention_mask.shape == (len(query), keys)
            allowed = allowed & attention_mask[:, None, None].bool()
            # a query that sees nothing is padding, and its result is of no interest
            allowed = allowed | ~allowed.any(-1, keepdim=True)
        return sdpa_attention_forward(module, query, key, value, allowed, **kwargs)

    AttentionInterface.register(NAME, stand_in)
    AttentionMaskInterface.register(NAME, flash_attention_mask)
    return seen


@pytest.mark.parametrize("family", CAUSAL)
def test_every_family_gives_what_sdpa_gives(family, calls, monkeypatch):
    model, inputs, visual_ids = build(family, "sdpa")
    config = model.get_decoder().config
    for exits in EXITS if family in ("llava", "qwen3_vl") else EXITS[:1]:
        policy = dyvte.VisualExit.from_policy(OraclePolicy(exits))
        with policy(model):
            expected, expected_tokens, _ = greedy_cached(model, inputs, visual_ids, 4)
        calls.clear()
        with monkeypatch.context() as patch, policy(model):
            patch.setattr(config, "_attn_implementation_internal", NAME)
            got, tokens, _ = greedy_cached(model, inputs, visual_ids, 4)
        assert len(calls) >= 5 * 4  # it really ran: a prefill and four steps of four layers
        torch.testing.assert_close(got, expected, rtol=0, atol=1e-4)
        assert torch.equal(tokens, expected_tokens)
        # text streams are compact: from the second layer on shorter than the padded batch
        assert any(q == k < inputs["input_ids"].shape[1] and q > 1 for q, k, _ in calls)


@pytest.mark.parametrize("family", ["llava", "qwen2_vl", "qwen3_vl"])
def test_stored_images_give_what_sdpa_gives(family, calls, monkeypatch):
    (model, inputs, visual_ids), _, _ = about_images(family, "sdpa")
    # of the rows with two images, the text between them could not be left out
    config, exits, store = model.get_decoder().config, [0, 2, 4, -1, 1, 3], dyvte.ImageStore()
    policy = dyvte.VisualExit.from_policy(OraclePolicy(exits))
    with policy(model), torch.no_grad():
        expected, expected_tokens, _ = greedy_cached(model, inputs, visual_ids, 3)
    for _ in range(2):
        with monkeypatch.context() as patch, policy(model, images=store) as run, torch.no_grad():
            patch.setattr(config, "_attn_implementation_internal", NAME)
            got, tokens, _ = greedy_cached(model, inputs, visual_ids, 3)
        torch.testing.assert_close(got, expected, rtol=0, atol=1e-4)
        assert torch.equal(tokens, expected_tokens)
    record = run.records[0]
    assert record.shared_B.tolist() == [True, True, True, False, False, False]
    assert record.not_shared == "flash attention cannot leave out the text between visual tokens"
