"""Several rows through a module in one call, each with the bits that it has alone.

The last bits of a matrix product depend on how many rows it has, and those of an exponential on where vectors
and threads divide a tensor. So products, activations and attention are taken row by row, and all else in one
call: norms and positions treat every row by itself. That spares most of what many small calls cost.

Shapes: R rows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from torch.overrides import TorchFunctionMode

from dyvte.decoder.wrapping import replace_forward

_PRODUCTS = (nn.Linear, nn.Conv2d, nn.Conv3d)
_ACTIVATIONS = ("torch.nn.modules.activation", "transformers.activations")
# What torch aligns its tensors to; libraries choose by it how to add up.
_ALIGNMENT = 64


@dataclass
class Watch:
    """What was seen while rows ran together.

    Attributes
    ----------
    apart
        Was everything that had to be taken of whole rows? Else the bits may be others than those of each row
        alone.
    """

    apart: bool = True


def taken_by_row(modules: Iterable[nn.Module]) -> list[nn.Module] | None:
    """The modules that multiply by a matrix, and activations; None where something else may multiply.

    Parameters
    ----------
    modules
        All that run.
    """
    found = []
    for module in modules:
        has_matrix = any(one is not None and one.dim() > 1 for one in module._parameters.values())
        is_activation = type(module).__module__ in _ACTIVATIONS and not module._modules
        if isinstance(module, _PRODUCTS) or (is_activation and not has_matrix):
            found.append(module)
        elif has_matrix and not isinstance(module, nn.Embedding):
            return None
    return found


@contextmanager
def row_by_row(modules: Iterable[nn.Module], rows: int) -> Iterator[Watch]:
    """Inside, these modules and scaled-dot-product attention take inputs of R rows row by row.

    Parameters
    ----------
    modules
        From `taken_by_row`.
    rows
        R.
    """
    watch = Watch()
    with ExitStack() as undo:
        for module in modules:
            undo.callback(replace_forward(module, _by_row(module.forward, rows, watch)))
        undo.enter_context(_AttentionByRow(rows, watch))
        yield watch


def _by_row(forward: Callable[..., Tensor], rows: int, watch: Watch) -> Callable[..., Tensor]:
    def by_row(states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if states.dim() < 3 or states.shape[0] != rows:
            watch.apart = False
            return forward(states, *args, **kwargs)
        return torch.cat([forward(_row(states, row), *args, **kwargs) for row in range(rows)])

    return by_row


class _AttentionByRow(TorchFunctionMode):
    def __init__(self, rows: int, watch: Watch) -> None:
        super().__init__()
        self.rows, self.watch = rows, watch

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is not scaled_dot_product_attention:
            return func(*args, **kwargs)
        if len(args) != 3 or any(one.shape[0] != self.rows for one in args):
            self.watch.apart = False
            return func(*args, **kwargs)
        mask = kwargs.get("attn_mask")
        found = []
        for row in range(self.rows):
            if isinstance(mask, Tensor) and mask.dim() == 4 and mask.shape[0] == self.rows:
                kwargs = {**kwargs, "attn_mask": mask[row : row + 1]}
            found.append(func(*(_row(one, row) for one in args), **kwargs))
        return torch.cat(found)


def _row(states: Tensor, row: int) -> Tensor:
    own = states[row : row + 1]
    return own.clone() if own.data_ptr() % _ALIGNMENT else own
