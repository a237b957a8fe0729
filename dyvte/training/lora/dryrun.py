"""What ``train --lora`` would do: layers, parameters, counts and cost, from the config and data alone."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from dyvte.backbones import describe_config
from dyvte.data import select_samples
from dyvte.tracing.estimates import shapes_of
from dyvte.training.config import TrainConfig
from dyvte.training.dryrun import PlannedRun
from dyvte.training.lora.model import add_adapter, target_pattern, trainable
from dyvte.training.lora.train import check_settings


@dataclass(frozen=True, kw_only=True)
class LoraDryRun(PlannedRun):
    """What a training of an adapter would do.

    Attributes
    ----------
    exits : first and last exit layer that is drawn.
    layers : first and last decoder layer that is adapted, from 1.
    modules : pattern of the adapted modules' names.
    parameters : of the adapter.
    passes : cost of a step at least, in forward passes of the full model.
    """

    exits: tuple[int, int]
    layers: tuple[int, int]
    modules: str
    parameters: int
    passes: float

    def lines(self) -> list[tuple[str, str]]:
        """What each line is about, and its text."""
        size = f"{self.parameters * 16 / 1e6:.1f} MB"
        return [
            ("backbone", f"{self.model_type}, {self.num_layers} layers of {self.hidden_size}"),
            ("exits", f"drawn from {self.exits[0]}..{self.exits[1]}"),
            ("adapter", f"layers {self.layers[0]}..{self.layers[1]}, {self.parameters:,} parameters"),
            ("modules", self.modules),
            ("data", self.data_text()),
            ("steps", f"{self.steps} of {self.samples_per_step} samples, ZeRO {self.zero_stage}"),
            ("training", f"{size} for weights, gradients and moments (fp32)"),
            ("a step", f"at least {self.passes:.1f} forward passes of the full model"),
        ]


def lora_dry_run(cfg: TrainConfig, world_size: int = 1) -> LoraDryRun:
    """What the run would do; raises what the run itself would raise about its data and settings.

    Parameters
    ----------
    cfg
        Of the run.
    world_size
        Processes that it is planned for.
    """
    check_settings(cfg)
    model = shapes_of(cfg.model)
    shape = describe_config(model.config)
    pattern = target_pattern(model, cfg.lora)
    with torch.device("meta"):
        model = add_adapter(model, cfg.lora, cfg.seed)
    selection = select_samples(cfg.data)
    layers = cfg.lora.layers(shape.num_layers)
    return LoraDryRun(
        exits=cfg.lora.exits(shape.num_layers),
        layers=(layers[0], layers[-1]),
        modules=pattern,
        parameters=sum(parameter.numel() for parameter in trainable(model)),
        passes=_passes(cfg, shape.num_layers),
        **PlannedRun.common(cfg, shape, selection, world_size),
    )


def _passes(cfg: TrainConfig, num_layers: int) -> float:
    """Cost of a step in forward passes of the full model, text taken as free (which makes it a lower bound).

    Teacher forward; student forward, its visual tokens in k of L layers; backward through the adapted layers,
    of which those without visual tokens are free too: twice a forward for the states and the adapters.
    """
    first, last = cfg.lora.exits(num_layers)
    start = cfg.lora.layers(num_layers)[0]
    share = cfg.lora.full_share
    mean_exit = share * num_layers + (1 - share) * (first + last) / 2
    exits = [(num_layers, share)] + [(k, (1 - share) / (last - first + 1)) for k in range(first, last + 1)]
    behind = sum(weight * max(0, k - start + 1) for k, weight in exits)
    return 1 + mean_exit / num_layers + 2 * behind / num_layers
