"""Images that a model has seen, kept between prompts: computed once, and only as deep as was needed.

In a causal decoder nothing before the question depends on it. What a prompt begins with is kept in two
segments: the text before the image, and the image behind that text. Each holds keys and values of the layers
that were needed so far, and the states that lead deeper.

Shapes: S tokens of a segment, D hidden size.
"""

from __future__ import annotations

import warnings
import weakref
from collections import Counter, OrderedDict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from dyvte.backbones import Backbone
from dyvte.backbones.adapter import adapter_parameters
from dyvte.decoder.caches import KeysValues
from dyvte.decoder.content import Content
from dyvte.decoder.vision import Encoded
from dyvte.errors import ConfigError
from dyvte.formatting import GIB

DEFAULT_BYTES = 2 * GIB


@dataclass(frozen=True)
class StoreReport:
    """What a store holds and did.

    Attributes
    ----------
    images, nbytes, max_bytes
        What is kept now, and the budget.
    rows_shared
        Rows of prompts that read a stored image.
    rows_alone
        Rows with an image that took the ordinary path, by reason.
    images_computed, images_dropped
        Images taken into the store, and out of it again for want of room.
    """

    images: int
    nbytes: int
    max_bytes: int
    rows_shared: int
    rows_alone: Mapping[str, int]
    images_computed: int
    images_dropped: int


class Segment:
    """A run of tokens that prompts begin with.

    Parameters
    ----------
    content
        As it enters the first layer.
    visual_S
        (S,) bool on the host: which of its tokens are visual; none of a text.
    before
        The segment before it.

    Attributes
    ----------
    states
        (S, D) that enter a layer, by its index: the first, the deepest, and ``kept``.
    kept
        Indices of layers whose states stay: tokens are frozen there.
    text_states
        Of text between visual tokens: states that enter each layer. Where an image leaves, that text goes on.
    keys_values
        Of each layer from the first on, rows 1.
    frozen
        By freeze layer and layer index: those of frozen visual tokens.
    """

    def __init__(self, content: Content, visual_S: Tensor, before: Segment | None = None) -> None:
        self.content, self.visual_S, self.before = content, visual_S, before
        self.is_image = bool(visual_S.any())
        self.text_S = (~visual_S).nonzero().flatten() if self.is_image else visual_S.nonzero().flatten()
        self.states: dict[int, Tensor] = {0: content.states_SD}
        self.kept: set[int] = {0}
        self.text_states: dict[int, Tensor] = {}
        self.keys_values: list[KeysValues] = []
        self.frozen: dict[int, dict[int, KeysValues]] = {}

    def __len__(self) -> int:
        return len(self.content)

    @property
    def depth(self) -> int:
        """Layers whose keys and values are there."""
        return len(self.keys_values)

    @property
    def nbytes(self) -> int:
        """Bytes of all that it holds; what stands before it is counted there."""
        beyond = [states for index, states in self.states.items() if index]
        known = [*self.keys_values, *(one for of in self.frozen.values() for one in of.values())]
        parts = [part for one in known for part in one]
        return self.content.nbytes + _nbytes([*beyond, *self.text_states.values(), *parts])


@dataclass
class _Entry:
    """Something in the store, and how many bytes it had when it was last looked at."""

    value: Any
    is_image: bool
    nbytes: int = 0


@dataclass
class _Counts:
    rows_shared: int = 0
    images_computed: int = 0
    images_dropped: int = 0
    rows_alone: Counter[str] = field(default_factory=Counter)


class ImageStore:
    """Images that a model has seen: ``with exits(model, images=store) as run: model.generate(...)``.

    Prompts that show the same image behind the same text, in one batch or in later ones, under the same exits
    or others, read one copy of it. What decides is the content (pixels, and what enters the first layer),
    neither a path nor an id. Answers equal those without a store up to rounding. One store serves one model
    at a time; another model, or changed weights, empty it.

    Parameters
    ----------
    max_bytes
        Budget of all that is kept: vision features, states, keys and values. The images that were used
        longest ago leave first. A pass may hold more while it runs, as it would without a store.

    Raises
    ------
    ConfigError
        If the budget is not positive.
    """

    def __init__(self, max_bytes: int = DEFAULT_BYTES) -> None:
        if max_bytes < 1:
            raise ConfigError(f"an image store of {max_bytes} bytes: expected at least 1, or no store at all")
        self.max_bytes = int(max_bytes)
        # Does the decoder add vision features between layers? None: no pass has shown it yet.
        self.adds_features: bool | None = None
        self._entries: OrderedDict[Any, _Entry] = OrderedDict()
        self._by_probe: dict[tuple[int, int, bytes], list[Segment]] = {}
        self._model: weakref.ref[nn.Module] | None = None
        self._weights: Any = None
        self._counts = _Counts()
        self._said_small = False
        # Segments that may have grown since the last trim.
        self._touched: dict[int, Segment] = {}

    @property
    def nbytes(self) -> int:
        """Bytes that are kept now."""
        return sum(entry.nbytes for entry in self._entries.values())

    def __len__(self) -> int:
        """Images that are kept now."""
        return sum(entry.is_image for entry in self._entries.values())

    def clear(self) -> None:
        """Forget all images. To be called where weights were written to through ``.data``, which no tensor
        tells; other changes are noticed."""
        self._entries.clear()
        self._touched.clear()
        self._by_probe.clear()

    def report(self) -> StoreReport:
        """What it holds and did so far."""
        counts = self._counts
        return StoreReport(
            images=len(self),
            nbytes=self.nbytes,
            max_bytes=self.max_bytes,
            rows_shared=counts.rows_shared,
            rows_alone=dict(counts.rows_alone),
            images_computed=counts.images_computed,
            images_dropped=counts.images_dropped,
        )

    # -- for the runtime -------------------------------------------------------------------------------
    def bind(self, backbone: Backbone) -> None:
        """Serve this model; forget what another one, or the same with other weights, has seen.

        Parameters
        ----------
        backbone
            Of the block that reads and fills the store.
        """
        weights = _weights_of(backbone.model)
        known = None if self._model is None else self._model()
        if known is not backbone.model or weights != self._weights:
            self.clear()
            self.adds_features = None
        self._model, self._weights = weakref.ref(backbone.model), weights

    def segment(self, content: Content, visual_S: Tensor, before: Segment | None) -> Segment:
        """The segment of this content behind another one: the one that is kept, or a new one.

        Parameters
        ----------
        content
            What enters the first layer for these tokens.
        visual_S
            (S,) bool: which of its tokens are visual.
        before
            The segment that it stands behind; None at the start of a prompt.
        """
        key = (id(before), len(content), content.probe)
        alike = self._by_probe.setdefault(key, [])
        found = next((one for one in alike if one.before is before and content.is_same(one.content)), None)
        if found is None:
            found = Segment(content.copy(), visual_S, before)
            alike.append(found)
            self._counts.images_computed += found.is_image
            self._entries[id(found)] = _Entry(found, found.is_image, found.nbytes)
        self.touch(found)
        return found

    def touch(self, segment: Segment) -> None:
        """It was used just now, and so was what stands before it.

        Parameters
        ----------
        segment
            Kept or not.
        """
        self._touched[id(segment)] = segment
        if id(segment) in self._entries:
            self._entries.move_to_end(id(segment))
        if segment.before is not None:
            self.touch(segment.before)

    def features(self, digest: bytes) -> Encoded | None:
        """What the vision tower made of an image; None if that is not known.

        Parameters
        ----------
        digest
            Of the pixels and what else the tower is given.
        """
        entry = self._entries.get(digest)
        if entry is None:
            return None
        self._entries.move_to_end(digest)
        return entry.value

    def keep_features(self, digest: bytes, encoded: Encoded) -> None:
        """Remember what the vision tower made of an image.

        Parameters
        ----------
        digest
            Of the pixels and what else the tower is given.
        encoded
            Its features as the tower gave them; they count against ``max_bytes``.
        """
        self._entries[digest] = _Entry(encoded, is_image=False, nbytes=encoded.nbytes)

    def has_room_for(self, nbytes: int) -> bool:
        """Would one image of this size fit? Where it would not, that is said once.

        Parameters
        ----------
        nbytes
            Of its features, states, keys and values together.
        """
        if nbytes <= self.max_bytes:
            return True
        if not self._said_small:
            self._said_small = True
            warnings.warn(
                f"an image of this model takes up to {nbytes} bytes, the image store may hold "
                f"{self.max_bytes}: such images are not shared (more: image_store of dyvte eval, "
                "image_store_mb of dyvte serve, ask and chat, or ImageStore(BYTES))",
                stacklevel=2,
            )
        return False

    def count(self, shared: int, alone: int, reason: str | None) -> None:
        """Count the rows of a pass that had an image.

        Parameters
        ----------
        shared
            Rows that read a stored image.
        alone
            Rows whose image was computed as without a store.
        reason
            Why; None where there are no such rows.
        """
        self._counts.rows_shared += shared
        if alone:
            self._counts.rows_alone[reason or "no reason"] += alone

    def trim(self) -> None:
        """Keep to the budget: what was used longest ago leaves."""
        for key, segment in self._touched.items():
            if key in self._entries:
                self._entries[key].nbytes = segment.nbytes
        self._touched.clear()
        total = self.nbytes
        while total > self.max_bytes and self._entries:
            _, entry = self._entries.popitem(last=False)
            total -= entry.nbytes
            self._counts.images_dropped += entry.is_image
            if isinstance(entry.value, Segment):
                self._forget(entry.value)

    def _forget(self, segment: Segment) -> None:
        # Images behind a text that is gone cannot be found any more; being older than it, they are gone too.
        key = (id(segment.before), len(segment), segment.content.probe)
        alike = [one for one in self._by_probe.get(key, []) if one is not segment]
        if alike:
            self._by_probe[key] = alike
        else:
            self._by_probe.pop(key, None)


def _nbytes(tensors: list[Any]) -> int:
    return sum(one.numel() * one.element_size() for one in tensors if isinstance(one, Tensor))


def _weights_of(model: nn.Module) -> tuple[Any, ...]:
    """What tells that weights changed: tensors replaced or written to, adapters switched."""
    versions, has_adapters = [], False
    for module in _modules(model):
        has_adapters |= hasattr(module, "adapter_layer_names")
        versions += [
            (id(one), one.data_ptr(), -1 if one.is_inference() else one._version)
            for one in module._parameters.values()
            if one is not None
        ]
    if not has_adapters:
        return (versions, ())
    return (versions, tuple((name, scale) for name, _, scale in adapter_parameters(model, active=True)))


def _modules(module: nn.Module) -> Iterator[nn.Module]:
    """All modules; `nn.Module.modules` also makes names, and this is asked for in every pass."""
    yield module
    for child in module._modules.values():
        if child is not None:
            yield from _modules(child)
