"""Several trainings of one trace, and the gates that are best for what they are wanted for.

Trainings on traces cost seconds, and neither objective nor learning rate is best everywhere. They are judged
on held-out images, by the loss that a certificate bounds and the compute that it costs.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from dyvte.calibration import Frontier, ThresholdPath, gate_logits
from dyvte.calibration.apply import bounded_loss
from dyvte.config import to_dict
from dyvte.entries import record_of
from dyvte.errors import ConfigError, DataError
from dyvte.files import write_atomically
from dyvte.gates import GateStack
from dyvte.teacher.trace import Trace
from dyvte.training.config import TrainConfig
from dyvte.training.target import CANDIDATES, OWN, TargetConfig

CHOICE_FILE, FOLDER = "choice.json", "candidates"
SHARES = (0.25, 0.5, 0.75)
"""Of alpha: a certificate asks for an observed loss below alpha, the fewer images the further; the mean over
several is less a matter of chance than one."""
AROUND = (0.9, 1.0, 1.1)
"""The same for a budget."""
MOST_MERGED = 3


@dataclass(frozen=True, kw_only=True)
class Choice:
    """Which training was best, and by how much.

    Attributes
    ----------
    target : the settings, as YAML would hold them.
    num_judged : held-out samples.
    values : of each candidate and of each mean of several that was tried, joined by "+"; smaller is better.
        With alpha: mean visual compute at which the loss is a quarter, a half and three quarters of it; with
        a budget: mean loss at nine, ten and eleven tenths of it.
    chosen : the candidates whose mean the gates are; one or several.
    """

    target: Mapping[str, Any]
    num_judged: int
    values: Mapping[str, float]
    chosen: tuple[str, ...]

    def table(self) -> str:
        """The candidates, best first, as text."""
        what = "visual compute" if self.target.get("alpha") is not None else "loss"
        best = "+".join(self.chosen)
        lines = [f"candidates on {self.num_judged} held-out samples: {what} (smaller is better)"]
        for name, value in sorted(self.values.items(), key=lambda item: item[1]):
            lines.append(f"  {name:32} {value:8.4f}{'  <- kept' if name == best else ''}")
        return "\n".join(lines)

    def write(self, output_dir: Path) -> None:
        """As ``choice.json``."""
        write_atomically(output_dir / CHOICE_FILE, json.dumps(asdict(self), indent=2) + "\n")

    @staticmethod
    def read(output_dir: Path) -> Choice | None:
        """What `write` wrote; None where a run trained once.

        Raises
        ------
        DataError
            If the file is not what this version writes.
        """
        path = output_dir / CHOICE_FILE
        if not path.is_file():
            return None
        advice = "not what this version of dyvte train writes. Choose another output_dir"
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise DataError(f"{path} cannot be read ({error}). Choose another output_dir") from error
        return record_of(Choice, values, str(path), advice)


def candidate_configs(cfg: TrainConfig) -> dict[str, TrainConfig]:
    """The runs that are tried, by name: the configured one first, each in a folder of its own below the
    output folder, all on the same traces and with the same held-out images.

    Candidates that cannot train what the run trains (a freeze head) are omitted.
    """
    shared = {
        "data": replace(cfg.data, validation_fraction=cfg.validation_fraction),
        "target": TargetConfig(),
        "trace_dir": cfg.traces,
    }
    found = {OWN: replace(cfg, **shared)}
    for name in cfg.target.candidates or CANDIDATES:
        recipe = CANDIDATES[name]
        if cfg.gates.freeze_head and not recipe.objective.trains_freezes:
            continue
        rates = {"learning_rate": recipe.learning_rate, "weight_decay": recipe.weight_decay}
        found[name] = replace(
            cfg,
            **shared,
            objective=recipe.objective,
            optimizer=replace(cfg.optimizer, **rates),
            gates=replace(cfg.gates, init_from=None, architecture=recipe.architecture),
        )
    run = cfg.tracking.run_name or cfg.output_dir.name
    return {
        name: replace(
            one,
            output_dir=cfg.output_dir / FOLDER / name,
            tracking=replace(cfg.tracking, run_name=f"{run}-{name}"),
        )
        for name, one in found.items()
    }


def value_of(gates: GateStack, held_out: Trace, target: TargetConfig) -> float:
    """What the gates are worth for the target on held-out samples; smaller is better (see `Choice`)."""
    path = ThresholdPath.of(gate_logits(gates, held_out), held_out, gates.config)
    frontier = Frontier.of(path, bounded_loss(held_out, target.loss, path))
    if target.alpha is not None:
        # never leaving is always possible: full compute, no loss
        found = [min(1.0, frontier.compute_at(share * target.alpha)) for share in SHARES]
    else:
        found = [frontier.loss_at(min(1.0, share * target.budget)) for share in AROUND]
    return sum(found) / len(found)


def choose(
    stacks: Mapping[str, GateStack], held_out: Trace, target: TargetConfig
) -> tuple[GateStack, Choice]:
    """The best of several stacks, or the mean of the best few where that is better still.

    Parameters
    ----------
    stacks
        By name, none of them trained on the held-out samples.
    held_out
        Traced samples, with the features that the stacks read.
    target
        What is wanted.
    """
    values = {name: value_of(gates, held_out, target) for name, gates in stacks.items()}
    ranked = sorted(values, key=lambda name: values[name])
    chosen, best = (ranked[0],), stacks[ranked[0]]
    for name in ranked[1:]:
        if len(chosen) == MOST_MERGED:
            break
        merged = _merged([stacks[one] for one in (*chosen, name)])
        if merged is None:
            continue
        tried = "+".join((*chosen, name))
        values[tried] = value_of(merged, held_out, target)
        if values[tried] < values["+".join(chosen)]:
            chosen, best = (*chosen, name), merged
    return best, Choice(target=to_dict(target), num_judged=len(held_out), values=values, chosen=chosen)


def _merged(stacks: Sequence[GateStack]) -> GateStack | None:
    """Their mean; None where they differ in what they are."""
    try:
        return GateStack.merged(stacks)
    except ConfigError:
        return None
