"""What teacher and runtime both do to a decoder layer."""

import copy

import pytest
import torch

from dyvte.decoder import Slots, replace_forward, returns_early, wrap_layers
from dyvte.decoder.attention import KeysAlone, query_projections, use_attention
from dyvte.decoder.caches import Capture, Interleaved
from dyvte.decoder.masks import cut_mask
from dyvte.errors import ExitRuntimeError
from tests.helpers.batches import llava
from tests.helpers.models import tiny_llava


def a_layer():
    decoder = copy.deepcopy(llava()[0].get_decoder())
    states = torch.randn(2, 5, 32, generator=torch.Generator().manual_seed(0))
    rotary = decoder.rotary_emb(states, torch.arange(5)[None])
    return decoder.layers[1], states, {"position_embeddings": rotary, "attention_mask": None}


@pytest.mark.parametrize("asks_for_all_heads", [False, True])
def test_keys_alone_are_those_of_the_layer(asks_for_all_heads):
    layer, states, kwargs = a_layer()
    capture, widths = Capture(), []
    layer(states, **kwargs, past_key_values=capture)

    def look(module, args, output):
        widths.append(output.shape[-1])
        return output.view(2, 5, 4, 8).flatten(2) if asks_for_all_heads else output

    layer.self_attn.q_proj.register_forward_hook(look)
    alone = KeysAlone()
    for _ in range(2):
        keys, values = alone(layer, layer.forward, states, **kwargs)
        assert torch.equal(keys, capture.keys)
        assert torch.equal(values, capture.values)
    # one head, or once in vain and then all four
    assert widths == ([8, 32, 32] if asks_for_all_heads else [8, 8])
    assert not any("forward" in vars(module) for module in layer.modules())
    assert query_projections(layer) == (layer.self_attn.q_proj,)


def test_an_error_that_is_no_shape_comes_through():
    layer, states, kwargs = a_layer()

    def fail(*_):
        raise RuntimeError("out of order")

    layer.self_attn.k_proj.register_forward_hook(fail)
    with pytest.raises(RuntimeError, match="out of order"):
        KeysAlone()(layer, layer.forward, states, **kwargs)
    assert not any("forward" in vars(module) for module in layer.modules())


def test_known_keys_stand_where_they_are_told():
    known, given = torch.arange(3.0).view(1, 1, 3, 1), torch.arange(3.0, 5.0).view(1, 1, 2, 1)
    order = torch.tensor([[3, 0, 1, 2, 4]])
    for told in (order, [(3, 4), (0, 3), (4, 5)]):
        cache = Interleaved(known, known + 10, told)
        keys, values = cache.update(given, given + 10)
        assert keys.flatten().tolist() == order[0].tolist()
        assert torch.equal(values, keys + 10)
        assert cache.keys is keys


def test_an_empty_slot_repeats_its_rows_first_token():
    slots = Slots.of(torch.tensor([[False, True, True, False], [False, False, False, True]]))
    assert slots.index.tolist() == [[1, 2], [3, 3]]
    assert slots.valid.tolist() == [[True, True], [True, False]]
    mask = cut_mask(None, slots, slots, "sdpa")
    assert mask[:, 0].tolist() == [[[True, False], [True, True]], [[True, False], [True, False]]]


def test_layers_are_wrapped_once_and_given_back():
    layer, states, kwargs = a_layer()
    expected = layer(states, **kwargs)
    seen = []

    def run(index, forward, hidden, given):
        seen.append((index, sorted(given)))
        return forward(hidden, **given)

    give_back = wrap_layers([layer], run)
    with pytest.raises(ExitRuntimeError, match="leave that one first"):
        wrap_layers([layer], run)
    # some families pass the mask by position
    got = layer(states, None, position_embeddings=kwargs["position_embeddings"])
    give_back()
    assert torch.equal(got, expected)
    assert seen == [(0, ["attention_mask", "position_embeddings"])]
    assert "forward" not in vars(layer)


def test_another_tools_forward_stays_with_a_warning():
    layer, _, _ = a_layer()
    give_back = replace_forward(layer, lambda: 1)
    layer.forward = another = lambda: 2
    with pytest.warns(UserWarning, match="another tool replaced"):
        give_back()
    assert layer.forward is another


def test_an_attention_function_of_ours_runs_in_one_module_alone():
    layer, states, kwargs = a_layer()
    expected, shared, calls = layer(states, **kwargs), layer.self_attn.config, []

    def attend(module, query, key, value, mask, **options):
        calls.append(query.shape)
        return torch.zeros(2, 5, 4, 8), None

    undo = use_attention(layer.self_attn, attend)
    assert not torch.equal(layer(states, **kwargs), expected)
    undo()
    assert calls == [(2, 4, 5, 8)]
    assert layer.self_attn.config is shared
    assert torch.equal(layer(states, **kwargs), expected)


def test_a_model_once_asked_for_attentions_may_still_stop_early():
    model, _ = tiny_llava(attn_implementation="eager")
    layers = model.get_decoder().layers
    with torch.no_grad():
        model(input_ids=torch.tensor([[1, 5, 6]]), output_attentions=True)
    assert any(layer.self_attn._forward_hooks for layer in layers)
    assert all(returns_early(layer) for layer in layers)
    layers[2].self_attn.register_forward_pre_hook(lambda module, args: None)
    assert [returns_early(layer) for layer in layers] == [True, True, False, True]
