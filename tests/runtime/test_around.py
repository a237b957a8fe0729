"""The tools people put around a backbone: PEFT, offloading, checkpointing, low precision, torch.compile."""

import copy

import pytest
import torch

import dyvte
from dyvte.errors import ExitRuntimeError
from dyvte.gates import GateConfig, GateStack
from dyvte.policies import OraclePolicy
from tests.helpers.batches import VISUAL_ID, batch, llava
from tests.helpers.models import tiny_llava
from tests.helpers.reference import exit_by_masks, greedy_cached, greedy_reference

EXITS = [0, 1, 2, 4, -1, 3]
# peft asks for it
pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")


def oracle(exits=EXITS):
    return dyvte.VisualExit.from_policy(OraclePolicy(exits))


def make_gates():
    """Gates whose rows leave at different layers of the tiny models."""
    gates = GateStack.init(GateConfig(num_layers=4, hidden_size=32, architecture="compact"), 0)
    generator = torch.Generator().manual_seed(3)
    for parameter in gates.parameters():
        torch.nn.init.normal_(parameter, generator=generator)
    return gates.requires_grad_(False)


def with_lora(seed=0):
    from peft import LoraConfig, get_peft_model

    model, processor = tiny_llava()
    torch.manual_seed(seed)
    config = LoraConfig(r=4, target_modules=["q_proj", "v_proj", "down_proj"], init_lora_weights=False)
    return get_peft_model(model, config).eval(), processor


def test_gates_and_generate_on_a_lora_backbone_equal_the_merged_model():
    wrapped, processor = with_lora()
    inputs = batch(processor)
    options = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}
    merged = copy.deepcopy(wrapped).merge_and_unload()
    exits = dyvte.VisualExit(make_gates())
    with exits(wrapped) as run:
        got = wrapped.generate(**inputs, **options)
    with exits(merged) as expected_run:
        expected = merged.generate(**inputs, **options)
    assert torch.equal(got, expected)
    assert run.exit_layers.tolist() == expected_run.exit_layers.tolist()
    assert len(set(run.exit_layers.tolist())) >= 3
    torch.testing.assert_close(run.gate_logits, expected_run.gate_logits, atol=1e-4, rtol=0, equal_nan=True)
    with exit_by_masks(merged, run.exit_layers, [VISUAL_ID]):
        assert torch.equal(merged.generate(**inputs, **options, use_cache=False), expected)


def gradients(wrapped, inputs, **options):
    wrapped.zero_grad()
    positions = (inputs["attention_mask"].cumsum(1) - 1).clamp(min=0)
    wrapped(**inputs, position_ids=positions, **options).logits[:, -1].float().log_softmax(-1)[
        :, 7
    ].sum().backward()
    return {name: p.grad.clone() for name, p in wrapped.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("checkpointing", [None, False, True], ids=["plain", "checkpointed", "reentrant"])
@pytest.mark.parametrize("use_cache", [True, False])
def test_lora_gradients_behind_an_exit_equal_brute_force(checkpointing, use_cache):
    wrapped, processor = with_lora()
    inputs = batch(processor)
    with exit_by_masks(wrapped.get_base_model(), EXITS, [VISUAL_ID]):
        expected = gradients(wrapped, inputs, use_cache=False)
    if checkpointing is not None:
        wrapped.get_base_model().activation_checkpointing_enable({"use_reentrant": checkpointing})
        if checkpointing:  # re-entrant checkpoints ask for an input with a gradient
            wrapped.get_base_model().enable_input_require_grads()
        wrapped.train()
        layers = wrapped.get_base_model().get_decoder().layers
        assert all(layer.gradient_checkpointing and layer.training for layer in layers)
    with oracle()(wrapped) as run:
        got = gradients(wrapped, inputs, use_cache=use_cache)
    assert run.exit_layers.tolist() == EXITS
    assert max(value.abs().max() for value in expected.values()) > 1e-3
    for name, value in expected.items():
        torch.testing.assert_close(got[name], value, rtol=1e-3, atol=1e-5, msg=name)


@pytest.mark.parametrize("first", ["hooks", "block"])
def test_offloaded_weights(first):
    from accelerate import cpu_offload
    from accelerate.hooks import remove_hook_from_submodules

    stock, processor = llava()
    inputs = batch(processor)
    exits = dyvte.VisualExit(make_gates())
    with exits(stock) as run:
        expected, tokens, _ = greedy_cached(stock, inputs, [VISUAL_ID], 4)
    model = copy.deepcopy(stock)
    if first == "hooks":
        cpu_offload(model, execution_device=torch.device("cpu"))
        with exits(model) as offloaded:
            got, got_tokens, _ = greedy_cached(model, inputs, [VISUAL_ID], 4)
    else:
        with exits(model) as offloaded:
            cpu_offload(model, execution_device=torch.device("cpu"))
            got, got_tokens, _ = greedy_cached(model, inputs, [VISUAL_ID], 4)
            remove_hook_from_submodules(model)
    assert torch.equal(got, expected)
    assert torch.equal(got_tokens, tokens)
    assert offloaded.exit_layers.tolist() == run.exit_layers.tolist()


def test_bfloat16_is_as_close_to_brute_force_as_brute_force_is_to_float32():
    model, processor = llava()
    inputs = batch(processor)
    half = copy.deepcopy(model).to(torch.bfloat16)
    short = {**inputs, "pixel_values": inputs["pixel_values"].to(torch.bfloat16)}
    exact, _ = greedy_reference(model, inputs, EXITS, [VISUAL_ID], 0)
    rounded, _ = greedy_reference(half, short, EXITS, [VISUAL_ID], 0)
    with oracle()(half):
        got, _, cache = greedy_cached(half, short, [VISUAL_ID], 0)
    assert got.dtype == cache.layers[3].keys.dtype == torch.bfloat16
    assert (got.float() - exact).abs().max() <= 2 * (rounded.float() - exact).abs().max()
    with dyvte.VisualExit(make_gates(), threshold=1.0)(half) as run:
        half(**short)
    with dyvte.VisualExit(make_gates(), threshold=1.0)(model) as full:
        model(**inputs)
    assert run.gate_logits.dtype == torch.float32
    change = (run.gate_logits - full.gate_logits)[:, :3].nan_to_num().abs().max()
    assert 0 < change < 0.1 * full.gate_logits[:, :3].nan_to_num().abs().max()


@pytest.mark.full  # tracing takes a minute
@pytest.mark.parametrize("order", ["compiled first", "block first"])
def test_a_compiled_model_is_exact(order):
    torch._dynamo.reset()
    stock, processor = llava()
    inputs = batch(processor)
    exits = dyvte.VisualExit(make_gates())
    with exits(stock) as run:
        expected, tokens, _ = greedy_cached(stock, inputs, [VISUAL_ID], 3)
    model = copy.deepcopy(stock)
    # the tracer and its graph breaks are what could differ; code generation needs a compiler
    if order == "compiled first":
        compiled = torch.compile(model, backend="eager")
        compiled(**inputs)  # traced without exits before
        with exits(compiled) as traced:
            got, got_tokens, _ = greedy_cached(compiled, inputs, [VISUAL_ID], 3)
    else:
        with exits(model) as traced:
            compiled = torch.compile(model, backend="eager")
            got, got_tokens, _ = greedy_cached(compiled, inputs, [VISUAL_ID], 3)
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-5)
    assert torch.equal(got_tokens, tokens)
    assert traced.exit_layers.tolist() == run.exit_layers.tolist()
    torch.testing.assert_close(compiled(**inputs).logits, stock(**inputs).logits, rtol=0, atol=1e-5)


def test_a_static_cache_is_refused_with_its_reason():
    model, processor = llava()
    with dyvte.VisualExit.fixed(2)(model), pytest.raises(ExitRuntimeError) as error:
        model.generate(**batch(processor), max_new_tokens=2, cache_implementation="static")
    assert "StaticLayer" in str(error.value)
    assert "layers of different content" in str(error.value)


def test_a_quantised_cache_is_refused_with_its_reason():
    from transformers import DynamicCache
    from transformers.cache_utils import QuantizedLayer

    model, processor = llava()
    cache = DynamicCache()
    cache.layer_class_to_replicate = QuantizedLayer
    with dyvte.VisualExit.fixed(2)(model), pytest.raises(ExitRuntimeError, match="kind QuantizedLayer"):
        model(**batch(processor), past_key_values=cache)
