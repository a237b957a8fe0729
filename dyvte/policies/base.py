"""What a policy is: it sees a batch's rows before the first layer, and answers with a plan.

Shapes: B rows, L decoder layers, F gate features.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dyvte.gates import DEFAULT_FEATURES, FoundGroups, GateConfig
from dyvte.registry import Registry


@dataclass(frozen=True)
class Rows:
    """A batch before its prefill; tensors are on the CPU.

    Attributes
    ----------
    num_layers
        L.
    num_visual_B, num_prompt_B
        (B,) int64 visual tokens, and prompt text tokens after the last of them, of each row.
    sample_ids
        One id for each row.
    """

    num_layers: int
    num_visual_B: Tensor
    num_prompt_B: Tensor
    sample_ids: Sequence[str]


class Plan:
    """When each row's visual tokens freeze and leave. A plan that does not ask any gate is final at once.

    A row whose visual tokens leave after layer k is frozen there at the latest: readers take the smaller of
    both layers.

    Parameters
    ----------
    exit_layers_B
        (B,) int64 on the CPU: layers in which text can read the visual tokens.
    freeze_layers_B
        (B,) int64 on the CPU: layers that update them. None: as long as they are read; the two are then one
        tensor.

    Attributes
    ----------
    exit_layers_B, freeze_layers_B
        As given; a row that is still undecided holds L.
    features
        What the gates read, by name.
    found
        Calibrated groups of the rows, where the plan tells them.
    """

    num_fallbacks = 0
    found: FoundGroups | None = None
    features: tuple[str, ...] = DEFAULT_FEATURES

    def __init__(self, exit_layers_B: Tensor, freeze_layers_B: Tensor | None = None) -> None:
        self.exit_layers_B = exit_layers_B
        self.freeze_layers_B = exit_layers_B if freeze_layers_B is None else freeze_layers_B

    def asks(self, k: int) -> bool:
        """Must features be taken after layer k (0..L-1)? 0: before the first layer, from the embeddings.

        Parameters
        ----------
        k
            Layers behind the features.
        """
        return False

    def asking_rows(self) -> Tensor:
        """(B,) bool: rows that still ask, about whichever of their two layers is open."""
        return torch.zeros_like(self.exit_layers_B, dtype=torch.bool)

    def logits(self, k: int, features_BF: Tensor) -> Tensor:
        """Gate logits on the features' device: (B,) of exiting, or (2, B) of exiting and of freezing; further
        rows are the plan's own, for `step`.

        Parameters
        ----------
        k
            Layers behind the features.
        features_BF
            What the gates read.
        """
        raise NotImplementedError(f"{type(self).__name__} defines no `logits`")

    def step(self, k: int, logits: Tensor) -> None:
        """Take in what `logits` gave for all rows after layer k, on the CPU.

        Parameters
        ----------
        k
            Layers behind the features.
        logits
            (B,) or (2, B), on the CPU; entries of rows that do not ask are not looked at.
        """
        raise NotImplementedError(f"{type(self).__name__} defines no `step`")

    def settle(self, rows_B: Tensor, k: int) -> None:
        """Rows that have no visual token behind layer k, whoever took the last: they left there.

        Parameters
        ----------
        rows_B
            (B,) bool.
        k
            The layer.
        """
        self.exit_layers_B[rows_B & (self.exit_layers_B > k)] = k
        self.freeze_layers_B[rows_B & (self.freeze_layers_B > k)] = k


class Policy:
    """Base of all policies; a subclass gives `name`, `usage`, `parse` and `start`, and is registered.

    Attributes
    ----------
    name
        What it is called on the command line, before the colon.
    usage
        Its whole command line form, for help and errors.
    may_freeze
        May visual tokens be read longer than they are updated? Backbones that cannot do that are then refused
        on entering.
    made_for
        Configuration of the checkpoint that it was read from, which says for what backbone; None: it was
        read from none.
    """

    name = ""
    usage = ""
    may_freeze = False
    made_for: GateConfig | None = None

    @classmethod
    def parse(cls, argument: str) -> Policy:
        """Make the policy from the text after the colon.

        Parameters
        ----------
        argument
            "" where there is none.

        Raises
        ------
        ConfigError
            It is malformed; the expected form is named.
        """
        raise NotImplementedError(f"{cls.__name__} defines no `parse`")

    def check(self, num_layers: int, hidden_size: int) -> None:
        """Raise where this policy cannot serve a backbone of this shape.

        Parameters
        ----------
        num_layers
            L.
        hidden_size
            D.
        """

    def to(self, device: torch.device) -> None:
        """Bring weights, if any, to the backbone's device.

        Parameters
        ----------
        device
            Of the decoder.
        """

    def start(self, rows: Rows) -> Plan:
        """The plan for one prefill.

        Parameters
        ----------
        rows
            Sizes and ids of the rows, before the first layer.
        """
        raise NotImplementedError(f"{type(self).__name__} defines no `start`")


POLICIES: Registry[type[Policy]] = Registry("policy", "dyvte.policies")


def for_rows(values_P: Tensor, num_rows: int) -> Tensor | None:
    """One value per prompt to one per row: with beams or return sequences row i is prompt i // expansion.

    Parameters
    ----------
    values_P
        (P,) one for each prompt.
    num_rows
        B, a multiple of P.
    """
    if len(values_P) == 0 or num_rows % len(values_P):
        return None
    return values_P.repeat_interleave(num_rows // len(values_P))
