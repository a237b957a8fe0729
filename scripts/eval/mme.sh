#!/usr/bin/env bash
# Evaluate on MME. Without arguments: the embedded backbone on mini-MME, full model and trained gates.
#
#   bash scripts/eval/mme.sh --model llava-hf/llava-1.5-7b-hf --data /data/mme --output results/mme \
#       --policy never --policy fixed:16 --policy gates:runs/7b/gates
#
# All options: dyvte eval --help.
exec bash "$(dirname "${BASH_SOURCE[0]}")/run.sh" mme "$@"
