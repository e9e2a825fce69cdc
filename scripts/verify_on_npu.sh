#!/usr/bin/env bash
# The first day on an Ascend 910B or 910_93: card, software, build, every operator, CANN's own, a model, several cards.
#
#   bash scripts/verify_on_npu.sh              13 steps, one line each; ends with the number of failed steps
#   bash scripts/verify_on_npu.sh --dry-run    without a device: our operators emulated, stand-ins for CANN's
#   bash scripts/verify_on_npu.sh --help       which steps, where the logs go
#
# PYTHON: the interpreter that has mindspore (default python3). ASCEND_CUSTOM_OPP_PATH: already built operators to use.
# COLORA_SOC: the unit of a chip whose name says too little (ascend910_93 on an A3 that npu-smi names Ascend910).
set -euo pipefail

root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
python="${PYTHON:-python3}"
command -v "$python" >/dev/null || { echo "verify_on_npu.sh: no $python: set PYTHON to the interpreter that has mindspore." >&2; exit 99; }
if [ -z "${ASCEND_HOME_PATH:-}" ]; then
    for setting in /usr/local/Ascend/ascend-toolkit/set_env.sh /usr/local/Ascend/cann/set_env.sh; do
        if [ -f "$setting" ]; then
            set +eu
            source "$setting" >/dev/null 2>&1
            set -eu
            break
        fi
    done
fi
exec "$python" "$root/scripts/npu_check" "$@"
