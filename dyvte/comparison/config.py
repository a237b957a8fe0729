"""Settings of ``dyvte compare``, and the text forms of what it takes several of."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from dyvte.errors import ConfigError
from dyvte.evaluation.generation import GenerationSettings
from dyvte.evaluation.runner import EvalConfig
from dyvte.reductions import REDUCTIONS, parse_reductions
from dyvte.tasks.base import TASKS, Benchmark, check_dialect

_DEFAULT_STEPS = 8


@dataclass(frozen=True)
class BenchmarkSource:
    """A benchmark's questions.

    Attributes
    ----------
    name : as ``dyvte eval --benchmark`` takes it.
    root : folder of the data, in any format of that benchmark.
    title : what tables and plots call it.
    """

    name: str
    root: Path
    title: str

    @staticmethod
    def parse(text: str) -> BenchmarkSource:
        """From ``NAME=ROOT``, titled as the benchmark is, or ``TITLE:NAME=ROOT``.

        Raises
        ------
        ConfigError
            Malformed, or no benchmark has that name.
        """
        label, equals, root = text.partition("=")
        title, colon, name = label.rpartition(":")
        if not equals or not root or (colon and not title.strip()):
            raise ConfigError(
                f"benchmark {text!r}: expected NAME=ROOT, such as gqa=/data/gqa, or TITLE:NAME=ROOT"
            )
        task = TASKS.get(name, given=text)
        return BenchmarkSource(name, Path(root), title.strip() or task.title)

    @property
    def folder(self) -> str:
        """The title as a folder name."""
        return "".join(c if c.isalnum() or c in "._" else "-" for c in self.title.lower())


def parse_budgets(text: str) -> tuple[float, ...]:
    """Shares of the full model's visual compute: ``0.25:0.85`` (eight, evenly), ``0.1:0.9:5``, ``0.3,0.5``.

    Raises
    ------
    ConfigError
        Malformed, or not shares in (0, 1].
    """
    try:
        if ":" in text:
            low, high, *count = text.split(":")
            steps = int(*count) if count else _DEFAULT_STEPS
            budgets = [float(one) for one in np.linspace(float(low), float(high), steps)]
        else:
            budgets = [float(part) for part in text.split(",") if part.strip()]
    except (TypeError, ValueError):
        budgets = []
    if text.strip() and (not budgets or not all(0 < budget <= 1 for budget in budgets)):
        raise ConfigError(
            f"budgets {text!r}: expected shares of the full model's visual compute, such as 0.25:0.85, "
            "0.25:0.85:5 or 0.3,0.5"
        )
    return tuple(sorted(set(budgets)))


@dataclass(frozen=True, kw_only=True)
class CompareConfig(GenerationSettings):
    """Settings of ``dyvte compare``."""

    gates: tuple[str, ...] = field(metadata={"path": True})
    """Gates checkpoints, one per seed."""
    output: Path
    """Where the report goes."""
    data_train: Path
    """LLaVA json that the gates were trained on; the question-only router learns from the same samples."""
    data_calibration: Path
    """LLaVA json of the calibration samples: whatever is chosen is chosen on them."""
    data_test: Path
    """LLaVA json of the samples that rules are compared on."""
    image_folder: Path
    """What the image entries of the json files are relative to."""
    traces_train: Path
    """Trace store of ``data_train``, as ``dyvte train`` leaves it in <output_dir>/trace."""
    traces_calibration: Path
    """Trace store of ``data_calibration``."""
    traces_test: Path
    """Trace store of ``data_test``."""
    benchmarks: tuple[str, ...] = field(default=(), metadata={"path": True})
    """Benchmarks to answer, NAME=ROOT or TITLE:NAME=ROOT: gqa=/data/gqa or mini-GQA:gqa=data/mini_gqa."""
    controls: tuple[str, ...] = field(default=(), metadata={"forms": REDUCTIONS})
    """Reductions that the full model answers the benchmarks with as well: pool:2, divprune:0.75."""
    budgets: str = ""
    """Also compare at shares of visual compute: LOW:HIGH (eight, evenly), LOW:HIGH:COUNT, or A,B,C."""
    baselines: tuple[str, ...] = field(default=(), metadata={"path": True})
    """With budgets: further gates to compare with, NAME=FOLDER; the same name again is another seed."""
    plans: Path | None = None
    """Also compare plans (policy with reductions): a folder with the searches calibration and test, each made
    by ``dyvte search-plan --output``; at the budgets, or at 50, 33, 22 and 11 % without."""
    frozen_sets: Path | None = None
    """Also show static sets of frozen layers (ShortV) at what they cost: a folder that ``dyvte search-frozen
    --held-out-path`` wrote, with data_test held out."""
    question_suffix: str | None = None
    """Appended to benchmark questions; null: the benchmark's own request, as LLaVA does."""
    dialect: str = "original"
    """Whose rule reads the answers: original, lmms or vlmevalkit."""
    batch_size: int = 64
    """Questions of a batch."""
    max_new_tokens: int | None = None
    """Tokens of an answer at most; null: as many as the benchmarks' answers need."""
    limit: int | None = None
    """Answer this many questions of each benchmark only."""
    earlier: tuple[Path, ...] = ()
    """Outputs of ``dyvte eval``: what was asked there in the same way is taken from there."""
    sweep_questions: int = 500
    """Questions of the first benchmark answered at every fixed K, for score curves; 0 for none."""
    eta: float = 0.003
    """VTW's bound on the mean KL, in nats."""
    search_samples: int = 20
    """Calibration samples for VTW's K, as in its paper."""
    max_bad_samples: int = 0
    """Unusable calibration samples, and questions of each benchmark that cannot be asked, that are tolerated:
    they are excluded, named and counted."""
    lam: float | None = None
    """Price of a layer for the router's training; null: what the gates were trained with."""
    timing_batches: int = 4
    """Batches of the first benchmark on which prefills are timed; 0 for none."""
    timing_repeats: int = 5
    """Turns on each of them."""
    num_draws: int = 2000
    """Bootstrap draws."""

    def __post_init__(self) -> None:
        if self.max_new_tokens is None:
            needed = [TASKS.get(source.name).max_new_tokens for source in self.sources]
            object.__setattr__(self, "max_new_tokens", max(needed, default=Benchmark.max_new_tokens))
        super().__post_init__()
        check_dialect(self.dialect)
        if not self.gates:
            raise ConfigError("no gates given: name one checkpoint folder per seed")
        titles = [source.title for source in self.sources]
        if twice := sorted({title for title in titles if titles.count(title) > 1}):
            raise ConfigError(
                f"two benchmarks are called {twice[0]!r}: give titles, such as "
                f"'{twice[0]} 2:{self.sources[titles.index(twice[0])].name}=ROOT'"
            )
        if self.baselines and not self.shares:
            raise ConfigError("baselines are compared at budgets: give --budgets, such as 0.25:0.85")
        _ = self.baseline_gates
        for text in self.controls:
            parse_reductions(text)

    @property
    def sources(self) -> tuple[BenchmarkSource, ...]:
        """Name, data and title of every benchmark."""
        return tuple(map(BenchmarkSource.parse, self.benchmarks))

    @property
    def shares(self) -> tuple[float, ...]:
        """Budgets as shares of the full model's visual compute."""
        return parse_budgets(self.budgets)

    @property
    def baseline_gates(self) -> dict[str, tuple[str, ...]]:
        """Folders of the further gates, one per seed, by name."""
        found: dict[str, tuple[str, ...]] = {}
        for text in self.baselines:
            name, equals, folder = text.partition("=")
            if not equals or not name.strip() or not folder:
                raise ConfigError(f"baseline {text!r}: expected NAME=FOLDER of a gates checkpoint")
            found[name.strip()] = (*found.get(name.strip(), ()), folder)
        return found

    def evaluation_of(self, source: BenchmarkSource) -> EvalConfig:
        """The runner's settings for a benchmark."""
        asking = {one.name: getattr(self, one.name) for one in dataclasses.fields(GenerationSettings)}
        return EvalConfig(
            **{**asking, "max_bad_samples": 0},  # those are excluded before
            benchmark=source.name,
            data=source.root,
            output=self.output / "runs" / source.folder,
            question_suffix=self.question_suffix,
            dialect=self.dialect,
            limit=self.limit,
            earlier=self.earlier,
            timing_batches=0,
        )
