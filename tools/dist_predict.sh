#!/usr/bin/env bash
# bash tools/dist_predict.sh PROCESSES [ARGUMENTS OF predict.py]
# PROCESSES is the number of GPUs, or of CPU processes where there is no GPU. If a process dies, all are started again,
# up to RESTARTS times, and go on with what is not done. The same command later does so, too.
set -euo pipefail

PROCESSES=$1
TOOLS=$(dirname "${BASH_SOURCE[0]}")

python -m torch.distributed.run \
    --nnodes="${NNODES:-1}" \
    --node_rank="${NODE_RANK:-0}" \
    --master_addr="${MASTER_ADDR:-127.0.0.1}" \
    --master_port="${PORT:-29500}" \
    --nproc_per_node="$PROCESSES" \
    --max_restarts="${RESTARTS:-3}" \
    "$TOOLS/predict.py" "${@:2}"
