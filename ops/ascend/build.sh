#!/usr/bin/env bash
# Build the Ascend operators with a CANN toolkit, by MindSpore's own custom compiler, and install them.
#
#   bash ops/ascend/build.sh [INSTALL_FOLDER]
#
# ASCEND_HOME_PATH: the toolkit (default /usr/local/Ascend/ascend-toolkit/latest, then /usr/local/Ascend/cann).
# COLORA_SOC: what to build for: ascend910b, ascend910_93, a chip's name, or both; this machine's chip if it is not set.
# PYTHON: the interpreter that has mindspore. COLORA_BUILD: where to work (default build/ here); logs: its compiler/.
# Afterwards: export ASCEND_CUSTOM_OPP_PATH=INSTALL_FOLDER/vendors/colora (printed at the end).
set -euo pipefail

here="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
python="${PYTHON:-python3}"
install="${1:-$here/build/install}"

stop() {
    echo "build.sh: $1" >&2
    exit 1
}

cann="${ASCEND_HOME_PATH:-}"
if [ -z "$cann" ]; then
    for candidate in /usr/local/Ascend/ascend-toolkit/latest /usr/local/Ascend/cann; do
        [ -d "$candidate" ] && cann="$candidate" && break
    done
fi
[ -n "$cann" ] || stop "no CANN toolkit found: install it (it brings the bisheng compiler) or set ASCEND_HOME_PATH."
[ -d "$cann" ] || stop "ASCEND_HOME_PATH=$cann is no folder: set it to the CANN toolkit."
command -v "$python" >/dev/null || stop "no $python: set PYTHON to the interpreter that has mindspore."
unset ASCEND_CUSTOM_OPP_PATH
for setting in "$cann/bin/setenv.bash" "$cann/../set_env.sh"; do
    if [ -f "$setting" ]; then
        set +eu
        source "$setting" >/dev/null 2>&1
        set -eu
        break
    fi
done
unset ASCEND_CUSTOM_OPP_PATH
"$python" "$here/build_operators.py" --cann "$cann" --install "$install"
# Here and not in Python, behind which MindSpore still prints when it ends.
echo "export ASCEND_CUSTOM_OPP_PATH=$(cd "$install/vendors/colora" && pwd -P)"
