#!/usr/bin/env bash
# Evaluate on MMBench-EN, with circular evaluation, and write the workbook for its server.
#
#   bash scripts/eval/mmbench.sh --model llava-hf/llava-1.5-7b-hf --data /data/mmbench/MMBench_DEV_EN.tsv \
#       --output results/mmbench --policy never --policy fixed:16 --policy gates:runs/7b/gates
#
# Formats of --data: docs/benchmarks.md. All options: dyvte eval --help.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
evaluate mmbench "$@"
