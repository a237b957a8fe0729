"""How samples are traced."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from dyvte.errors import ConfigError
from dyvte.gates import DEFAULT_FEATURES, FEATURES, check_features
from dyvte.reductions import REDUCTIONS, parse_reductions
from dyvte.teacher.schedules import Schedules, thinned_exits, thinned_freezes

LabelSource = Literal["greedy", "data"]


@dataclass(frozen=True, kw_only=True)
class TeacherConfig:
    """How samples are traced.

    ``label_source``: "greedy" traces the full model's own greedy answer (``same_answer`` is then exact,
    ``loss`` is the cross-entropy of that answer); "data" traces the answer the data gives, as the papers do.

    ``reference``: what exits are compared with. "self": the full model; "base", for a model with a PEFT
    adapter: the full model with the adapter switched off, whose greedy answers are then the labels too.
    """

    label_source: LabelSource = "greedy"
    """Whose answer is traced."""
    reference: Literal["self", "base"] = "self"
    """What exits are compared with: the full model, or (a model with an adapter) that without its adapter."""
    template: str = "auto"
    """Prompt template: "v1", "chat" or "auto"."""
    try_answers: bool = False
    """Greedy labels: pass over the data's answers first and generate only where the model would say something
    else. The same labels; faster where the model is mostly right."""
    batch_size: int = 32
    """Samples per forward."""
    exit_every: int = 1
    """Label the exits 0, m, 2m, ... and L only; gates at the others stay closed. 1: every exit."""
    exit_layers: tuple[int, ...] = ()
    """The same for the exit layers listed here, and L: where the early ones are known to be of no use, the
    late ones alone cost a fraction of all."""
    freeze_every: int | None = None
    """Label freeze layers too, 0, m, 2m, ...: every labelled exit behind each of them; null: none."""
    freeze_layers: tuple[int, ...] = ()
    """The same for the freeze layers listed here."""
    share_images: bool = True
    """Questions about one image hang on one visual stream, computed once; which do is decided by what the
    decoder is given, not by names. The same labels, to rounding."""
    memory_budget: float | None = None
    """GiB that a pass may hold beside the weights (an estimate): exits and answer positions are taken as many
    at a time as fit, and a batch that does not fit is cut in halves; null: no call larger than the full
    model's own."""
    exits_per_chunk: int | None = None
    """Exit streams per layer call; null: as many as memory_budget allows."""
    max_new_tokens: int = 32
    """Longest greedy answer, in tokens."""
    max_length: int = 2048
    """Longest prompt plus answer, in tokens; longer samples are dropped and counted, never cut."""
    shard_batches: int = 8
    """Batches per shard file: what a killed pass loses at most."""
    reductions: str = field(default="none", metadata={"forms": REDUCTIONS})
    """What is spent on visual tokens before they leave, such as "fastv:2:0.5" or several joined by "+": exits
    of the reduced backbone are traced, against the un-pruned one."""
    features: tuple[str, ...] = field(default=DEFAULT_FEATURES, metadata={"choices": FEATURES})
    """Kept for the gates; gates may read fewer."""

    def __post_init__(self) -> None:
        for name in ("batch_size", "max_new_tokens", "max_length", "shard_batches", "exit_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, found {getattr(self, name)}")
        if self.memory_budget is not None and not self.memory_budget > 0:
            raise ValueError(f"memory_budget must be positive (GiB) or null, found {self.memory_budget}")
        if self.freeze_every is not None and self.freeze_every < 1:
            raise ValueError(f"freeze_every must be at least 1 or null, found {self.freeze_every}")
        if self.freeze_every is not None and self.freeze_layers:
            raise ConfigError("give the freeze layers by freeze_every or by freeze_layers, not by both")
        if self.exit_every != 1 and self.exit_layers:
            raise ConfigError("give the exit layers by exit_every or by exit_layers, not by both")
        check_features(self.features)
        parse_reductions(self.reductions)

    def schedules(self, num_layers: int) -> Schedules:
        """What is labelled on a backbone of L layers.

        Parameters
        ----------
        num_layers
            L.

        Raises
        ------
        ConfigError
            If an exit layer does not lie in 0..L, or a freeze layer in 0..L-1.
        """
        outside = [k for k in self.exit_layers if not 0 <= k <= num_layers]
        if outside:
            raise ConfigError(f"exit_layers: {outside} do not lie in 0..{num_layers}, the backbone's layers")
        exits = self.exit_layers or thinned_exits(num_layers, self.exit_every)
        freezes = self.freeze_layers
        if self.freeze_every is not None:
            freezes = thinned_freezes(num_layers, self.freeze_every)
        return Schedules.of(exits, freezes, num_layers)
