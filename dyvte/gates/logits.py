"""All logits of a stack with two heads on traced streams.

Shapes: B rows, L decoder layers, G = F + 1 streams: frozen after each of F layers, and the plain one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dyvte.errors import ConfigError
from dyvte.gates.offsets import CLOSED


@dataclass(frozen=True)
class HeadLogits:
    """Exit and freeze logits of B samples, offsets included.

    Attributes
    ----------
    exit_BGL
        Exit minus stay of gate k in column k-1. Stream i < F is that of a row frozen after
        ``freeze_layers[i]``; the last is that of a row which is still updated.
    freeze_BL
        Freeze minus update in column j: before any layer (j = 0), after layer j. Asked of rows that are still
        updated, so on the plain stream alone. `CLOSED` at layers whose stream was not traced.
    freeze_layers
        The F layers of the frozen streams, ascending.
    """

    exit_BGL: Tensor
    freeze_BL: Tensor
    freeze_layers: tuple[int, ...]

    def __post_init__(self) -> None:
        exits, freezes = tuple(self.exit_BGL.shape), tuple(self.freeze_BL.shape)
        if len(exits) != 3 or exits[1] != len(self.freeze_layers) + 1 or freezes != (exits[0], exits[2]):
            raise ConfigError(
                f"exit logits {exits} and freeze logits {freezes}: expected (B, G, L) and (B, L) with "
                f"G = {len(self.freeze_layers)} freeze layers and the plain stream"
            )

    def __len__(self) -> int:
        return self.exit_BGL.shape[0]

    @property
    def num_layers(self) -> int:
        """L, the number of decoder layers."""
        return self.exit_BGL.shape[2]

    @property
    def plain_BL(self) -> Tensor:
        """(B, L) exit logits of the plain stream: what a stack without freeze head says."""
        return self.exit_BGL[:, -1]

    def closed_elsewhere(self) -> HeadLogits:
        """The same logits where nobody freezes after a layer whose stream was not traced."""
        num_layers = self.num_layers
        elsewhere = [j not in self.freeze_layers for j in range(num_layers)]
        mask_L = torch.tensor(elsewhere, device=self.freeze_BL.device)
        return HeadLogits(self.exit_BGL, self.freeze_BL.masked_fill(mask_L, CLOSED), self.freeze_layers)

    def rows(self, index: Tensor | slice) -> HeadLogits:
        """The samples at ``index``.

        Parameters
        ----------
        index
            Positions or a bool mask over the B samples, or a slice.
        """
        return HeadLogits(self.exit_BGL[index], self.freeze_BL[index], self.freeze_layers)

    def shifted(self, exit_shift: float, freeze_shift: float) -> HeadLogits:
        """The same logits with a constant added to each head: what other thresholds would see.

        Parameters
        ----------
        exit_shift, freeze_shift
            Added to every logit of that head.
        """
        return HeadLogits(self.exit_BGL + exit_shift, self.freeze_BL + freeze_shift, self.freeze_layers)

    def cpu(self) -> HeadLogits:
        """The same logits, detached and on the CPU."""
        return HeadLogits(self.exit_BGL.detach().cpu(), self.freeze_BL.detach().cpu(), self.freeze_layers)

    @staticmethod
    def cat(parts: Sequence[HeadLogits]) -> HeadLogits:
        """Several batches as one, in order.

        Parameters
        ----------
        parts
            Of the same freeze layers; at least one.
        """
        return HeadLogits(
            torch.cat([part.exit_BGL for part in parts]),
            torch.cat([part.freeze_BL for part in parts]),
            parts[0].freeze_layers,
        )
