#!/usr/bin/env bash
# Sets everything up, checks style and types of the sources (seconds), and runs the tests, two files at a time. Arguments
# go to pytest: bash scripts/run_tests.sh tests/unit
set -euo pipefail
cd "$(dirname "$0")/.."
source scripts/setup.sh
bash scripts/check_sources.sh
export COLORA_CACHE="${COLORA_CACHE:-$PWD/.venv/colora-cache}"
exec .venv/bin/python -m pytest -q -n 2 --dist loadfile "$@"
