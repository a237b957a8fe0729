"""Frozen visual tokens: read, not updated. Counted by hand and by listing every matrix product."""

from __future__ import annotations

import pytest
import torch

from dyvte.backbones.sizes import DecoderShape
from dyvte.costs.memory import kv_bytes
from dyvte.costs.prefill import layer_flops, mean_prefill_costs, prefill_flops
from dyvte.costs.visual import visual_compute, visual_share
from dyvte.errors import ConfigError

# Hidden 10, 2 heads of 5, one for keys and values, FFN of 20. Per token: query and output 10 x 10 each, key
# and value 10 x 5 each, FFN 3 x 10 x 20: 900 multiply-adds, 100 of them for key and value.
SMALL = DecoderShape(10, 2, 1, 5, (20,) * 4, 100)
UNEVEN = DecoderShape(32, 8, 2, 4, (64, 96, 64, 10, 64), 100)
LLAVA_7B = DecoderShape(4096, 32, 32, 128, (11008,) * 32, 32000)


def _row(freeze: int, leave: int, shape: DecoderShape = SMALL) -> float:
    one = torch.tensor([7])
    return visual_compute(torch.tensor([leave]), one, shape.num_layers, torch.tensor([freeze]), shape)


def test_visual_compute_by_hand():
    # two layers of 900, one of 100, one of none, of four of 900
    assert _row(2, 3) == pytest.approx((2 * 900 + 100) / (4 * 900))
    assert _row(0, 4) == pytest.approx(4 * 100 / (4 * 900))
    assert _row(0, 0) == 0.0
    assert _row(4, 4) == 1.0
    # one row of 10 tokens at the first, one of 30 at the second, one without an image
    found = visual_compute(
        torch.tensor([3, 4, -1]), torch.tensor([10, 30, 0]), 4, torch.tensor([2, 0, -1]), SMALL
    )
    assert found == pytest.approx((10 * 1900 + 30 * 400) / (40 * 3600))


def test_visual_compute_weighs_uneven_layers_by_their_work():
    # per token: 32 x 32 x 2 + 32 x 8 x 2 = 2560 of projections, 512 of them key and value, and 96 per neuron
    work = [2560 + 96 * size for size in UNEVEN.ffn_sizes_L]
    assert _row(2, 4, UNEVEN) == pytest.approx((work[0] + work[1] + 2 * 512) / sum(work))


def test_share_of_a_frozen_layer_of_known_backbones():
    """Key and value projections as a share of a layer's linear work."""
    assert _row(0, 32, LLAVA_7B) == pytest.approx(0.166, abs=5e-4)
    qwen = DecoderShape(3584, 28, 4, 128, (18944,) * 28, 152064)
    assert _row(0, 28, qwen) == pytest.approx(0.016, abs=5e-4)


@pytest.mark.parametrize("shape", [SMALL, LLAVA_7B])
def test_a_freeze_at_the_exit_is_the_plain_exit_bit_for_bit(shape):
    rng = torch.Generator().manual_seed(0)
    exits = torch.randint(0, shape.num_layers + 1, (5000,), generator=rng)
    visual, text = (torch.randint(1, 3000, (5000,), generator=rng) for _ in range(2))
    plain = visual_compute(exits, visual, shape.num_layers)
    assert visual_compute(exits, visual, shape.num_layers, exits, shape) == plain
    for convention in ("vtw", "fastv", "pyramiddrop"):
        plain_B = prefill_flops(shape, text, visual, exits, convention)
        assert torch.equal(prefill_flops(shape, text, visual, exits, convention, exits), plain_B)


def _products(shape: DecoderShape, text: int, visual: int, freeze: int, leave: int, convention: str) -> int:
    """Multiply-adds, by listing every matrix product of every layer."""
    width, kv_width = shape.num_heads * shape.head_dim, shape.num_kv_heads * shape.head_dim
    d, total = shape.hidden_size, 0
    ffn_matrices = 2 if convention == "fastv" else 3
    if convention == "pyramiddrop":
        text = 0
    for layer, ffn in enumerate(shape.ffn_sizes_L):
        state = "updated" if layer < freeze else "frozen" if layer < leave else "gone"
        queries = text + (visual if state == "updated" else 0)
        keys = text + (0 if state == "gone" else visual)
        products = [(queries, d, width), (queries, width, d), (keys, d, kv_width), (keys, d, kv_width)]
        products += [(queries, d, ffn)] * ffn_matrices
        products += [(queries, shape.head_dim, keys), (queries, keys, shape.head_dim)] * shape.num_heads
        total += sum(a * b * c for a, b, c in products)
    return total


@pytest.mark.parametrize("convention", ["vtw", "fastv", "pyramiddrop"])
@pytest.mark.parametrize(("freeze", "leave"), [(0, 0), (0, 5), (1, 3), (2, 5), (3, 3), (5, 5)])
def test_prefill_equals_a_list_of_matrix_products(convention, freeze, leave):
    per_mac = 2 if convention == "vtw" else 1
    expected = per_mac * _products(UNEVEN, 7, 20, freeze, leave, convention)
    assert prefill_flops(UNEVEN, [7], [20], [leave], convention, [freeze])[0] == expected
    layers = torch.arange(5)
    updated, read = 20 * (layers < freeze), 20 * ((layers >= freeze) & (layers < leave))
    found = layer_flops(UNEVEN, [[7] * 5], updated[None], convention, frozen_BL=read[None])
    assert found.sum() == expected


def test_mean_layers_interpolate_between_whole_ones():
    whole = prefill_flops(SMALL, [9] * 4, [30] * 4, [3, 4, 3, 4], "vtw", [1, 1, 2, 2])
    assert prefill_flops(SMALL, [9], [30], [3.5], "vtw", [1.5])[0] == pytest.approx(whole.mean().item())


def test_a_run_counts_what_its_layers_read():
    updated, frozen = [[30, 30, 0, 0], [0, 0, 0, 0]], [[0, 0, 30, 0], [0, 0, 0, 0]]
    text = [[9] * 4] * 2
    means = mean_prefill_costs(SMALL, text, updated, [9, 9], [30, 0], frozen_BL=frozen)
    exact = prefill_flops(SMALL, [9, 9], [30, 0], [3, -1], "vtw", [2, -1])
    assert means["vtw"].tflops == pytest.approx(exact.mean().item() / 1e12)
    assert means["pyramiddrop"].ratio < means["vtw"].ratio < 1
    assert visual_share(SMALL, updated, [30, 0], frozen_BL=frozen) == pytest.approx(_row(2, 3))
    assert visual_share(SMALL, updated, [30, 0]) == pytest.approx(0.5)


def test_kv_bytes_by_hand():
    # 1 head of 5 for keys and one for values, 2 bytes: 20 a token and layer; 4 layers of 9 text tokens, and
    # 3, 0 or no layers of 30 visual tokens
    found = kv_bytes(SMALL, [9, 9, 9], [30, 30, 0], [3, 0, -1])
    assert found.tolist() == [20 * (4 * 9 + 3 * 30), 20 * 4 * 9, 20 * 4 * 9]
    assert kv_bytes(SMALL, [9], [30], [3], bytes_per_value=4).tolist() == [40 * (4 * 9 + 3 * 30)]


def test_errors():
    one = torch.tensor([7])
    with pytest.raises(ConfigError, match="row 1: freeze layer 3 above exit layer 2"):
        visual_compute(torch.tensor([3, 2]), torch.tensor([7, 7]), 4, torch.tensor([3, 3]), SMALL)
    with pytest.raises(ConfigError, match="freeze layer 2 above exit layer 1"):
        prefill_flops(SMALL, [9], [30], [1], "vtw", [2])
    with pytest.raises(ConfigError, match="need the shape of the decoder of 4 layers, found none"):
        visual_compute(one, one, 4, one)
    with pytest.raises(ConfigError, match="found one of 5 layers"):
        visual_compute(one, one, 4, one, UNEVEN)
