"""Which image-text-to-text classes of the installed transformers let visual tokens leave: tried, not typed.

``python -m tests.helpers.support [FAMILY ...]`` tries them all, or some, and writes docs/support.md.
"""

from __future__ import annotations

import re
import sys
import traceback
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES as CLASSES

import dyvte
from dyvte.backbones import describe, describe_config
from dyvte.errors import DyvteError, UnsupportedBackboneError
from dyvte.policies import OraclePolicy
from tests.helpers.families import ATTENTION, FAMILIES
from tests.helpers.reference import exit_by_masks, exit_in_own_masks, frozen_by_hooks
from tests.helpers.zoo import generic

FILE = Path(__file__).parents[2] / "docs" / "support.md"
EXITS = ([1, -1, 3], [0, -1, 4])
# Layers that update the image in those rows.
FREEZES = ([0, 0, 2], [0, 0, 1])
NO_BAR = "\\|"
NOTHING = "-"
OPTIONS = {"max_new_tokens": 9, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}


@dataclass(frozen=True)
class Row:
    """One line of the table."""

    family: str
    model_class: str
    decoder: str
    status: str
    frozen: str
    detail: str

    def __str__(self) -> str:
        cells = (self.family, self.model_class, self.decoder, self.status, self.frozen, self.detail)
        return f"| {' | '.join(cell.replace('|', NO_BAR) for cell in cells)} |"


def families() -> Iterator[tuple[str, str]]:
    """Names and classes, in order."""
    yield from sorted(CLASSES.items())


def default_config(family: str) -> Any:
    """The family's default config; None where it has none."""
    try:
        return CONFIG_MAPPING[family]()
    except Exception:
        return None


def judge(family: str) -> tuple[str, str, str]:
    """(decoder, "served" | "refused" | "no default config", reason): what the config alone says."""
    config = default_config(family)
    if config is None:
        return "?", "no default config", ""
    try:
        decoder = config.get_text_config(decoder=True).model_type
    except ValueError:
        decoder = "?"
    try:
        describe_config(config)
    except UnsupportedBackboneError as error:
        return decoder or "?", "refused", str(error)
    return decoder or "?", "served", ""


def try_family(family: str, model_class: str) -> Row:
    """Judge the config; where it is served, build the model and compare exits with brute force."""
    decoder, verdict, reason = judge(family)
    if verdict != "served":
        return Row(family, model_class, decoder, verdict, NOTHING, reason)
    return Row(family, model_class, decoder, *_compare(family, model_class))


def _compare(family: str, model_class: str) -> tuple[str, str, str]:
    """Status of exits and of freezes, and what was compared."""
    with_tower = family in FAMILIES
    try:
        if with_tower:
            model, inputs, visual_ids = FAMILIES[family]("eager")
        else:
            model = generic.tiny(getattr(transformers, model_class), default_config(family))
            inputs, visual_ids = generic.inputs(), describe(model).visual_token_ids
        stock = model.generate(**inputs, **OPTIONS).logits[0]
    except DyvteError as error:
        return "refused", NOTHING, str(error)
    except ImportError as error:
        missing = re.search(r"requires the (\S+) library", str(error))
        return "not tried", NOTHING, f"needs the package {missing[1]}" if missing else str(error)
    except Exception as error:
        _show(family)
        return "not tried", NOTHING, f"no tiny model: {type(error).__name__}"
    exits, reason = _judged(family, model, inputs, visual_ids, stock, None)
    if exits != "exact":
        return exits, NOTHING, reason
    frozen, _ = _judged(family, model, inputs, visual_ids, stock, FREEZES)
    return (
        exits,
        frozen,
        "with a random vision tower" if with_tower else "decoder, placeholders as plain tokens",
    )


def _judged(family, model, inputs, visual_ids, stock, freezes) -> tuple[str, str]:
    """Status and reason of exits, or of freezes before them."""
    try:
        worst, moved = _largest_difference(family, model, inputs, visual_ids, stock, freezes)
    except DyvteError as error:
        return "refused", str(error)
    except Exception as error:
        _show(family)
        return "fails", f"{type(error).__name__}"
    if worst > 1e-4 or not moved:
        print(f"{family}: largest difference {worst:.2g}, moved {moved}", file=sys.stderr)
        return "not exact", "logits differ from brute force"
    return "exact", ""


def _largest_difference(family, model, inputs, visual_ids, stock, freezes) -> tuple[float, bool]:
    """Largest difference of any logit from brute force, and whether the schedules change anything."""
    layers = describe(model, visual_ids).layers
    worst, moved = 0.0, True
    for exits, freeze in zip(EXITS, freezes or EXITS, strict=True):
        if family in FAMILIES:
            masks = exit_by_masks(model, exits, visual_ids, attention=ATTENTION.get(family))
        else:
            masks = exit_in_own_masks(model, exits, visual_ids, layers)
        with masks, frozen_by_hooks(model, freeze, visual_ids, layers):
            expected = model.generate(**inputs, **OPTIONS, use_cache=False)
        policy = OraclePolicy(exits, freeze if freezes else None)
        with dyvte.VisualExit.from_policy(policy)(model):
            got = model.generate(**inputs, **OPTIONS)
        if not torch.equal(got.sequences, expected.sequences):
            worst = float("inf")
        for a, b in zip(got.logits, expected.logits, strict=True):
            worst = max(worst, float((a - b).abs().max()))
        change_B = (got.logits[0] - stock).abs().amax(1)
        moved &= all(change_B[row] > 1e-3 for row in (0, 2) if freeze[row] < generic.LAYERS)
    return worst, moved


def _show(family: str) -> None:
    print(f"{family}:", file=sys.stderr)
    traceback.print_exc(limit=-3)


HEAD = f"""# Which models are supported

Written by `python -m tests.helpers.support`; do not edit the table. It holds every image-text-to-text class
of transformers {transformers.__version__}, judged by its default config.

- **exact**: a tiny random model gives the logits of a brute-force reference (full length, no cache, masks
  per layer) within 1e-4 and the same tokens, over a prefill and eight decode steps; rows with one image,
  none and two, left-padded, leaving at different layers.
- **frozen**: the same where some layers read visual tokens without updating them (`freeze_layer` below
  `exit_layer`), beside a reference that puts their states back after each such layer. Refused where the
  attention has no query projection of its own, so that keys and values cannot be computed alone.
- **refused**: an error names the reason before anything runs. Variants of a family may differ: the check
  looks at the config in hand.
- **not tried**: no tiny model could be made here, so nothing is claimed.

| family | class | decoder | status | frozen | checked with, or reason |
|---|---|---|---|---|---|
"""


def parse(text: str) -> dict[str, Row]:
    """Rows of a written table by family."""
    lines = [line for line in text.splitlines() if line.startswith("| ")][1:]
    cells = [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines]
    return {row[0]: Row(*row) for row in cells if len(row) == 6}


def main(names: list[str]) -> None:
    """Try all families, or those named, and write the table; the notes below it stay."""
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    old = FILE.read_text() if FILE.is_file() else ""
    rows = parse(old)
    for family, model_class in families():
        if not names or family in names:
            rows[family] = try_family(family, model_class)
            print(rows[family], file=sys.stderr, flush=True)
    notes = "".join(f"\n## {part}" for part in old.split("\n## ")[1:])
    FILE.write_text(HEAD + "".join(f"{rows[family]}\n" for family, _ in families()) + notes)


if __name__ == "__main__":
    main(sys.argv[1:])
