#!/usr/bin/env bash
# Evaluate on GQA. Without arguments: the embedded backbone on mini-GQA, full model and trained gates.
#
#   bash scripts/eval/gqa.sh --model llava-hf/llava-1.5-7b-hf --data /data/gqa --output results/gqa \
#       --policy never --policy fixed:16 --policy gates:runs/7b/gates
#
# All options: dyvte eval --help.
exec bash "$(dirname "${BASH_SOURCE[0]}")/run.sh" gqa "$@"
