#!/usr/bin/env bash
# Makes the environment, then checks style and types and runs all tests side by side. Options go to pytest.
#
#   bash tools/run_tests.sh [OPTION ...]
#   bash tools/run_tests.sh --original [OPTION ...]   the tests on the original OpenMMLab releases
#
# --cov at the end measures which lines of the package are run, in the tools' processes, too.
set -euo pipefail

cd "$(dirname "${BASH_SOURCE[0]}")/.."
if [ "${1:-}" = --original ]; then
    shift
    python=.venv-original/bin/python
    bash tools/setup_env.sh --original
else
    python=.venv/bin/python
    bash tools/setup_env.sh
    .venv/bin/ruff check .
    .venv/bin/ruff format --check .
    .venv/bin/mypy
fi

# Reports and the site are looked at in a browser where there is one. Nothing is installed for it.
if browser=$(command -v chromium || command -v chromium-browser || command -v google-chrome); then
    export ICONFORMER_MM_BROWSER=$browser  # with it these tests are not skipped
else
    echo '[tests] no chromium on PATH: tests that need a browser will be skipped' >&2
fi

export PIP_NO_INDEX=1     # nothing is installed from here on
export OMP_NUM_THREADS=1  # cores are for tests side by side
# One more than there are cores, since many tests wait for processes of theirs. Each takes some GB.
jobs=$(($(getconf _NPROCESSORS_ONLN) + 1))
exec $python -m pytest --numprocesses "$((jobs < 4 ? jobs : 4))" --dist worksteal "$@"
