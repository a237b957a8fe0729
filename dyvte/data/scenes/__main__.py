"""`python -m dyvte.data.scenes [--natural]`: write the synthetic data sets."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from dyvte.data.scenes.styles import NATURAL, PLAIN, narrowed
from dyvte.data.scenes.writers import write_all
from dyvte.errors import DyvteError

DEFAULT_SIZES = {
    "train": 4000,
    "calibration": 2400,
    "validation": 800,
    "test": 1600,
    "gqa": 600,
    "mme": 30,
    "pope": 100,
}
NATURAL_SIZES = {
    "train": 1600,
    "calibration": 1200,
    "validation": 400,
    "test": 800,
    "unseen": 400,
    "gqa": 240,
    "mme": 10,
    "pope": 20,
    "refcoco": 120,
    "captions": 40,
}
"""A sample of the 30-layer backbone costs forty times one of the 10-layer backbone."""
UNITS = {
    "gqa": "questions",
    "mme": "images per subtask",
    "pope": "images, six questions each",
    "refcoco": "expressions",
    "captions": "images",
}


def main() -> int:
    """Parse the sizes and write."""
    parser = argparse.ArgumentParser(
        description="Write the synthetic scenes as LLaVA json, GQA and MME files."
    )
    parser.add_argument(
        "--natural",
        action="store_true",
        help="several wordings per question, sentences, boxes, descriptions; RefCOCO and COCO captions too",
    )
    parser.add_argument(
        "--output", type=Path, help="folder to write into (default data/scenes, with --natural data/natural)"
    )
    parser.add_argument("--seed", type=int, default=0, help="same seed, same files")
    for name in NATURAL_SIZES:
        sizes = [s[name] for s in (DEFAULT_SIZES, NATURAL_SIZES) if name in s]
        said = f"default {sizes[0]}, with --natural {sizes[1]}" if len(sizes) > 1 else f"default {sizes[0]}"
        only = "" if len(sizes) > 1 else "--natural only: "
        parser.add_argument(f"--{name}", type=int, help=f"{only}{UNITS.get(name, 'samples')} ({said})")
    parser.add_argument("--types", default="", help="--natural only: comma-separated; default: all taught")
    of_scene = f"--natural only: questions about one (default {NATURAL.per_scene})"
    parser.add_argument("--per-scene", type=int, help=of_scene)
    args = parser.parse_args()
    if not args.natural and (args.types or args.per_scene is not None):
        parser.error("--types, --per-scene: only with --natural")
    defaults = NATURAL_SIZES if args.natural else DEFAULT_SIZES
    given = {name: getattr(args, name) for name in NATURAL_SIZES if getattr(args, name) is not None}
    unknown = [f"--{name}" for name in given if name not in defaults]
    if unknown:
        parser.error(f"{', '.join(unknown)}: only with --natural")
    output = args.output or Path("data/natural" if args.natural else "data/scenes")
    types = [kind.strip() for kind in args.types.split(",") if kind.strip()]
    per_scene = NATURAL.per_scene if args.per_scene is None else args.per_scene
    try:
        style = narrowed(types, per_scene) if args.natural else PLAIN
        manifest = write_all(output, {**defaults, **given}, args.seed, style=style)
    except DyvteError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"sha256 {manifest['sha256']}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
