#!/usr/bin/env bash
# Evaluate on a benchmark: run.sh NAME [arguments of dyvte eval].
#
#   bash scripts/eval/run.sh pope --model llava-hf/llava-1.5-7b-hf --data /data/pope \
#       --output results/pope --policy never --policy fixed:16 --policy gates:runs/7b/gates
#
# Names and formats of --data: docs/benchmarks.md. All options: dyvte eval --help.
# gqa and mme without further arguments: the embedded backbone on synthetic scenes, full model and trained gates.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/../env.sh"
if [ ! -x "$PYTHON" ]; then
    PYTHON="$(command -v python3 || command -v python)"
fi
export PYTHONPATH="$ROOT${PYTHONPATH:+:$PYTHONPATH}"

name="${1:-}"
mini="$ROOT/data/scenes/mini_$name"
gates="$ROOT/runs/embedded/gates"
if [ "$#" -eq 0 ] || { [ "$#" -eq 1 ] && [ "$name" != gqa ] && [ "$name" != mme ]; }; then
    sed -n '2,/^set /{/^#/s/^# \{0,1\}//p;}' "${BASH_SOURCE[0]}" >&2
    exit 2
fi
shift
if [ "$#" -eq 0 ]; then
    if [ ! -d "$mini" ]; then
        echo "[data] writing the synthetic scenes into data/scenes"
        "$PYTHON" -m dyvte.data.scenes --output "$ROOT/data/scenes"
    fi
    set -- --config "$ROOT/configs/eval_embedded.yaml" --data "$mini" \
        --output "$ROOT/runs/embedded/eval/$name" --policy never
    if [ -f "$gates/gates.safetensors" ]; then
        set -- "$@" --policy "gates:$gates"
    else
        echo "[eval] no gates in runs/embedded/gates yet (scripts/finetune_visual_gate.sh trains them): full model only"
    fi
fi
exec "$PYTHON" -m dyvte eval --benchmark "$name" "$@"
