#!/usr/bin/env python
"""Set up gates for a backbone; the same as ``dyvte init``. Try --help."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from dyvte.cli import main

if __name__ == "__main__":
    sys.exit(main(["init", *sys.argv[1:]]))
