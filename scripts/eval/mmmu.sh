#!/usr/bin/env bash
# Evaluate on the validation questions of MMMU.
#
#   bash scripts/eval/mmmu.sh --model llava-hf/llava-1.5-7b-hf --data /data/mmmu \
#       --output results/mmmu --policy never --policy fixed:16 --policy gates:runs/7b/gates
#
# Formats of --data: docs/benchmarks.md. All options: dyvte eval --help.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
evaluate mmmu "$@"
