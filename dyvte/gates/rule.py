"""When a row freezes and when it leaves, given its gates' logits: the one place of the decision rule.

Shapes: B rows, L decoder layers. The heads asked at k read the output of the k-th layer; k = 0 is before the
first.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from dyvte.errors import ConfigError
from dyvte.gates.logits import HeadLogits
from dyvte.gates.offsets import CLOSED


def logit_threshold(threshold: float) -> float:
    """log(t / (1 - t)); infinite at the ends.

    Parameters
    ----------
    threshold
        A probability t in 0..1.
    """
    if threshold >= 1.0:
        return math.inf
    return math.log(threshold / (1.0 - threshold)) if threshold > 0.0 else -math.inf


def check_rule(
    num_layers: int | None,
    threshold: float,
    min_layer: int,
    fallback: int | None,
    mode: str = "gates",
    freeze_threshold: float | None = None,
) -> None:
    """See that the settings of the decision rule make sense; L may be unknown yet.

    Parameters
    ----------
    num_layers
        L; None: not known yet.
    threshold
        Of exiting, in 0..1.
    min_layer
        First layer that may be an exit.
    fallback
        Exit layer of a row whose gates fail; None: L.
    mode
        "gates" or "fixed".
    freeze_threshold
        Of freezing; None without a freeze head.

    Raises
    ------
    ConfigError
        One of them is out of its range, which is named.
    """
    for name, value in (("threshold", threshold), ("freeze_threshold", freeze_threshold)):
        if value is not None and not 0.0 <= value <= 1.0:
            raise ConfigError(f"{name} {value}: expected a probability in 0..1")
    if min_layer < 1:
        raise ConfigError(
            f"min_layer {min_layer}: the first gate is gate 1; before any layer leaves the policy fixed:0"
        )
    if mode not in ("gates", "fixed"):
        raise ConfigError(f"mode {mode!r}: expected 'gates' or 'fixed'")
    top = "L" if num_layers is None else str(num_layers)
    if fallback is not None and (fallback < 0 or (num_layers is not None and fallback > num_layers)):
        raise ConfigError(f"exit layer {fallback}: expected 0..{top} (the backbone has {top} decoder layers)")


def follow_threshold(freeze_threshold: float, threshold: float, new: float) -> float:
    """The freeze threshold that goes with exit threshold ``new`` where (``threshold``, ``freeze_threshold``)
    went together: one path drives both heads, at a constant distance of their logits.

    Where the distance is infinite (a threshold of 0 or 1) both are ``new``.

    Parameters
    ----------
    freeze_threshold, threshold
        The pair that was chosen together, probabilities.
    new
        Exit threshold that is used instead.
    """
    if new == threshold:
        return freeze_threshold
    gap = logit_threshold(freeze_threshold) - logit_threshold(threshold)
    level = logit_threshold(new)
    if gap == 0 or not math.isfinite(gap) or not math.isfinite(level):
        return new
    return float(torch.tensor(level + gap, dtype=torch.float64).sigmoid())


class ScheduleRule:
    """The decision rule, one layer at a time; `schedules` and the runtime both go through it.

    A row freezes at the first layer whose freeze logit is strictly above log(t / (1 - t)), t the freeze
    threshold. It leaves, frozen or not, at the first k >= min_layer whose exit logit is strictly above that
    of the exit threshold, and is frozen there at the latest. A logit that is asked and not finite, of either
    head, makes its row stop asking: it leaves at max(that layer, fallback), without a fallback never, and a
    row that was still updated freezes nowhere before. Exit gates 1..L-1 decide, freeze gates 0..L-1.

    Parameters
    ----------
    num_rows, num_layers
        B and L.
    threshold
        Of exiting, a probability; 1: never.
    min_layer
        First layer after which a row may leave.
    fallback
        Where a row leaves, at the earliest, whose gate output is not finite; None: L.
    freeze_threshold
        Of freezing; None: no freeze head, a row is frozen where it leaves.

    Attributes
    ----------
    exit_layers_B, freeze_layers_B
        (B,) int64; L while not decided. Never is a row's freeze layer above its exit layer.
    asking_B
        (B,) bool: rows that are not settled.
    fallback_B
        (B,) bool: rows whose gate output was not finite.
    """

    def __init__(
        self,
        num_rows: int,
        num_layers: int,
        threshold: float,
        min_layer: int = 1,
        fallback: int | None = None,
        freeze_threshold: float | None = None,
    ) -> None:
        """``freeze_threshold`` None: no freeze head, a row is frozen where it leaves."""
        check_rule(num_layers, threshold, min_layer, fallback, freeze_threshold=freeze_threshold)
        self.freezes = freeze_threshold is not None
        self.cut: float | Tensor = cut(threshold)
        self.freeze_cut: float | Tensor = math.inf
        if freeze_threshold is not None:
            self.freeze_cut = cut(freeze_threshold)
        self.num_layers = num_layers
        self.min_layer = min_layer
        self.fallback = num_layers if fallback is None else fallback
        self.exit_layers_B = torch.full((num_rows,), num_layers, dtype=torch.int64)
        self.freeze_layers_B = self.exit_layers_B.clone()
        self.asking_B = torch.ones(num_rows, dtype=torch.bool)
        self.fallback_B = torch.zeros(num_rows, dtype=torch.bool)

    def wants(self, k: int) -> bool:
        """Does any row still need the heads at k?

        Parameters
        ----------
        k
            Layers behind the features, 0..L-1.
        """
        return bool(self._exit_asked(k).any() or self._freeze_asked(k).any())

    def step(self, k: int, logits: Tensor) -> None:
        """Take in the logits (on CPU) at k: (B,) of the exit head, or (2, B) of exit and freeze head.

        Parameters
        ----------
        k
            Layers behind the features, 0..L-1, rising from call to call.
        logits
            Entries of rows that are not asked at k do not count.
        """
        exit_B, freeze_B = logits if logits.dim() == 2 else (logits, None)
        leaving_B, freezing_B = self._exit_asked(k), self._freeze_asked(k)
        broken_B = leaving_B & ~torch.isfinite(exit_B)
        if freeze_B is not None:
            broken_B |= freezing_B & ~torch.isfinite(freeze_B)
            freezes_B = freezing_B & ~broken_B & (freeze_B > self.freeze_cut)
            self.freeze_layers_B[freezes_B] = k
        leaves_B = leaving_B & ~broken_B & (exit_B > self.cut)
        self.fallback_B |= broken_B
        self._leave(leaves_B, k)
        self._leave(broken_B, max(k, self.fallback))

    def settle(self, rows_B: Tensor, k: int) -> None:
        """Rows that have no visual token behind layer k, whoever took the last: nothing is left to decide.

        Parameters
        ----------
        rows_B
            (B,) bool.
        k
            The layer.
        """
        self._leave(rows_B & (self.exit_layers_B > k), k)
        self.asking_B &= ~rows_B

    def _leave(self, rows_B: Tensor, k: int) -> None:
        self.exit_layers_B[rows_B] = k
        # In place: plans hold these tensors.
        torch.minimum(self.freeze_layers_B, self.exit_layers_B, out=self.freeze_layers_B)
        self.asking_B &= ~rows_B

    def _exit_asked(self, k: int) -> Tensor:
        return self.asking_B & (self.min_layer <= k < self.num_layers)

    def _freeze_asked(self, k: int) -> Tensor:
        still_updated_B = self.freeze_layers_B == self.num_layers
        return self.asking_B & still_updated_B & (self.freezes and 0 <= k < self.num_layers)


@dataclass(frozen=True)
class Schedules:
    """Where each of B rows freezes and leaves, (B,) int64 each.

    Attributes
    ----------
    freeze_layers_B
        How many layers update the visual tokens; never above the exit layer.
    exit_layers_B
        In how many layers text reads them.
    """

    freeze_layers_B: Tensor
    exit_layers_B: Tensor


def schedules(
    logits: Tensor | HeadLogits,
    threshold: float,
    min_layer: int = 1,
    fallback: int | None = None,
    freeze_threshold: float | None = None,
) -> Schedules:
    """The schedules that the rule (`ScheduleRule`) draws from all logits.

    Parameters
    ----------
    logits
        (B, L) of gates without freeze head, or those of both heads on the traced streams.
    threshold, min_layer, fallback
        As `ScheduleRule` takes them.
    freeze_threshold
        Of the freeze head; None: the exit threshold.

    Raises
    ------
    ConfigError
        If a row would freeze after a layer whose stream was not traced: nothing is known of it then.
    """
    both = isinstance(logits, HeadLogits)
    given = logits.cpu() if isinstance(logits, HeadLogits) else logits.detach().cpu()
    num_layers = given.num_layers if isinstance(given, HeadLogits) else given.shape[1]
    freezes = (threshold if freeze_threshold is None else freeze_threshold) if both else None
    rule = ScheduleRule(len(given), num_layers, threshold, min_layer, fallback, freezes)
    for k in _layers_to_ask(given):
        if rule.wants(k):
            rule.step(k, _asked(given, rule, k) if isinstance(given, HeadLogits) else given[:, k - 1])
    return Schedules(rule.freeze_layers_B, rule.exit_layers_B)


def exit_layers(
    logits_BL: Tensor, threshold: float, min_layer: int = 1, fallback: int | None = None
) -> Tensor:
    """(B,) int64 exit layers that the rule draws from the logits of gates without freeze head.

    Parameters
    ----------
    logits_BL
        Column k-1: after layer k.
    threshold
        Of exiting, in (0, 1].
    min_layer
        First layer that may be an exit.
    fallback
        Exit layer of a row whose gates fail; None: L.
    """
    return schedules(logits_BL, threshold, min_layer, fallback).exit_layers_B


def _layers_to_ask(logits: Tensor | HeadLogits) -> list[int]:
    """The layers 0..L-1 at which any head may decide; at the others every logit is that of a closed gate."""

    def speaks(values: Tensor) -> Tensor:
        return ((values > CLOSED / 2) | ~values.isfinite()).flatten(0, -2).any(0)

    if not isinstance(logits, HeadLogits):
        return [0, *(speaks(logits)[:-1].nonzero().flatten() + 1).tolist()]
    speaks_L = speaks(logits.freeze_BL)
    speaks_L[1:] |= speaks(logits.exit_BGL)[:-1]
    return speaks_L.nonzero().flatten().tolist()


def _asked(logits: HeadLogits, rule: ScheduleRule, k: int) -> Tensor:
    """(2, B) what the heads say at k to rows that froze as the rule says so far."""
    stream_of = torch.full((rule.num_layers + 1,), -1)
    stream_of[[*logits.freeze_layers, rule.num_layers]] = torch.arange(len(logits.freeze_layers) + 1)
    # A settled row is not asked any more: any stream will do.
    streams_B = torch.where(rule.asking_B, stream_of[rule.freeze_layers_B], 0)
    if bool((streams_B < 0).any()):
        unknown = sorted(set(rule.freeze_layers_B[streams_B < 0].tolist()))
        raise ConfigError(
            f"gates freeze rows after layers {unknown}; streams were traced for {logits.freeze_layers} alone"
        )
    rows_B = torch.arange(len(logits))
    exit_B = logits.exit_BGL[rows_B, streams_B, k - 1] if k else torch.full((len(logits),), CLOSED)
    return torch.stack((exit_B.to(logits.freeze_BL.dtype), logits.freeze_BL[:, k]))


def cut(threshold: float) -> float:
    """The level that a logit must exceed at a threshold.

    Parameters
    ----------
    threshold
        A probability; at 1 nothing exceeds it.
    """
    return max(logit_threshold(threshold), CLOSED / 2)  # at threshold 0 a closed gate stays closed
