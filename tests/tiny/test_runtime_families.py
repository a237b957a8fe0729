"""The generic path on other families: equal to brute force, tokens and logits."""

import pytest
import torch

import dyvte
from dyvte.policies import OraclePolicy

from .families import FAMILIES
from .reference import exit_by_masks


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("family", FAMILIES)
def test_generate_equals_brute_force(family, attention):
    model, inputs, visual_ids = FAMILIES[family](attention)
    options = {
        "max_new_tokens": 9,
        "do_sample": False,
        "output_logits": True,
        "return_dict_in_generate": True,
    }
    full = model.generate(**inputs, **options)
    for exits in ([1, -1, 3], [0, -1, 4], [2, -1, 2], [4, -1, 1]):
        with exit_by_masks(model, exits, visual_ids):
            expected = model.generate(**inputs, **options, use_cache=False)
        with dyvte.VisualExit.from_policy(OraclePolicy(exits))(model) as run:
            got = model.generate(**inputs, **options)
        assert run.exit_layers.tolist() == exits
        assert torch.equal(got.sequences, expected.sequences)
        for step, (a, b) in enumerate(zip(got.logits, expected.logits, strict=True)):
            assert (a - b).abs().max() < 1e-4, (exits, step)
        # rows that left early must differ from the full model, or this proves nothing
        assert (got.logits[0][0] - full.logits[0][0]).abs().max() > 1e-3 or exits[0] == 4


@pytest.mark.parametrize("family", FAMILIES)
def test_never_is_the_stock_model(family):
    model, inputs, _ = FAMILIES[family]("sdpa")
    stock = model(**inputs).logits
    with dyvte.VisualExit()(model):
        assert torch.equal(model(**inputs).logits, stock)
