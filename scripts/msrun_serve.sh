#!/usr/bin/env bash
# A server whose model is split over the workers of a job: every worker has its share of the linears, of the adapters in
# the slots and of the cache; worker 0 answers.
#
#   bash scripts/msrun_serve.sh [-n WORKERS] [--log-dir FOLDER] [--master-port PORT] [options of "colora-ms serve"]
set -euo pipefail
here="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
python="${PYTHON:-$here/.venv/bin/python}"
[ -x "$(command -v "$python")" ] || python=python3
exec "$python" "$here/scripts/msrun_launch.py" serve "$@" --tensor-parallel
