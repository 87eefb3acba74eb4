#!/usr/bin/env bash
# From nothing to a comparison: makes the environment, then adapts a small ViT by four methods and compares them.
# Options are those of tools/compare.py.
set -euo pipefail

cd "$(dirname "${BASH_SOURCE[0]}")/.."
bash tools/setup_env.sh --classification
export PIP_NO_INDEX=1  # nothing is installed from here on
exec .venv/bin/python tools/compare.py configs/comparison/quickstart.yaml --out work_dirs/quickstart "$@"
