#!/usr/bin/env bash
# Set up the environment if needed, then run the test suite; arguments go to pytest.
set -euo pipefail
REQUIREMENTS="requirements.txt tests/requirements.txt"
source "$(dirname "$0")/env.sh"
exec "$PYTHON" -m pytest "$@"
