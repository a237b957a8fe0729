"""What the gate benchmarks share: traces of the embedded scenes, and gates trained from them by name."""

from __future__ import annotations

import argparse
import dataclasses
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from dyvte.comparison.baselines import GateContender, load_gates
from dyvte.comparison.scenes import TracedScenes, load_scenes
from dyvte.config import load_config
from dyvte.teacher import TraceStore
from dyvte.tracing import trace_data
from dyvte.training.config import TrainConfig
from dyvte.training.train import train

SPLITS = ("train", "calibration", "test")


def bench_arguments(description: str | None) -> argparse.ArgumentParser:
    """Options of every gate benchmark."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", type=Path, default=Path("configs/embedded.yaml"), help="of the training")
    parser.add_argument("--scenes", type=Path, default=Path("data/scenes/instruct"), help="instruction data")
    parser.add_argument("--work", type=Path, default=Path("runs/gate_benchmarks"), help="traces and gates")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="any setting")
    parser.add_argument("--draws", type=int, default=2000, help="bootstrap draws")
    parser.add_argument("--plot", type=Path, help="picture (png, svg); default: below --work")
    return parser


@dataclass(frozen=True)
class Bench:
    """One work folder: traces are made once, and gates trained once for each name and seed."""

    config: Path
    scenes: Path
    work: Path
    seeds: tuple[int, ...]
    overrides: tuple[str, ...] = ()

    @staticmethod
    def of(args: argparse.Namespace) -> Bench:
        """From the options."""
        logging.basicConfig(level=logging.WARNING, format="%(message)s")
        return Bench(args.config, args.scenes, args.work, tuple(args.seeds), tuple(args.set))

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

    def load(self, split: str, *overrides: str) -> TracedScenes:
        """A split's traces with questions and images."""
        folder = self.traces(split, *overrides)
        return load_scenes(folder, self.scenes / f"{split}.json", self.scenes / "images")

    def gates(self, name: str, *overrides: str, trace: str = "train") -> Iterator[Path]:
        """Trained gates of every seed; those that are there already are not trained again."""
        for seed in self.seeds:
            output, store = self.work / f"{name}-seed{seed}", self.work / f"trace-{trace}"
            print(f"[gates] {output.name}", flush=True)
            cfg = self.settings(*overrides, f"seed={seed}", f"trace_dir={store}")
            yield train(dataclasses.replace(cfg, output_dir=output)).gates

    def contenders(
        self, name: str, calibration: TracedScenes, *overrides: str, trace: str = "train"
    ) -> list[GateContender]:
        """Those gates with their thresholds over budgets, found on the calibration scenes."""
        found = self.gates(name, *overrides, trace=trace)
        return [load_gates(folder, f"{name} {seed}", calibration) for folder, seed in zip(found, self.seeds)]


def mean_risk(gates: Sequence[GateContender], scenes: TracedScenes, budgets: Sequence[float]) -> float:
    """Risk on the (calibration) scenes, mean over budgets and seeds: what settings are chosen by."""
    total = 0.0
    for one in gates:
        points = one.points_on(scenes)
        for budget in budgets:
            total += float(points.mixed_values(scenes.trace.risk, points.at_compute(budget)).mean())
    return total / (len(gates) * len(budgets))


def hidden_size(store: Path) -> int:
    """D of the traced backbone."""
    manifest = TraceStore.open(store).manifest
    return manifest.feature_size // len(manifest.features)
