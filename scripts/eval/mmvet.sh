#!/usr/bin/env bash
# Evaluate on MM-Vet, by writing the file for its grader.
#
#   bash scripts/eval/mmvet.sh --model llava-hf/llava-1.5-7b-hf --data /data/mm-vet \
#       --output results/mmvet --policy never --policy fixed:16 --policy gates:runs/7b/gates
#
# Answers are long: 1024 new tokens, as LLaVA allows.
#
# Formats of --data: docs/benchmarks.md. All options: dyvte eval --help.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
if [ "$#" -gt 0 ]; then
    set -- --max-new-tokens 1024 "$@"
fi
evaluate mmvet "$@"
