#!/usr/bin/env bash
# Evaluate on TGIF-QA (FrameQA): exact match, and the file for the grader the papers use.
#
#   bash scripts/eval/tgifqa.sh --model LanguageBind/Video-LLaVA-7B-hf --data /data/tgif \
#       --output results/tgifqa --policy never --policy fixed:16 --policy gates:runs/7b/gates
#
# Frames for each video: --set num_frames=8 (the default).
#
# Formats of --data: docs/benchmarks.md. All options: dyvte eval --help.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
evaluate tgifqa "$@"
