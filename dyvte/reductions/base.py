"""What a reduction is: it sees a batch's tokens before the first layer, and answers with a plan.

Shapes: B rows, N tokens of the padded batch, L decoder layers.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dyvte.backbones import Backbone
from dyvte.errors import ConfigError
from dyvte.registry import Registry
from dyvte.spans import Spans


@dataclass(frozen=True)
class TokenRows:
    """A batch before its prefill; tensors are on the CPU.

    Attributes
    ----------
    num_layers
        L.
    spans
        Where the image and the text sit.
    sample_ids
        One id for each row.
    """

    num_layers: int
    spans: Spans
    sample_ids: Sequence[str]


@dataclass(frozen=True)
class Neighbourhood:
    """Which visual tokens a visual token attends to; to the text before it, it attends as ever.

    Attributes
    ----------
    radius
        Rows and columns on its own image within which it sees others.
    causal
        Are those that come later omitted?
    """

    radius: int
    causal: bool = False


@dataclass(frozen=True)
class Neurons:
    """Neurons of an FFN of any size that are computed: the share ``floor(share * M)`` of its M.

    Attributes
    ----------
    share
        0..1.
    order_M
        (M,) int64 indices, the best first; None: the first ones are taken.
    """

    share: float
    order_M: Tensor | None = None

    def of(self, num_neurons: int) -> int | Tensor:
        """The first so many, or (m,) ascending indices."""
        count = int(num_neurons * self.share + 1e-9)
        # In order, so that slices of weights are read in order.
        return count if self.order_M is None else self.order_M[:count].sort().values


@dataclass(frozen=True)
class VisualWork:
    """What one layer does for visual tokens; None: all that the stock layer does. Text is never affected.

    Attributes
    ----------
    window
        The visual tokens that they attend to.
    heads
        (H,) bool on the CPU: query heads that are computed for them; the others contribute nothing.
    neurons
        Neurons of the FFN that are computed for them.
    frozen
        They are not updated at all: text reads their keys and values, and nothing else of the layer is
        computed for them. The other fields then mean nothing.
    """

    window: Neighbourhood | None = None
    heads: Tensor | None = None
    neurons: Neurons | None = None
    frozen: bool = False

    @property
    def is_stock(self) -> bool:
        """Nothing is omitted."""
        return not self.frozen and self.window is None and self.heads is None and self.neurons is None


def merged(works: Sequence[VisualWork]) -> VisualWork:
    """What is left when several reductions omit work of one layer.

    Parameters
    ----------
    works
        One for each reduction.

    Raises
    ------
    ConfigError
        If two of them say different things of the same part.
    """
    given: dict[str, Neighbourhood | Tensor | Neurons] = {}
    for work in works:
        for name in ("window", "heads", "neurons"):
            value = getattr(work, name)
            if value is None:
                continue
            if name in given:
                raise ConfigError(f"two reductions set the {name} of visual tokens: omit one of them")
            given[name] = value
    return VisualWork(**given, frozen=any(work.frozen for work in works))


class ReductionPlan:
    """What a reduction does to one prefill. This one does nothing."""

    enters = False
    """Does it act before the first layer, on the states that enter it?"""

    def enter(
        self, hidden_BND: Tensor, carried_BN: Tensor, places_BN3: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """What enters the first layer, where `enters` says that it acts there.

        Parameters
        ----------
        hidden_BND
            (B, N, D) embeddings of text and image, on the backbone's device; never to be changed in place.
        carried_BN
            (B, N) bool on the CPU: the prompts' tokens that are still there.
        places_BN3
            (B, N, 3) int64 on the CPU: image, row and column of every visual token, -1 elsewhere; None unless
            the reduction ``needs_grid``.

        Returns
        -------
        hidden_BND, kept_BN
            The states, and (B, N) bool on the CPU: what stays.
        """
        return hidden_BND, carried_BN

    def visual_work(self, k: int) -> VisualWork:
        """What the k-th layer (1..L) does for visual tokens.

        Parameters
        ----------
        k
            The layer, counted from 1.
        """
        return VisualWork()

    def drops(self, k: int) -> bool:
        """Do tokens leave after layer k?

        Parameters
        ----------
        k
            1..L-1; what leaves before the first layer is `enter`'s.
        """
        return False

    def reads_attention(self, k: int) -> bool:
        """Must `keep` be told whom each row's last prompt token attends to in layer k?

        Parameters
        ----------
        k
            The layer, counted from 1.
        """
        return False

    def keep(self, k: int, carried_BN: Tensor, scores_BN: Tensor | None) -> Tensor:
        """(B, N) bool on the CPU: what stays after layer k.

        Parameters
        ----------
        k
            Of those at which it `drops`.
        carried_BN
            (B, N) bool on the CPU: tokens that went through layer k.
        scores_BN
            (B, N) float32 on the backbone's device: attention of the last prompt token, mean over heads; -inf
            where nothing was carried. None unless asked for.
        """
        return carried_BN


class Reduction:
    """Base of all reductions; a subclass gives `name`, `usage`, `parse` and `start`, and is registered.

    Its ``repr`` names all that it does: results, traces and gates are told apart by it.

    Attributes
    ----------
    name
        What it is called on the command line, before the first colon.
    usage
        Its whole command line form, for help and errors.
    """

    name = ""
    usage = ""

    needs_grid = False
    """Must the places of visual tokens on their images be known?"""

    @classmethod
    def parse(cls, argument: str) -> Reduction:
        """Make the reduction from the text after the first colon.

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

    may_freeze = False
    """May visual tokens be read in layers that do not update them?"""

    def check(self, num_layers: int) -> None:
        """Raise where this reduction cannot serve a backbone of L layers.

        Parameters
        ----------
        num_layers
            L.
        """

    def check_backbone(self, backbone: Backbone) -> None:
        """Raise where this reduction cannot serve this very backbone.

        Parameters
        ----------
        backbone
            As it was found in the model.
        """

    def tokens_left(self, visual_BL: Tensor) -> Tensor:
        """(B, L) visual tokens that each layer processes, of those that would come to it: for cost alone.

        Parameters
        ----------
        visual_BL
            (B, L) visual tokens that would come to each layer without it.
        """
        return visual_BL

    def selection_flops(self, num_visual: int, hidden_size: int) -> float:
        """FLOPs (two per multiply-add) of choosing among so many visual tokens before the first layer.

        Parameters
        ----------
        num_visual
            Visual tokens of one prompt.
        hidden_size
            D.
        """
        return 0.0

    def start(self, rows: TokenRows) -> ReductionPlan:
        """The plan for one prefill.

        Parameters
        ----------
        rows
            Which tokens of the batch are what, before the first layer.
        """
        raise NotImplementedError(f"{type(self).__name__} defines no `start`")


REDUCTIONS: Registry[type[Reduction]] = Registry("reduction", "dyvte.reductions")


def check_share(name: str, ratio: float) -> None:
    """Raise unless `ratio` is a share of the visual tokens."""
    if not 0 <= ratio <= 1:
        raise ConfigError(f"{name} drops a share of the visual tokens: expected 0..1, got {ratio}")


def drawn_order(seed: int, sample_id: str, count: int) -> Tensor:
    """(count,) int64: an order of as many things, drawn; a function of (seed, sample id, count)."""
    found = hashlib.sha256(f"{seed}\0{sample_id}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(found[:7], "big"))
    return torch.randperm(count, generator=generator)


def check_layer(name: str, layer: int, num_layers: int, first: int = 1) -> None:
    """Raise unless tokens that leave after `layer` (from `first` on) spare a later layer something.

    Parameters
    ----------
    name
        Of the reduction, for the message.
    layer
        After which tokens leave.
    num_layers
        L.

    Raises
    ------
    ConfigError
        Naming the range.
    """
    if not first <= layer < num_layers:
        raise ConfigError(
            f"{name} after layer {layer}: expected {first}..{num_layers - 1}, "
            f"the backbone has {num_layers} layers"
        )


def top_share(scores_BN: Tensor, among_BN: Tensor, share: float) -> Tensor:
    """(B, N) bool: the best floor(share * n) of each row's n tokens `among_BN`; of equals the earlier.

    Parameters
    ----------
    scores_BN
        (B, N), higher is better.
    among_BN
        (B, N) bool.
    share
        In [0, 1].
    """
    num_B1 = floor_share(among_BN.sum(1, keepdim=True), share).to(scores_BN.device)
    scores_BN = scores_BN.masked_fill(~among_BN.to(scores_BN.device), -torch.inf)
    order_BN = torch.argsort(scores_BN, dim=1, descending=True, stable=True)
    is_kept_BN = torch.arange(scores_BN.shape[1], device=scores_BN.device) < num_B1
    return torch.zeros_like(is_kept_BN).scatter(1, order_BN, is_kept_BN).cpu() & among_BN


def digest(measured: Tensor) -> str:
    """Eight hex digits of a tensor's content: names settings that were measured, in a `repr`."""
    return hashlib.sha256(measured.contiguous().numpy().tobytes()).hexdigest()[:8]


def floor_share(count: Tensor, share: float) -> Tensor:
    """floor(share * count), int64; a share such as 1 - 0.9 of 10 is 1, whatever the binary fraction says."""
    return (count.double() * share + 1e-9).floor().long()
