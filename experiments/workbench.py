"""What the experiments share: traces of the embedded scenes, and gates trained from them by name."""

from __future__ import annotations

import argparse
import dataclasses
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from dyvte.comparison.config import parse_budgets
from dyvte.comparison.scenes import TracedScenes, load_scenes
from dyvte.comparison.tuned_gates import TunedGates, load_gates
from dyvte.config import load_config
from dyvte.teacher import TraceStore
from dyvte.teacher.trace import Trace
from dyvte.tracing import trace_data
from dyvte.training.config import TrainConfig
from dyvte.training.train import train

SPLITS = ("train", "calibration", "test")
BUDGETS = parse_budgets("0.25:0.85")
"""Eight shares of the full model's visual compute."""


def arguments(description: str | None) -> argparse.ArgumentParser:
    """Options of every experiment on gates."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", type=Path, default=Path("configs/embedded.yaml"), help="of the training")
    parser.add_argument("--scenes", type=Path, default=Path("data/scenes/instruct"), help="instruction data")
    parser.add_argument("--work", type=Path, default=Path("runs/experiments"), help="traces and gates")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="any setting")
    parser.add_argument("--draws", type=int, default=2000, help="bootstrap draws")
    parser.add_argument("--plot", type=Path, help="plot (png, svg); default: below --work")
    return parser


@dataclass(frozen=True)
class Workbench:
    """One work folder: traces are made once, and gates trained once for each name and seed."""

    config: Path
    scenes: Path
    work: Path
    seeds: tuple[int, ...]
    overrides: tuple[str, ...] = ()

    @staticmethod
    def of(args: argparse.Namespace) -> Workbench:
        """From the options."""
        logging.basicConfig(level=logging.WARNING, format="%(message)s")
        return Workbench(args.config, args.scenes, args.work, tuple(args.seeds), tuple(args.set))

    def settings(self, *overrides: str) -> TrainConfig:
        """The training configuration on these scenes."""
        common = [
            f"data.path={self.scenes / 'train.json'}",
            f"data.image_folder={self.scenes / 'images'}",
            "tracking.report_to=[]",
            f"output_dir={self.work}",
        ]
        return load_config(TrainConfig, self.config, [*common, *self.overrides, *overrides])

    def traces(self, split: str, *overrides: str, name: str = "") -> Path:
        """The trace store of a split, made where it is not complete."""
        folder = self.work / f"trace-{name or split}"
        limit = [] if split == "train" else ["data.limit=null"]
        cfg = self.settings(f"data.path={self.scenes / f'{split}.json'}", *limit, *overrides)
        trace_data(cfg, folder)
        return folder

    def load(self, split: str, *overrides: str, rewritten: str = "") -> TracedScenes:
        """A split's traces with questions and images; ``rewritten`` is the name of others than its own."""
        folder = self.work / f"trace-{rewritten}" if rewritten else self.traces(split, *overrides)
        return load_scenes(folder, self.scenes / f"{split}.json", self.scenes / "images")

    def thinned(self, split: str, freezes: Sequence[int]) -> str:
        """Name of a split's traces as a pass over fewer freeze layers would have made them: gates that use no
        other learn the same from them, sooner."""
        listed = [str(f) for f in freezes]
        thin = partial(Trace.thinned, freezes=freezes)
        return self.rewritten(split, f"freezes-{'-'.join(listed)}", thin, freezes=",".join(listed))

    def rewritten(
        self, split: str, name: str, change: Callable[[Trace], Trace], *, size: int | None = None, **made: str
    ) -> str:
        """Name of a split's traces after a change, made where they are not complete.

        Parameters
        ----------
        split, name
            What is changed, and what the change is called.
        change
            A trace to the changed one.
        size
            Numbers of all parts of the features together; None: as before.
        made
            Entries of the fingerprint that the change makes others.
        """
        store, name = TraceStore.open(self.work / f"trace-{split}"), f"{split}-{name}"
        old = store.manifest
        manifest = dataclasses.replace(
            old, fingerprint={**old.fingerprint, **made}, feature_size=size or old.feature_size
        )
        changed = TraceStore.create(self.work / f"trace-{name}", manifest)
        for index in changed.missing():
            shard = store.read(index)
            changed.write(index, dataclasses.replace(shard, trace=change(shard.trace)))
        return name

    def with_features(
        self, name: str, change: Callable[[Trace], Trace], features: Sequence[str], size: int
    ) -> tuple[str, TracedScenes, TracedScenes]:
        """All splits with other features: the name of the training traces, calibration and test scenes."""
        made = {"size": size, "features": "+".join(features)}
        train, *judged = (self.rewritten(split, name, change, **made) for split in SPLITS)
        calibration, test = (self.load(split, rewritten=one) for split, one in zip(SPLITS[1:], judged))
        return train, calibration, test

    def gates(self, name: str, *overrides: str, trace: str = "train") -> Iterator[Path]:
        """Trained gates of every seed; those that are there already are not trained again."""
        for seed in self.seeds:
            output, store = self.work / f"{name}-seed{seed}", self.work / f"trace-{trace}"
            print(f"[gates] {output.name}", flush=True)
            cfg = self.settings(*overrides, f"seed={seed}", f"trace_dir={store}")
            yield train(dataclasses.replace(cfg, output_dir=output)).gates

    def best(
        self,
        tried: Mapping[str, Sequence[str]],
        calibration: TracedScenes,
        *,
        trace: str = "train",
    ) -> Trained:
        """Gates trained with each of the settings, by name; those with the least mean risk on calibration."""
        found = [self._trained(name, overrides, calibration, trace) for name, overrides in tried.items()]
        return min(found, key=lambda one: one.risk)

    def _trained(self, name: str, overrides: Sequence[str], calibration: TracedScenes, trace: str) -> Trained:
        folders = list(self.gates(name, *overrides, trace=trace))
        named = zip(folders, self.seeds, strict=True)
        gates = [load_gates(folder, f"{name} {seed}", calibration) for folder, seed in named]
        return Trained(name, folders, gates, mean_risk(gates, calibration))


@dataclass(frozen=True)
class Trained:
    """Gates of every seed of one setting, and their mean risk on the calibration scenes."""

    label: str
    folders: list[Path]
    gates: list[TunedGates]
    risk: float


def mean_risk(gates: Sequence[TunedGates], scenes: TracedScenes) -> float:
    """Risk on scenes, mean over budgets and seeds."""
    total = 0.0
    for one in gates:
        points = one.points_on(scenes)
        for budget in BUDGETS:
            total += float(points.mixed_values(scenes.trace.risk, points.at_compute(budget)).mean())
    return total / (len(gates) * len(BUDGETS))


def hidden_size(store: Path) -> int:
    """D of the traced backbone."""
    manifest = TraceStore.open(store).manifest
    return manifest.feature_size // len(manifest.features)
