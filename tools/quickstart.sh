#!/usr/bin/env bash
# From nothing to a comparison: makes the environment, then runs tools/quickstart.py
# with the options given.
set -euo pipefail

cd "$(dirname "${BASH_SOURCE[0]}")/.."
bash tools/setup_env.sh --classification
export PIP_NO_INDEX=1  # nothing is installed from here on
exec .venv/bin/python tools/quickstart.py "$@"
