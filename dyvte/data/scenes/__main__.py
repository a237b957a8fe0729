"""`python -m dyvte.data.scenes --output data/scenes`: write the synthetic data sets."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from dyvte.data.scenes.writers import write_all
from dyvte.errors import DyvteError

DEFAULT_SIZES = {"train": 4000, "calibration": 2400, "validation": 800, "test": 1600, "gqa": 600, "mme": 30}


def main() -> int:
    """Parse the sizes and write."""
    parser = argparse.ArgumentParser(
        description="Write the synthetic scenes as LLaVA json, GQA and MME files."
    )
    parser.add_argument("--output", type=Path, default=Path("data/scenes"), help="folder to write into")
    parser.add_argument("--seed", type=int, default=0, help="same seed, same files")
    for name, size in DEFAULT_SIZES.items():
        unit = "images per subtask" if name == "mme" else "questions" if name == "gqa" else "samples"
        parser.add_argument(f"--{name}", type=int, default=size, help=f"{unit} (default {size})")
    args = parser.parse_args()
    try:
        manifest = write_all(args.output, {n: getattr(args, n) for n in DEFAULT_SIZES}, args.seed)
    except DyvteError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"sha256 {manifest['sha256']}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
