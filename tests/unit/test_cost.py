"""The cost model against published figures and against counting by brute force."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from dyvte.errors import ConfigError, UnsupportedBackboneError
from dyvte.evaluation.cost import (
    DecoderShape,
    decoder_shape,
    head_flops,
    mean_prefill_tflops,
    prefill_flops,
    vision_tower_flops,
)

VICUNA_7B = DecoderShape(4096, 32, 32, 128, (11008,) * 32, 32000)
VICUNA_13B = DecoderShape(5120, 40, 40, 128, (13824,) * 40, 32000)
VISUAL = 576


def _tflops(shape, text, visual, exit_layer, convention="vtw") -> float:
    return prefill_flops(shape, [text], [visual], [exit_layer], convention).item() / 1e12


def _prompt_length(shape, full_tflops: float) -> float:
    """Prompt length at which the full model costs what the paper states."""
    low, high = 1.0, 1e5
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if _tflops(shape, middle, 0, 0) < full_tflops else (low, middle)
    return low


@pytest.mark.parametrize(
    ("shape", "full", "exit_layer", "published"),
    [
        pytest.param(VICUNA_7B, 8.48, 16, 4.68, id="VTW-7B"),
        pytest.param(VICUNA_13B, 16.5, 20, 9.10, id="VTW-13B"),
        pytest.param(VICUNA_7B, 8.8, 17.4, 5.3, id="DyVTE-7B-GQA"),
        pytest.param(VICUNA_7B, 9.5, 20.7, 6.7, id="DyVTE-7B-TextVQA"),
        pytest.param(VICUNA_7B, 8.7, 22.1, 6.3, id="DyVTE-7B-MM-Vet"),
        pytest.param(VICUNA_7B, 9.8, 14.4, 5.5, id="DyVTE-7B-SQA"),
    ],
)
def test_published_prefill_figures_within_two_percent(shape, full, exit_layer, published):
    text = _prompt_length(shape, full) - VISUAL
    assert _tflops(shape, text, VISUAL, exit_layer) == pytest.approx(published, rel=0.02)


@pytest.mark.parametrize(
    ("shape", "convention", "published"),
    [
        (VICUNA_7B, "fastv", 2.99),
        (VICUNA_7B, "pyramiddrop", 3.82),
        (VICUNA_13B, "pyramiddrop", 7.44),
    ],
)
def test_published_full_model_figures_of_the_other_conventions(shape, convention, published):
    assert _tflops(shape, 0, VISUAL, shape.num_layers, convention) == pytest.approx(published, rel=0.005)


def test_yopo_counts_twice_pyramiddrop():
    twice = 2 * _tflops(VICUNA_7B, 60, VISUAL, 32, "pyramiddrop")
    assert twice == pytest.approx(7.63, rel=0.005)


def _count_matmuls(shape: DecoderShape, num_text: int, num_visual: int, exit_layer: int) -> int:
    """Multiply-adds by listing every matrix product of every layer."""
    total = 0
    for layer, ffn in enumerate(shape.ffn_sizes_L):
        n = num_text + (num_visual if layer < exit_layer else 0)
        width, kv_width = shape.num_heads * shape.head_dim, shape.num_kv_heads * shape.head_dim
        products = [(n, shape.hidden_size, width), (n, width, shape.hidden_size)]
        products += [(n, shape.hidden_size, kv_width)] * 2
        products += [(n, shape.hidden_size, ffn)] * 2 + [(n, ffn, shape.hidden_size)]
        products += [(n, shape.head_dim, n), (n, n, shape.head_dim)] * shape.num_heads
        total += sum(a * b * c for a, b, c in products)
    return total


@pytest.mark.parametrize("exit_layer", [0, 1, 3, 5])
def test_grouped_heads_and_mixed_layers_equal_brute_force(exit_layer):
    shape = DecoderShape(32, 8, 2, 4, (64, 96, 64, 10, 64), 100)
    assert prefill_flops(shape, [7], [20], [exit_layer])[0] == 2 * _count_matmuls(shape, 7, 20, exit_layer)


def test_rows_without_image_cost_their_text_whatever_the_exit():
    flops = prefill_flops(VICUNA_7B, [50, 50], [0, 0], [-1, 32])
    assert flops[0] == flops[1] > 0


def test_mean_is_over_samples():
    text_BL = [[60] * 32] * 2
    visual_BL = [[576] * 16 + [0] * 16, [576] * 32]
    means = mean_prefill_tflops(VICUNA_7B, text_BL, visual_BL, [60, 60], [576, 576])
    halves = [_tflops(VICUNA_7B, 60, 576, k) for k in (16, 32)]
    assert means["vtw"]["tflops"] == pytest.approx(sum(halves) / 2)
    assert means["vtw"]["tflops_full"] == pytest.approx(halves[1])
    # visual tokens alone: half their layers for half the samples
    assert means["pyramiddrop"]["ratio"] == pytest.approx(0.75)


def _config(**changes):
    config = SimpleNamespace(
        hidden_size=64, num_attention_heads=4, num_hidden_layers=3, intermediate_size=128, vocab_size=10
    )
    vars(config).update(changes)
    return config


def test_shape_from_configs():
    plain = decoder_shape(_config())
    assert (plain.num_kv_heads, plain.head_dim, plain.ffn_sizes_L) == (4, 16, (128, 128, 128))
    grouped = decoder_shape(_config(num_key_value_heads=2, head_dim=32))
    assert (grouped.num_kv_heads, grouped.head_dim) == (2, 32)
    experts = decoder_shape(
        _config(
            num_experts=8,
            num_experts_per_tok=2,
            moe_intermediate_size=16,
            n_shared_experts=1,
            first_k_dense_replace=1,
        )
    )
    assert experts.ffn_sizes_L == (128, 48, 48)
    mixtral = decoder_shape(_config(num_local_experts=8, num_experts_per_tok=2))
    assert mixtral.ffn_sizes_L == (256, 256, 256)


def test_shape_of_a_real_llava_config():
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig

    config = LlavaConfig(
        vision_config=CLIPVisionConfig(), text_config=LlamaConfig(num_hidden_layers=2, num_key_value_heads=8)
    )
    shape = decoder_shape(config)
    assert (shape.num_layers, shape.num_kv_heads, shape.hidden_size) == (2, 8, 4096)


def test_separate_parts():
    assert head_flops(VICUNA_7B) == 2 * 4096 * 32000
    clip = SimpleNamespace(
        hidden_size=1024, intermediate_size=4096, num_hidden_layers=24, image_size=336, patch_size=14
    )
    # CLIP ViT-L/14 at 336 px: 191 GMACs are commonly stated
    assert vision_tower_flops(clip) / 2e9 == pytest.approx(191, rel=0.01)
    assert vision_tower_flops(SimpleNamespace(hidden_size=8)) is None


def test_errors():
    with pytest.raises(ConfigError, match="unknown FLOPs convention 'own'"):
        prefill_flops(VICUNA_7B, [1], [1], [1], "own")
    with pytest.raises(UnsupportedBackboneError, match="it has no intermediate_size"):
        decoder_shape(_config(intermediate_size=None))
    assert torch.is_tensor(prefill_flops(VICUNA_7B, [1], [1], [1]))
