#!/usr/bin/env bash
# bash tools/dist_test.sh CONFIG CHECKPOINT PROCESSES [OPTIONS OF test.py]
# PROCESSES is the number of GPUs, or of CPU processes where there is no GPU.
set -euo pipefail

CONFIG=$1
CHECKPOINT=$2
PROCESSES=$3
TOOLS=$(dirname "${BASH_SOURCE[0]}")

python -m torch.distributed.run \
    --nnodes="${NNODES:-1}" \
    --node_rank="${NODE_RANK:-0}" \
    --master_addr="${MASTER_ADDR:-127.0.0.1}" \
    --master_port="${PORT:-29500}" \
    --nproc_per_node="$PROCESSES" \
    "$TOOLS/test.py" "$CONFIG" "$CHECKPOINT" --launcher pytorch "${@:4}"
