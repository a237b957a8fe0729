#!/usr/bin/env bash
# Linter and tests. `scripts/test.sh` is what CI runs; `scripts/test.sh --full` runs the whole matrix.
# Further arguments go to pytest: scripts/test.sh -k gates
# The slowest twenty are printed; scripts/test.sh --slowest tests/SLOWEST.md writes them down.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/env.sh"
make_environment
cd "$ROOT"
marks=(-m "not full")
if [ "${1:-}" = "--full" ]; then
    marks=()
    shift
fi
"$PYTHON" -m ruff check .
"$PYTHON" -m ruff format --check .
"$PYTHON" -m pytest "${marks[@]}" --durations=20 "$@"
