#!/usr/bin/env bash
# From nothing to a comparison: makes the environment, then adapts a small ViT by four methods and compares them.
#
#   bash tools/quickstart.sh [OPTION ...]          options are those of tools/compare.py
#   bash tools/quickstart.sh --real [OPTION ...]   a real DINOv2-S, of which about 90 MB are fetched once;
#                                                  options are those of tools/quickstart_real.py
set -euo pipefail

cd "$(dirname "${BASH_SOURCE[0]}")/.."
case ${1:-} in -h | --help)
    sed -n '2,6s/^# \{0,1\}//p' tools/quickstart.sh
    exit
    ;;
esac
bash tools/setup_env.sh --classification
if [ "${1:-}" = --real ]; then
    shift
    .venv/bin/python tools/fetch_real.py
    run=(tools/quickstart_real.py)
else
    run=(tools/compare.py configs/comparison/quickstart.yaml --out work_dirs/quickstart)
fi
export PIP_NO_INDEX=1  # nothing is installed from here on
exec .venv/bin/python "${run[@]}" "$@"
