#!/usr/bin/env bash
# Set up the environment if needed, then run the test suite, a process for each core (at most four); arguments go to
# pytest, among them -n 0 for one process.
set -euo pipefail
REQUIREMENTS="requirements.txt tests/requirements.txt"
source "$(dirname "$0")/env.sh"
exec "$PYTHON" -m pytest -n auto --maxprocesses 4 --dist loadfile "$@"
