#!/usr/bin/env bash
# Sets everything up and runs the tests that need no GPU.
#   scripts/test.sh [pytest arguments]   for example: scripts/test.sh tests/test_study.py -x
# Paths are relative to the checkout. The exit status and the last line are pytest's. PYTHON and VENV: see scripts/setup_env.sh.
set -euo pipefail

# shellcheck source=scripts/setup_env.sh
source "$(dirname "${BASH_SOURCE[0]}")/setup_env.sh"
# Every test keeps to one thread. Neighbours stay together, for they share what their file prepares.
workers="$(nproc)"
exec "$VENV/bin/python" -m pytest -m "not cuda" --numprocesses "$((workers < 4 ? workers : 4))" --dist worksteal "$@"
