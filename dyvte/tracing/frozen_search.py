"""The search for frozen layers on configured data: resumable, and judged on held-out samples too."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from dyvte.backbones import open_backbone, read_model_config
from dyvte.backbones.sizes import DecoderShape, decoder_shape
from dyvte.calibration.frozen_sets import (
    RULES,
    Effect,
    Effects,
    FrozenSets,
    Objective,
    SetPasses,
    check_largest,
    count_sets,
    search_frozen_sets,
)
from dyvte.costs.prefill import prefill_flops
from dyvte.data import DataConfig, Selection, select_samples
from dyvte.distributed import own_device
from dyvte.errors import CheckpointError, ConfigError
from dyvte.files import write_atomically
from dyvte.progress import progress
from dyvte.teacher import Teacher, prepared_batches
from dyvte.tracing.config import TracingConfig
from dyvte.tracing.estimates import loaded_dtype, pass_seconds, sample_tokens, shapes_of
from dyvte.tracing.search import check_whole

EFFECTS_FILE = "effects.json"
HELD_OUT_FILE = "effects-held-out.json"
RECORD_FILE = "frozen-sets.json"
"""The sets that were found, beside the effects: what reports write and comparisons read."""
# Of a trace's fingerprint, what has no part in a set's effect.
_OF_TRACES_ALONE = ("features", "exits", "freezes", "kv_share")


@dataclass(frozen=True)
class FoundSets:
    """A search's sets, and the same sets on samples that took no part in it.

    Attributes
    ----------
    search
        What was found.
    held_out
        Rule to the effects of the same sets on held-out samples; None where none were given.
    shape
        Sizes of the decoder.
    """

    search: FrozenSets
    held_out: Mapping[str, Sequence[Effect]] | None
    shape: DecoderShape


@dataclass(frozen=True)
class SearchEstimate:
    """What a search will take, before any weight is read.

    Attributes
    ----------
    num_layers
        L.
    samples, held_out_samples
        On which sets are judged; 0 where nothing is held out.
    sets
        Measured at most.
    full_passes
        Of the backbone over all samples, as many as cost the same: passes with frozen layers are cheaper, and
        those of one step have their first layers in common.
    flops, seconds
        Of the prefills, and at the speed of a matrix product on this machine.
    """

    num_layers: int
    samples: int
    held_out_samples: int
    sets: int
    full_passes: float
    flops: float
    seconds: float


def search_frozen(
    cfg: TracingConfig,
    folder: Path,
    *,
    largest: int | None = None,
    objective: Objective = "risk",
    held_out: DataConfig | None = None,
    rules: Collection[str] = tuple(RULES),
) -> FoundSets:
    """Sets of frozen layers for the configured backbone and data.

    All that was measured is kept in ``folder``; the same search started again goes on where it stopped.

    Parameters
    ----------
    cfg
        Backbone, data and teacher.
    folder
        Where effects are kept.
    largest, objective
        See `dyvte.calibration.frozen_sets.search_frozen_sets`.
    held_out
        Samples on which the sets found are judged as well.
    rules
        Whose sets are wanted.

    Raises
    ------
    CheckpointError
        If the folder holds a search over other data or another backbone.
    ConfigError
        If the settings make no sense for this.
    """
    check_whole(cfg, "the search for frozen layers")
    _check(cfg)
    shape = decoder_shape(read_model_config(cfg.model))
    check_largest(largest, shape.num_layers)  # before the model is loaded
    model, processor = open_backbone(cfg.model, own_device())
    teacher = Teacher(model, processor, cfg.teacher)
    count = count_sets(shape.num_layers, check_largest(largest, shape.num_layers))
    with _effects(teacher, cfg.data, folder / EFFECTS_FILE, count, "frozen sets") as (effects, num_visual_B):
        found = search_frozen_sets(effects, shape.num_layers, num_visual_B, largest, objective, rules)
    if held_out is None:
        return FoundSets(found, None, shape)
    sets = {rule: [one.layers for one in of] for rule, of in found.sets.items()}
    together = sorted({layers for of in sets.values() for layers in of})
    with _effects(teacher, held_out, folder / HELD_OUT_FILE, len(together), "held out") as (effects, _):
        effects(together)
        judged = {rule: effects(of) for rule, of in sets.items()}
    return FoundSets(found, judged, shape)


def estimate_search(
    cfg: TracingConfig, *, largest: int | None = None, held_out: DataConfig | None = None
) -> SearchEstimate:
    """What `search_frozen` will take; parameters as there."""
    _check(cfg)
    config = read_model_config(cfg.model)
    shape = decoder_shape(config)
    num_layers, largest = shape.num_layers, check_largest(largest, shape.num_layers)
    selection = select_samples(cfg.data)
    samples, judged = len(selection.samples), 0 if held_out is None else len(select_samples(held_out).samples)
    tokens = sample_tokens(cfg, shapes_of(cfg.model), selection)
    text, visual = tokens.total - tokens.visual, tokens.visual

    def flops(updated: float, first: float = 0.0) -> float:
        """Of a prefill from layer ``first`` on, with so many layers that update the image."""
        whole = prefill_flops(shape, [text], [visual], [num_layers], freeze_layers_B=[updated])
        return float(whole) * (1 - first / num_layers)

    # The rules' own sets beside the greedy choice's: a tenth of all, their first layers in common too.
    spent = sum(
        flops(num_layers - size - 1, index) for size in range(largest) for index in range(num_layers - size)
    )
    others = 2 * sum(flops(num_layers - size) for size in range(2, largest + 1))
    on_held_out = 3 * sum(flops(num_layers - size) for size in range(1, largest + 1))
    total = samples * (spent + others) + judged * on_held_out
    device = own_device()
    return SearchEstimate(
        num_layers=num_layers,
        samples=samples,
        held_out_samples=judged,
        sets=count_sets(num_layers, largest),
        full_passes=total / flops(num_layers) / samples,
        flops=total,
        seconds=pass_seconds(total, device, loaded_dtype(cfg.model, config, device), 1),
    )


def _check(cfg: TracingConfig) -> None:
    teacher = cfg.teacher
    if teacher.reductions != "none" or teacher.freeze_layers or teacher.freeze_every is not None:
        raise ConfigError(
            "the search for frozen layers chooses them itself: omit teacher.reductions, "
            "teacher.freeze_layers and teacher.freeze_every"
        )
    if teacher.reference != "self":
        raise ConfigError("the search for frozen layers compares a model with itself: omit teacher.reference")


@contextmanager
def _effects(
    teacher: Teacher, data: DataConfig, path: Path, sets: int, what: str
) -> Iterator[tuple[Effects, Tensor]]:
    """Effects on some data, kept in a file, and the samples' numbers of visual tokens."""
    selection = select_samples(data)
    identity = _identity(teacher, selection)
    known = _known(path, identity)
    count = len(selection.samples)

    def keep(effects: Sequence[Effect]) -> None:
        record = {"of": identity, "effects": [one.to_dict() for one in effects]}
        write_atomically(path, json.dumps(record) + "\n")

    with progress(sets * count, what, "sample", done=len(known) * count) as advance:
        passes = SetPasses(teacher.model, _answered(teacher, data, selection), advance)
        yield Effects(passes, known, keep), passes.num_visual_B


def _answered(
    teacher: Teacher, data: DataConfig, selection: Selection
) -> Iterator[tuple[dict[str, Tensor], Tensor]]:
    """Batches of prompts with the answers that are compared."""
    limits = {"file": data.name, "max_bad_samples": data.max_bad_samples}
    for ready in prepared_batches(teacher, selection, **limits):
        if teacher.config.label_source == "greedy":
            yield teacher.answer(ready.inputs)
        else:
            yield ready.inputs, ready.answer_BN


def _identity(teacher: Teacher, selection: Selection) -> dict[str, str]:
    """All that an effect depends on."""
    found = teacher.fingerprint(selection.sha256)
    return {name: value for name, value in found.items() if name not in _OF_TRACES_ALONE}


def _known(path: Path, identity: Mapping[str, str]) -> list[Effect]:
    """Effects that were measured before; CheckpointError where they are of something else."""
    if not path.is_file():
        return []
    try:
        record: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        found, effects = record["of"], [Effect.of_dict(one) for one in record["effects"]]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path}: not what dyvte search-frozen writes ({error!r})") from error
    if differing := sorted(name for name in {*found, *identity} if found.get(name) != identity.get(name)):
        listed = "; ".join(
            f"{name}: there {found.get(name)!r}, here {identity.get(name)!r}" for name in differing
        )
        raise CheckpointError(
            f"{path} belongs to another search ({listed}): remove it, or choose another --output"
        )
    return effects
