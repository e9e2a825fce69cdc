#!/usr/bin/env bash
# Sets everything up, then trains a small adapter and compares base, LoRA and LoRA + CoLD. --fast takes 3 minutes.
set -euo pipefail
cd "$(dirname "$0")/.."
source scripts/setup.sh
exec .venv/bin/colora-ms quickstart "$@"
