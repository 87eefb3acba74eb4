#!/usr/bin/env bash
# From nothing to a comparison: makes the environment, then runs tools/quickstart.py
# with the options given; with --real first among them, tools/quickstart_real.py,
# which adapts a real DINOv2-S (about 90 MB are fetched once).
set -euo pipefail

cd "$(dirname "${BASH_SOURCE[0]}")/.."
bash tools/setup_env.sh
tool=quickstart.py
if [ "${1:-}" = --real ]; then
    shift
    tool=quickstart_real.py
    .venv/bin/python tools/fetch_real.py
fi
export PIP_NO_INDEX=1  # nothing is installed from here on
exec .venv/bin/python "tools/$tool" "$@"
