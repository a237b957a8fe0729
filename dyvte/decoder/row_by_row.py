"""Several rows through a module in one call, each with the bits that it has alone.

The last bits of a matrix product depend on how many rows it has. So products are taken row by row, and all
else in one call: norms, positions, activations and scaled-dot-product attention treat every row by itself.
That spares most of what many small calls cost.

Shapes: R rows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from dyvte.decoder.wrapping import replace_forward

_PRODUCTS = (nn.Linear, nn.Conv2d, nn.Conv3d)


@dataclass
class Watch:
    """What was seen while rows ran together.

    Attributes
    ----------
    apart
        Was every product of whole rows? Else the bits may be others than those of each row alone.
    """

    apart: bool = True


def products_of(modules: Iterable[nn.Module]) -> list[nn.Module] | None:
    """The modules that multiply by a matrix; None where something else than those may do so.

    Parameters
    ----------
    modules
        All that run.
    """
    found = []
    for module in modules:
        has_matrix = any(one is not None and one.dim() > 1 for one in module._parameters.values())
        if isinstance(module, _PRODUCTS):
            found.append(module)
        elif has_matrix and not isinstance(module, nn.Embedding):
            return None
    return found


@contextmanager
def row_by_row(products: Iterable[nn.Module], rows: int) -> Iterator[Watch]:
    """Inside, these modules take inputs of R rows row by row.

    Parameters
    ----------
    products
        From `products_of`.
    rows
        R.
    """
    watch = Watch()
    with ExitStack() as undo:
        for module in products:
            undo.callback(replace_forward(module, _by_row(module.forward, rows, watch)))
        yield watch


def _by_row(forward: Callable[..., Tensor], rows: int, watch: Watch) -> Callable[..., Tensor]:
    def by_row(states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if states.dim() < 3 or states.shape[0] != rows:
            watch.apart = False
            return forward(states, *args, **kwargs)
        return torch.cat([forward(states[row : row + 1], *args, **kwargs) for row in range(rows)])

    return by_row
