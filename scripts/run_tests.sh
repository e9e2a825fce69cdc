#!/usr/bin/env bash
# Sets everything up and runs the tests. Arguments go to pytest: bash scripts/run_tests.sh tests/unit -k lora
set -euo pipefail
cd "$(dirname "$0")/.."
source scripts/setup.sh
export COLORA_CACHE="${COLORA_CACHE:-$PWD/.venv/colora-cache}"
exec .venv/bin/python -m pytest -q "$@"
