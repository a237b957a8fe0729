"""Settings of exit-aware distillation, ``dyvte train --lora``; the section ``lora`` of a training run."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from dyvte.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class LoraConfig:
    """A LoRA adapter that lets answers survive an earlier exit.

    The adapted model, its visual tokens gone after exit layer k, learns to say what the model without the
    adapter says with all of them: loss KL(full || exit at k) over the answer, as ``risk`` is defined. Layer n
    is the n-th decoder layer, 1..L; an exit at k leaves layers k+1..L without visual tokens.
    """

    enabled: bool = False
    """Train an adapter in place of gates; ``--lora`` sets it."""
    rank: int = 16
    """Rank of every update."""
    alpha: float = 32.0
    """Updates are scaled by alpha / rank."""
    dropout: float = 0.0
    """On the adapters' input, while training."""
    target_modules: tuple[str, ...] = ()
    """Names of the linear modules that get an adapter, such as q_proj; empty: all of each layer."""
    first_layer: int | None = None
    """First layer with an adapter; null: the one after first_exit. Earlier layers still see the image: their
    adapters can hand it to the text sooner, and change the full model with it."""
    first_exit: int | None = None
    """Earliest exit drawn while training; null: L / 4."""
    last_exit: int | None = None
    """Latest exit drawn; null: L - 1. Equal to first_exit: one fixed K."""
    full_share: float = 0.1
    """Share of rows trained without an exit, so that the adapted full model goes on saying the same."""
    loss: Literal["kl", "cross_entropy"] = "kl"
    """kl: the un-adapted model's distribution; cross_entropy: its greedy answer alone."""
    gradient_checkpointing: bool = False
    """Recompute layers in the backward pass: less memory, a third more time."""

    def __post_init__(self) -> None:
        if self.rank < 1 or self.alpha <= 0:
            raise ValueError(f"rank must be at least 1 and alpha positive, found {self.rank}, {self.alpha}")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout must lie in [0, 1), found {self.dropout}")
        if not 0 <= self.full_share <= 1:
            raise ValueError(f"full_share must lie in [0, 1], found {self.full_share}")
        if self.full_share == 1 and self.loss == "kl":
            raise ValueError(
                "full_share 1 with loss kl leaves nothing to learn: without an exit the adapted model agrees "
                "with the full one from the start"
            )

    def exits(self, num_layers: int) -> tuple[int, int]:
        """Earliest and latest exit in force; ConfigError unless 0 <= earliest <= latest <= L."""
        first = max(1, num_layers // 4) if self.first_exit is None else self.first_exit
        last = max(first, num_layers - 1) if self.last_exit is None else self.last_exit
        if not 0 <= first <= last <= num_layers:
            raise ConfigError(
                f"lora.first_exit {first} and lora.last_exit {last}: expected 0 <= first <= last <= "
                f"{num_layers}, the number of decoder layers"
            )
        return first, last

    def layers(self, num_layers: int) -> range:
        """The layers with an adapter, counted from 1; ConfigError if there is none."""
        first = self.exits(num_layers)[0] + 1 if self.first_layer is None else self.first_layer
        if not 1 <= first <= num_layers:
            raise ConfigError(
                f"lora.first_layer {first}: expected 1..{num_layers}, one of the decoder layers"
            )
        return range(first, num_layers + 1)
