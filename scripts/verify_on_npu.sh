#!/usr/bin/env bash
# Build the Ascend operators, run the golden cases on the NPU, print a table. Ends with 0 only if every case is right.
#
#   bash scripts/verify_on_npu.sh              on a machine with an Ascend 910B or 910_93 and the CANN toolkit
#   bash scripts/verify_on_npu.sh --emulated   the same cases through the host emulator
#
# PYTHON: the interpreter that has mindspore (default python3). ASCEND_CUSTOM_OPP_PATH: already built operators to use.
set -euo pipefail

root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
export PYTHON="${PYTHON:-python3}"
target=Ascend
case "${1:-}" in
    "") ;;
    --emulated) target=CPU ;;
    *) echo "usage: verify_on_npu.sh [--emulated]" >&2; exit 2 ;;
esac

if [ "$target" = Ascend ]; then
    if [ -z "${ASCEND_CUSTOM_OPP_PATH:-}" ]; then
        bash "$root/ops/ascend/build.sh" "$root/ops/ascend/build/install"
        export ASCEND_CUSTOM_OPP_PATH="$root/ops/ascend/build/install/vendors/colora"
    fi
    export LD_LIBRARY_PATH="$ASCEND_CUSTOM_OPP_PATH/op_api/lib:${LD_LIBRARY_PATH:-}"
fi
golden="$(mktemp -d)"
trap 'rm -rf "$golden"' EXIT
"$PYTHON" "$root/ops/ascend/golden.py" write "$golden"
"$PYTHON" "$root/ops/ascend/golden.py" run "$golden" --target "$target"
