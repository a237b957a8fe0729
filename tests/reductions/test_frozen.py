"""Static sets of frozen layers, alone and together with what else can be spent on visual tokens."""

import pytest
import torch

import dyvte
from dyvte.backbones import describe
from dyvte.backbones.sizes import decoder_shape
from dyvte.costs.prefill import layer_flops
from dyvte.costs.reductions import visual_factors
from dyvte.errors import ConfigError, UnsupportedBackboneError
from dyvte.policies import OraclePolicy, parse_policy
from dyvte.reductions import FastV, FrozenLayers, RandomTokens, SparseFFN, parse_reductions
from tests.helpers import support
from tests.helpers.batches import QUESTIONS, VISUAL_ID, batch, llava
from tests.helpers.families import build
from tests.helpers.reference import frozen_by_hooks, greedy_cached, greedy_reference
from tests.helpers.rules import GREEDY, LAYERS, draws, fastv_rule, hidden_by_rule, less_work
from tests.helpers.zoo import generic

SETS = ["0", "3", "1,3", "0-1,3", "0-3"]


def which(text, rows=6):
    """(L, rows) bool: the layers of a set, written out."""
    named = {"0": [0], "3": [3], "1,3": [1, 3], "0-1,3": [0, 1, 3], "0-3": [0, 1, 2, 3], "1-2": [1, 2]}[text]
    return torch.tensor([[index in named] * rows for index in range(LAYERS)])


@pytest.mark.parametrize("text", SETS)
@pytest.mark.parametrize("side", ["left", "right"])
def test_any_set_equals_brute_force(text, side):
    model, processor = llava()
    inputs = batch(processor, padding_side=side)
    never = [LAYERS] * 4 + [-1, LAYERS]
    expected, tokens = greedy_reference(model, inputs, never, [VISUAL_ID], 8, freezes_B=which(text))
    with dyvte.VisualExit(reductions=parse_reductions(f"frozen:{text}"))(model) as run:
        got, got_tokens, _ = greedy_cached(model, inputs, [VISUAL_ID], 8)
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-4)
    assert torch.equal(got_tokens, tokens)
    record = run.records[0]
    frozen_L = which(text)[:, 0]
    num_B1 = record.num_visual_B[:, None]
    assert torch.equal(record.frozen_tokens_BL, num_B1 * frozen_L)
    assert torch.equal(record.visual_tokens_BL, num_B1 * ~frozen_L)
    # what a policy decides is another matter
    assert run.freeze_layers.tolist() == run.exit_layers.tolist() == never


def test_a_set_and_a_freeze_add_up():
    model, processor = llava()
    inputs = batch(processor)
    freezes, exits = [1, 2, 3, 4, 0, 0], [4, 3, 4, 4, -1, 2]
    both = which("1-2") | (torch.tensor(freezes) <= torch.arange(LAYERS)[:, None])
    expected, tokens = greedy_reference(model, inputs, exits, [VISUAL_ID], 8, freezes_B=both)
    policy, frozen = OraclePolicy(exits, freezes), [FrozenLayers([1, 2])]
    with dyvte.VisualExit.from_policy(policy, reductions=frozen)(model):
        got, got_tokens, _ = greedy_cached(model, inputs, [VISUAL_ID], 8)
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-4)
    assert torch.equal(got_tokens, tokens)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("layer", [1, 2, 3])
@pytest.mark.parametrize(
    "layers", [([0, 0, 2], [4, -1, 4]), ([2, 0, 1], [4, -1, 3]), ([1, 0, 4], [3, -1, 4])]
)
@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl"])
def test_fastv_before_and_behind_a_freeze(family, layers, layer, attention):
    # it ranks frozen tokens by the same row of attention, of the text that reads them
    model, inputs, visual_ids = build(family, attention)
    eager, (freezes, exits) = build(family, "eager")[0], layers
    rule = hidden_by_rule(eager, exits, visual_ids, fastv_rule(0.5), layer)
    with rule, frozen_by_hooks(eager, freezes, visual_ids):
        expected = eager.generate(**inputs, **GREEDY, use_cache=False)
    policy = OraclePolicy(exits, freezes)
    with dyvte.VisualExit.from_policy(policy, reductions=[FastV(layer, 0.5)])(model) as run:
        got = model.generate(**inputs, **GREEDY)
    assert torch.equal(got.sequences, expected.sequences)
    for a, b in zip(got.logits, expected.logits, strict=True):
        assert (a - b).abs().max() < 1e-4
    record = run.records[0]
    assert record.score_layers == (layer,)
    read_BL = record.visual_tokens_BL + record.frozen_tokens_BL
    assert (read_BL[[0, 2], :layer] == record.num_visual_B[[0, 2], None]).all()
    left_BL = (record.num_visual_B // 2)[:, None] * (torch.tensor(exits)[:, None] > torch.arange(LAYERS))
    assert torch.equal(read_BL[[0, 2], layer:], left_BL[[0, 2], layer:])


def test_fastv_under_a_short_window():
    model, inputs, visual_ids = build("llava over mistral", "sdpa")
    eager = build("llava over mistral", "eager")[0]
    rule = hidden_by_rule(eager, [LAYERS, -1, LAYERS], visual_ids, fastv_rule(0.5), 2)
    with rule, frozen_by_hooks(eager, [1, 0, 0], visual_ids):
        expected = eager.generate(**inputs, **GREEDY, use_cache=False)
    policy = OraclePolicy([LAYERS, -1, LAYERS], [1, 0, 0])
    with dyvte.VisualExit.from_policy(policy, reductions=[FastV(2, 0.5)])(model):
        got = model.generate(**inputs, **GREEDY)
    assert torch.equal(got.sequences, expected.sequences)


def test_random_tokens_leave_frozen_rows_too():
    model, inputs, visual_ids = build("llava", "sdpa")
    eager, exits, freezes = build("llava", "eager")[0], [LAYERS, -1, 3], [1, 0, 2]
    reduction = RandomTokens(2, seed=5)
    spans, kept_BN = draws(reduction, inputs, visual_ids, ["a", "b", "c"])
    gone_BN = spans.valid_BN & ~kept_BN
    rule = hidden_by_rule(eager, exits, visual_ids, lambda *_: gone_BN, 2)
    with rule, frozen_by_hooks(eager, freezes, visual_ids):
        expected = eager.generate(**inputs, **GREEDY, use_cache=False)
    policy = OraclePolicy(exits, freezes)
    with dyvte.VisualExit.from_policy(policy, reductions=[reduction])(model) as run:
        run.sample_ids = ["a", "b", "c"]
        got = model.generate(**inputs, **GREEDY)
    assert torch.equal(got.sequences, expected.sequences)


@pytest.mark.parametrize("text", ["ffn:0.5", "neighbours:1", "neighbours:1+ffn:0.5"])
def test_yopo_in_the_layers_that_are_not_frozen(text):
    model, inputs, visual_ids = build("llava", "sdpa")
    eager, frozen = build("llava", "eager")[0], [2, 0, 1]
    less = {"neurons": [slice(32)] * LAYERS} if "ffn" in text else {}
    less |= {"radius": 1} if "neighbours" in text else {}
    with less_work(eager, "llava", visual_ids, **less), frozen_by_hooks(eager, frozen, visual_ids):
        expected = eager.generate(**inputs, **GREEDY, use_cache=False)
    policy = OraclePolicy([LAYERS, -1, LAYERS], frozen)
    with dyvte.VisualExit.from_policy(policy, reductions=parse_reductions(text))(model):
        got = model.generate(**inputs, **GREEDY)
    # and with a set
    with dyvte.VisualExit(reductions=parse_reductions(f"{text}+frozen:2-3"))(model):
        by_set = model.generate(**inputs, **GREEDY)
    assert torch.equal(got.sequences, expected.sequences)
    for a, b, c in zip(got.logits, expected.logits, by_set.logits, strict=True):
        assert (a - b).abs().max() < 1e-4
        assert (a - c)[0].abs().max() < 1e-4  # the row that freezes after layer 2


def test_a_row_that_ends_with_its_image_is_updated_though():
    model, processor = llava()
    inputs = batch(processor, QUESTIONS[:1])
    last = int((inputs["input_ids"][0] == VISUAL_ID).nonzero()[-1]) + 1
    inputs = {name: value[:, :last] if value.dim() == 2 else value for name, value in inputs.items()}
    expected = model(**inputs).logits
    exits = dyvte.VisualExit(reductions=[FrozenLayers([0, 2])])
    with pytest.warns(UserWarning, match="no text after the image"), exits(model):
        assert torch.equal(model(**inputs).logits, expected)


def test_the_price_is_that_of_frozen_tokens():
    # a set's factors on all visual tokens, and a record's own counts, say the same
    model, _ = llava()
    shape, layers = decoder_shape(model.config), [1, 3]
    reduction = FrozenLayers(layers)
    reduction.check_backbone(describe(model))
    text_BL, visual_BL = torch.full((1, LAYERS), 9), torch.full((1, LAYERS), 16)
    frozen_L = torch.tensor([index in layers for index in range(LAYERS)])
    by_factors = layer_flops(shape, text_BL, visual_BL, "vtw", visual_factors([reduction], shape, 16))
    by_counts = layer_flops(shape, text_BL, visual_BL * ~frozen_L, "vtw", frozen_BL=visual_BL * frozen_L)
    torch.testing.assert_close(by_factors, by_counts)


def test_its_command_line_form():
    (shortv,) = parse_reductions("frozen:0,2,3,12,17-31")
    assert shortv.layers == (0, 2, 3, 12, *range(17, 32))
    assert repr(shortv) == "frozen:0,2-3,12,17-31"
    assert parse_reductions(repr(shortv))[0].layers == shortv.layers
    shortv.check(32)
    with pytest.raises(ConfigError, match=r"frozen layer 31: expected indices 0\.\.27"):
        shortv.check(28)
    for text in ("", "a", "1,", "3-1", "1,,2", "-1", "1-2,2", "0x1"):
        with pytest.raises(ConfigError, match="layers"):
            parse_reductions(f"frozen:{text}")
    with pytest.raises(ConfigError, match="counted from 0"):
        FrozenLayers([])
    with pytest.raises(ConfigError, match="counted from 0"):
        FrozenLayers([-1, 2])


def test_what_cannot_be_frozen_is_refused_by_name():
    model = generic.tiny(support.transformers.FuyuForCausalLM, support.default_config("fuyu"))
    with pytest.raises(UnsupportedBackboneError, match="fuyu cannot be frozen"):
        dyvte.VisualExit(reductions=[FrozenLayers([1])])(model).__enter__()


def test_all_layers_frozen_is_a_freeze_before_the_first():
    model, processor = llava()
    inputs = batch(processor)
    with dyvte.VisualExit.from_policy(parse_policy("freeze:0"))(model):
        expected = model(**inputs).logits
    with dyvte.VisualExit(reductions=[FrozenLayers(range(LAYERS)), SparseFFN(0.5)])(model):
        assert torch.equal(model(**inputs).logits, expected)
