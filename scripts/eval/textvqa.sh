#!/usr/bin/env bash
# Evaluate on TextVQA.
#
#   bash scripts/eval/textvqa.sh --model llava-hf/llava-1.5-7b-hf --data /data/textvqa \
#       --output results/textvqa --policy never --policy fixed:16 --policy gates:runs/7b/gates
#
# Formats of --data: docs/benchmarks.md. All options: dyvte eval --help.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
evaluate textvqa "$@"
