"""The cost model against published figures and against counting by brute force."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch

from dyvte.backbones.sizes import DecoderShape, decoder_shape
from dyvte.costs.prefill import (
    VisualFactors,
    head_flops,
    layer_flops,
    mean_prefill_costs,
    prefill_flops,
    score_row_flops,
)
from dyvte.costs.vision import vision_tower_flops
from dyvte.costs.visual import visual_share
from dyvte.errors import ConfigError, UnsupportedBackboneError

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
    means = mean_prefill_costs(VICUNA_7B, text_BL, visual_BL, [60, 60], [576, 576])
    halves = [_tflops(VICUNA_7B, 60, 576, k) for k in (16, 32)]
    assert means["vtw"].tflops == pytest.approx(sum(halves) / 2)
    assert means["vtw"].tflops_full == pytest.approx(halves[1])
    # visual tokens alone: half their layers for half the samples
    assert means["pyramiddrop"].ratio == pytest.approx(0.75)


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


def _count_mixed(shape: DecoderShape, text_L, visual_L) -> int:
    """Multiply-adds of tokens that come and go from layer to layer."""
    total = 0
    for layer, (text, visual) in enumerate(zip(text_L, visual_L, strict=True)):
        one = DecoderShape(*(getattr(shape, f) for f in FIELDS), (shape.ffn_sizes_L[layer],), 1)
        total += _count_matmuls(one, text, visual, 1)
    return total


FIELDS = ("hidden_size", "num_heads", "num_kv_heads", "head_dim")


def test_tokens_that_reductions_drop_layer_by_layer_equal_brute_force():
    shape = DecoderShape(32, 8, 2, 4, (64, 96, 64, 10, 64), 100)
    text_L, visual_L = [7, 7, 7, 4, 4], [20, 20, 10, 3, 0]
    flops_BL = layer_flops(shape, [text_L], [visual_L])
    assert flops_BL.shape == (1, 5)
    assert flops_BL.sum() == 2 * _count_mixed(shape, text_L, visual_L)
    alone = layer_flops(shape, [text_L], [visual_L], "pyramiddrop").sum()
    assert alone == _count_mixed(shape, [0] * 5, visual_L)


@pytest.mark.parametrize(("ratio", "published"), [(0.5, 0.45), (0.75, 0.67), (0.9, 0.80)])
def test_fastv_reductions_as_published(ratio, published):
    """FastV, K = 2 on LLaVA-1.5-7B: one prompt length serves the three published reductions."""
    text, kept = 28, VISUAL * (1 - ratio)
    visual_L = [VISUAL] * 2 + [kept] * 30
    run = layer_flops(VICUNA_7B, [[text] * 32], [visual_L], "fastv").sum()
    full = layer_flops(VICUNA_7B, [[text] * 32], [[VISUAL] * 32], "fastv").sum()
    assert 1 - run / full == pytest.approx(published, abs=0.01)


def test_cheaper_visual_tokens_equal_brute_force():
    """Half the FFN, a quarter of the scores among visual tokens, none between kinds in the last layer."""
    shape = DecoderShape(32, 8, 2, 4, (64, 64), 100)
    factors = VisualFactors(
        projections_L=[1, 0.5], ffn_L=[0.5, 0.5], visual_scores_L=[0.25, 0], cross_scores_L=[1, 0]
    )
    text, visual, d, width = 7, 20, 32, 32
    projections = 2 * d * (width + 8)
    first = (text + visual) * projections + 3 * d * 64 * (text + visual // 2)
    first += 2 * width * (text**2 + 2 * text * visual + visual**2 // 4)
    second = (text + visual // 2) * projections + 3 * d * 64 * (text + visual // 2) + 2 * width * text**2
    found = layer_flops(shape, [[text] * 2], [[visual] * 2], factors=factors)
    assert found.tolist() == [[2 * first, 2 * second]]
    full = projections + 3 * d * 64 + 2 * width * visual
    spent = projections + 3 * d * 32 + width * visual / 2 + projections / 2 + 3 * d * 32
    assert visual_share(shape, [[visual] * 2], [visual], factors) == pytest.approx(spent / (2 * full))
    with pytest.raises(ConfigError, match="ffn_L holds 3 factors, the backbone has 2 layers"):
        layer_flops(shape, [[1, 1]], [[1, 1]], factors=VisualFactors(ffn_L=[1, 1, 1]))


def test_visual_share_of_exits_alone_is_their_layer_passes():
    """sum n_i k_i / (L sum n_i), whatever the layers' sizes; rows without an image count for nothing."""
    from dyvte.calibration import visual_compute

    shape = DecoderShape(32, 8, 2, 4, (64, 96, 64, 10), 100)
    exits, num_visual = [0, 1, 3, 4, -1], [10, 576, 64, 7, 0]
    visual_BL = [[n if layer < k else 0 for layer in range(4)] for n, k in zip(num_visual, exits)]
    expected = visual_compute(torch.tensor(exits), torch.tensor(num_visual), 4)
    assert visual_share(shape, visual_BL, num_visual) == pytest.approx(expected)
    assert math.isnan(visual_share(shape, [[0] * 4], [0]))


def test_score_rows_are_counted_apart():
    shape = DecoderShape(32, 8, 2, 4, (64, 64), 100)
    one = 2 * (2 * 32 * (32 + 8) + 2 * 27 * 32)
    assert score_row_flops(shape, [[27, 17], [27, 17]], [(1,), ()]) == [one, 0]


def _vit_macs(hidden: int, ffn: int, layers: int, patches: int, patch_values: int) -> int:
    per_layer = 4 * patches * hidden**2 + 2 * patches * hidden * ffn + 2 * patches**2 * hidden
    return patches * patch_values * hidden + layers * per_layer


def test_vision_towers_without_a_class_token_and_of_any_size():
    from transformers import SiglipVisionConfig
    from transformers.models.qwen2_vl.configuration_qwen2_vl import Qwen2VLVisionConfig

    siglip = SiglipVisionConfig(
        hidden_size=1152, intermediate_size=4304, num_hidden_layers=27, image_size=384, patch_size=14
    )
    assert vision_tower_flops(siglip) == 2 * _vit_macs(1152, 4304, 27, 27**2, 3 * 14**2)
    qwen = Qwen2VLVisionConfig()
    assert vision_tower_flops(qwen) is None
    assert vision_tower_flops(qwen, num_patches=1024) == 2 * _vit_macs(1280, 5120, 32, 1024, 2 * 3 * 14**2)
