#!/usr/bin/env bash
# bash tools/dist_train.sh CONFIG PROCESSES [OPTIONS OF train.py]
# PROCESSES is the number of GPUs, or of CPU processes where there is no GPU.
# MAX_RESTARTS=3 starts all processes again if one dies. With --resume they go on from the newest checkpoint.
set -euo pipefail

CONFIG=$1
PROCESSES=$2
TOOLS=$(dirname "${BASH_SOURCE[0]}")

python -m torch.distributed.run \
    --nnodes="${NNODES:-1}" \
    --node_rank="${NODE_RANK:-0}" \
    --master_addr="${MASTER_ADDR:-127.0.0.1}" \
    --master_port="${PORT:-29500}" \
    --nproc_per_node="$PROCESSES" \
    --max_restarts="${MAX_RESTARTS:-0}" \
    "$TOOLS/train.py" "$CONFIG" --launcher pytorch "${@:3}"
