#!/usr/bin/env bash
# Makes the environment, then checks style and types and runs all tests, one process a core. Options go to pytest:
# --cov at the end measures which lines of the package are run, in the tools' processes, too.
set -euo pipefail

cd "$(dirname "${BASH_SOURCE[0]}")/.."
bash tools/setup_env.sh
export PIP_NO_INDEX=1  # nothing is installed from here on
.venv/bin/ruff check .
.venv/bin/ruff format --check .
.venv/bin/mypy
export OMP_NUM_THREADS=1  # cores are for tests side by side; each process takes some GB
jobs=$(getconf _NPROCESSORS_ONLN)
exec .venv/bin/python -m pytest --numprocesses "$((jobs < 4 ? jobs : 4))" --dist worksteal "$@"
