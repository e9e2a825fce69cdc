#!/usr/bin/env bash
# Data-parallel evaluation or generation under msrun: the prompts are split over the workers, results come in order.
#
#   bash scripts/msrun_evaluate.sh [evaluate|generate] [-n WORKERS] [--log-dir FOLDER] [--master-port PORT] [its options]
#
# With "generate --tensor-parallel" the model is split instead: every worker has its share of the linears and the cache.
# The rest goes to "colora-ms evaluate" (the default) or "colora-ms generate". --batch-size is that of one worker.
set -euo pipefail
here="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
python="${PYTHON:-$here/.venv/bin/python}"
[ -x "$(command -v "$python")" ] || python=python3
command=evaluate
case "${1:-}" in evaluate | generate) command="$1"; shift ;; esac
exec "$python" "$here/scripts/msrun_launch.py" "$command" "$@"
