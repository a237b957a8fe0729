"""``python -m dyvte``."""

import sys

from dyvte.cli import main

if __name__ == "__main__":
    sys.exit(main())
