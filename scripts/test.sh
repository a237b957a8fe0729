#!/usr/bin/env bash
# Linter and tests. `scripts/test.sh` is what CI runs; `scripts/test.sh --full` runs the whole matrix.
# Further arguments go to pytest: scripts/test.sh -k gates
# Files are shared out among $DYVTE_TEST_WORKERS processes (default: one per core, at most 8; 0: none but
# pytest's own, as debuggers need) of one thread each: models this small lose time by threads.
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
cores="$("$PYTHON" -c 'import os; print(min(8, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()))')"
workers="${DYVTE_TEST_WORKERS:-$cores}"
if [ "$workers" -gt 1 ]; then
    export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
    marks+=(-n "$workers" --dist loadfile)
fi
"$PYTHON" -m ruff check .
"$PYTHON" -m ruff format --check .
"$PYTHON" -m pytest "${marks[@]}" --durations=20 "$@"
