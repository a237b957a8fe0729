#!/usr/bin/env bash
# Evaluate on Video-MME, from video files or extracted frames.
#
#   bash scripts/eval/videomme.sh --model LanguageBind/Video-LLaVA-7B-hf --data /data/video-mme \
#       --output results/videomme --policy never --policy fixed:16 --policy gates:runs/7b/gates
#
# Frames for each video: --set num_frames=8 (the default).
#
# Formats of --data: docs/benchmarks.md. All options: dyvte eval --help.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
evaluate videomme "$@"
