#!/usr/bin/env bash
# Train visual exit gates with DeepSpeed. Without arguments: the embedded default (configs/embedded.yaml).
#
#   bash scripts/finetune_visual_gate.sh --model_name_or_path llava-hf/llava-1.5-7b-hf --template v1 \
#       --data_path llava_v1_5_mix665k.json --image_folder images --output_dir runs/7b --bf16 True
#
# All options: dyvte train --help. From the environment:
#   NUM_PROCESSES  processes on this machine (default: its GPUs, else 1)
#   LAUNCHER       torchrun (default) or deepspeed, for more than one process
#   HOSTFILE       several machines ("name slots=GPUs" a line), with the deepspeed launcher
#   MASTER_PORT    port of the first machine, with a HOSTFILE (default: 29500)
#   NODE_RANK      machines that cannot ssh to each other: start the script on each one, with its place in the
#                  HOSTFILE (0, 1, ...) here and the first one's address in MASTER_ADDR
#   DRY_LAUNCH=1   print the launch command instead of running it
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/env.sh"
if [ ! -x "$PYTHON" ]; then
    PYTHON="$(command -v python3 || command -v python)"
fi
export PYTHONPATH="$ROOT${PYTHONPATH:+:$PYTHONPATH}"

if [ "$#" -eq 0 ]; then
    if [ -z "${DRY_LAUNCH:-}" ] && [ ! -f "$ROOT/data/scenes/instruct/train.json" ]; then
        echo "[data] writing the synthetic scenes into data/scenes"
        "$PYTHON" -m dyvte.data.scenes --output "$ROOT/data/scenes"
    fi
    set -- --config "$ROOT/configs/embedded.yaml"
fi

if [ -z "${NUM_PROCESSES:-}" ]; then
    NUM_PROCESSES="$( (command -v nvidia-smi >/dev/null 2>&1 && nvidia-smi -L 2>/dev/null || true) | wc -l)"
    [ "$NUM_PROCESSES" -ge 1 ] || NUM_PROCESSES=1
fi

case "${LAUNCHER:-torchrun}" in
torchrun | deepspeed) ;;
*)
    echo "error: LAUNCHER=$LAUNCHER: expected torchrun or deepspeed" >&2
    exit 2
    ;;
esac
if [ -n "${HOSTFILE:-}" ]; then
    if [ ! -f "$HOSTFILE" ]; then
        echo "error: HOSTFILE=$HOSTFILE: there is no such file" >&2
        exit 2
    fi
    launch=("$PYTHON" -m deepspeed.launcher.runner --hostfile "$HOSTFILE" --master_port "${MASTER_PORT:-29500}")
    if [ -n "${NODE_RANK:-}" ]; then
        if [ -z "${MASTER_ADDR:-}" ]; then
            echo "error: NODE_RANK needs MASTER_ADDR, the address of the first machine of $HOSTFILE" >&2
            exit 2
        fi
        launch+=(--no_ssh --node_rank "$NODE_RANK" --master_addr "$MASTER_ADDR")
    fi
    launch+=(--no_local_rank --module dyvte train)
elif [ "$NUM_PROCESSES" -gt 1 ] && [ "${LAUNCHER:-torchrun}" = deepspeed ]; then
    port="$("$PYTHON" -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])')"
    launch=("$PYTHON" -m deepspeed.launcher.runner --num_accelerators "$NUM_PROCESSES" --master_port "$port"
        --no_local_rank --module dyvte train)
elif [ "$NUM_PROCESSES" -gt 1 ]; then
    launch=("$PYTHON" -m torch.distributed.run --standalone --nproc_per_node "$NUM_PROCESSES" -m dyvte train)
else
    launch=("$PYTHON" -m dyvte train)
fi
if [ -n "${DRY_LAUNCH:-}" ]; then
    printf '%q ' "${launch[@]}" "$@"
    echo
    exit 0
fi
exec "${launch[@]}" "$@"
