"""Several rows in one call have the bits that each has alone."""

from __future__ import annotations

import torch
from torch import nn

from dyvte.decoder.row_by_row import row_by_row, taken_by_row


def test_rows_have_the_bits_that_they_have_alone():
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(96, 200), nn.SiLU(), nn.LayerNorm(200), nn.Linear(200, 96))
    states = torch.randn(5, 37, 96)
    products = taken_by_row(module.modules())
    assert products == [module[0], module[1], module[3]]
    for rows in (2, 5):
        with torch.no_grad(), row_by_row(products, rows) as watch:
            together = module(states[:rows])
        assert watch.apart
        with torch.no_grad():
            alone = torch.cat([module(states[row : row + 1]) for row in range(rows)])
        assert torch.equal(together, alone)
    assert "forward" not in module[0].__dict__


def test_products_that_mix_rows_are_told():
    module = nn.Sequential(nn.Linear(8, 8))
    with torch.no_grad(), row_by_row(taken_by_row(module.modules()), 2) as watch:
        module(torch.randn(2, 8))
    assert not watch.apart
    with torch.no_grad(), row_by_row(taken_by_row(module.modules()), 2) as watch:
        module(torch.randn(3, 4, 8))
    assert not watch.apart


def test_modules_that_multiply_in_another_way_are_not_served():
    class Own(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(2, 3, 4))

    assert taken_by_row(nn.Sequential(nn.Linear(4, 4), Own()).modules()) is None
    # what they look up is no product
    assert taken_by_row([nn.Embedding(3, 4), nn.LayerNorm(4)]) == []
