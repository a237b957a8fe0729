# Sourced by the scripts beside it: evaluate <benchmark> [arguments of dyvte eval].
source "$(dirname "${BASH_SOURCE[0]}")/../env.sh"
if [ ! -x "$PYTHON" ]; then
    PYTHON="$(command -v python3 || command -v python)"
fi
export PYTHONPATH="$ROOT${PYTHONPATH:+:$PYTHONPATH}"

evaluate() {
    local benchmark="$1" gates="$ROOT/runs/embedded/gates"
    shift
    if [ "$#" -eq 0 ] && [ "$benchmark" != gqa ] && [ "$benchmark" != mme ]; then
        sed -n '2,/^set /{/^#/s/^# \{0,1\}//p;}' "$0" >&2
        return 2
    fi
    if [ "$#" -eq 0 ]; then
        if [ ! -d "$ROOT/data/scenes/mini_$benchmark" ]; then
            echo "[data] writing the synthetic scenes into data/scenes"
            "$PYTHON" -m dyvte.data.scenes --output "$ROOT/data/scenes"
        fi
        set -- --config "$ROOT/configs/eval_embedded.yaml" --data "$ROOT/data/scenes/mini_$benchmark" \
            --output "$ROOT/runs/embedded/eval/$benchmark" --policy never
        if [ -f "$gates/gates.safetensors" ]; then
            set -- "$@" --policy "gates:$gates"
        else
            echo "[eval] no gates in runs/embedded/gates yet (scripts/finetune_visual_gate.sh trains them): full model only"
        fi
    fi
    exec "$PYTHON" -m dyvte eval --benchmark "$benchmark" "$@"
}
