#!/usr/bin/env bash
# Evaluate on the image questions of SEED-Bench.
#
#   bash scripts/eval/seed.sh --model llava-hf/llava-1.5-7b-hf --data /data/seed_bench \
#       --output results/seed --policy never --policy fixed:16 --policy gates:runs/7b/gates
#
# Formats of --data: docs/benchmarks.md. All options: dyvte eval --help.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
evaluate seed "$@"
