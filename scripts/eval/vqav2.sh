#!/usr/bin/env bash
# Evaluate on VQAv2, scored on validation; for test-dev the file for its server is written.
#
#   bash scripts/eval/vqav2.sh --model llava-hf/llava-1.5-7b-hf --data /data/vqav2 \
#       --output results/vqav2 --policy never --policy fixed:16 --policy gates:runs/7b/gates
#
# Formats of --data: docs/benchmarks.md. All options: dyvte eval --help.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
evaluate vqav2 "$@"
