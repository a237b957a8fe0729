#!/usr/bin/env python
"""Convert a published LISA checkpoint to a backbone with a mask head.

python scripts/convert_lisa.py /models/LISA-7B-v1 /models/clip-vit-large-patch14 /models/lisa-7b
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from dyvte.backbones.lisa import save_lisa
from dyvte.errors import DyvteError


def main() -> int:
    """Parse, convert."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("source", type=Path, help="the checkpoint's folder")
    parser.add_argument("tower", type=Path, help="folder of the CLIP tower that it was trained with")
    parser.add_argument("output", type=Path, help="folder that is written")
    args = parser.parse_args()
    try:
        save_lisa(args.source, args.tower, args.output)
    except (DyvteError, OSError) as error:  # transformers' own, where the tower is not one
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
