"""What an objective is: settings, and the loss that they make on a training's traces.

Shape letters: B samples, L decoder layers.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar

from torch import Tensor

from dyvte.registry import Registry
from dyvte.teacher.trace import Trace


class Objective:
    """Base of all objectives: a frozen dataclass whose fields are the settings below ``objective``.

    The first field is ``name``, with the name as its one value and default; a subclass gives `prepared`, and
    is registered.
    """

    name = ""

    starts_uniform: ClassVar[bool] = False
    """Do new gates start with all exits equally likely (:func:`dyvte.gates.uniform_offsets`)? Else at 0."""

    trains_freezes: ClassVar[bool] = False
    """Can it train a freeze head? It then takes the logits of both heads (`dyvte.gates.HeadLogits`)."""

    one_layer_per_step = False
    """Does a step train one random gate, as the DyVTE reference code does? Else all."""

    def prepared(self, train: Trace) -> Callable[..., Tensor]:
        """The loss.

        Parameters
        ----------
        train
            All training samples, for what must be known beforehand, such as how often a label occurs.

        Returns
        -------
        Callable
            ``(logits, trace) -> scalar``, where ``logits`` are the gates' (B, L) exit minus stay logits,
            offsets included, of the trace's samples, or those of both heads. Column L-1 (gate L) never takes
            part: there is nothing left to leave. With `one_layer_per_step` also
            ``(logits_B, trace, layer=k)``: gate k alone.
        """
        raise NotImplementedError(f"{type(self).__name__} defines no `prepared`")


OBJECTIVES: Registry[type[Objective]] = Registry("objective", "dyvte.objectives")
