#!/usr/bin/env bash
# Makes the environment, then checks style and runs all tests. Options go to pytest.
set -euo pipefail

cd "$(dirname "${BASH_SOURCE[0]}")/.."
bash tools/setup_env.sh
export PIP_NO_INDEX=1  # nothing is installed from here on
.venv/bin/ruff check .
.venv/bin/ruff format --check .
exec .venv/bin/python -m pytest "$@"
