#!/usr/bin/env bash
# Evaluate on AI2D.
#
#   bash scripts/eval/ai2d.sh --model llava-hf/llava-1.5-7b-hf --data /data/ai2d \
#       --output results/ai2d --policy never --policy fixed:16 --policy gates:runs/7b/gates
#
# Formats of --data: docs/benchmarks.md. All options: dyvte eval --help.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
evaluate ai2d "$@"
