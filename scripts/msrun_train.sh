#!/usr/bin/env bash
# Data-parallel training under msrun. No rank table is needed.
#
#   bash scripts/msrun_train.sh RECIPE [-n WORKERS] [--log-dir FOLDER] [--master-port PORT] [options of colora-ms train]
#   bash scripts/msrun_train.sh run RECIPE ...        colora-ms run: training, evaluation and table, all on the workers
#
# data.batch_size is that of one worker. -n defaults to 2; the port to a free one. Several machines: --help.
# Ctrl-C or SIGTERM ends the job after the current update with a checkpoint; --resume continues.
set -euo pipefail
here="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
python="${PYTHON:-$here/.venv/bin/python}"
[ -x "$(command -v "$python")" ] || python=python3
command=train
case "${1:-}" in run) command=run; shift ;; esac
exec "$python" "$here/scripts/msrun_launch.py" "$command" "$@"
