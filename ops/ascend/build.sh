#!/usr/bin/env bash
# Build the Ascend operators with a CANN toolkit, by MindSpore's own custom compiler, and install them.
#
#   bash ops/ascend/build.sh [INSTALL_FOLDER]
#
# ASCEND_HOME_PATH: the toolkit (default /usr/local/Ascend/ascend-toolkit/latest, then /usr/local/Ascend/cann).
# COLORA_SOC: chips to build for (default "ascend910b;ascend910_93"). PYTHON: the interpreter that has mindspore.
# Afterwards: export ASCEND_CUSTOM_OPP_PATH=INSTALL_FOLDER/vendors/colora (printed at the end).
set -euo pipefail

here="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
python="${PYTHON:-python3}"
soc="${COLORA_SOC:-ascend910b;ascend910_93}"
install="${1:-$here/build/install}"
build="$here/build"

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
if [ ! -d "$cann/tools/op_project_templates/ascendc/customize" ] && [ ! -d "$cann/tools/msopgen" ]; then
    stop "$cann has no operator project template (tools/op_project_templates): install the full CANN toolkit, not only its runtime."
fi
command -v "$python" >/dev/null || stop "no $python: set PYTHON to the interpreter that has mindspore."
compiler="$("$python" - <<'PYTHON'
import importlib.util
from pathlib import Path

found = importlib.util.find_spec("mindspore")
if found:
    path = Path(found.origin).parent / "lib/plugin/ascend/custom_compiler/setup.py"
    print(path if path.is_file() else "")
PYTHON
)"
[ -n "$compiler" ] || stop "$python has no mindspore with a custom compiler: install mindspore in it or set PYTHON."
command -v cmake >/dev/null || stop "no cmake: install it."

rm -rf "$build/stage" "$build/compiler"
mkdir -p "$build/compiler" "$install"
"$python" "$here/stage.py" "$build/stage"
# The compiler makes its project beside itself; a copy keeps site-packages clean.
cp "$(dirname "$compiler")"/* "$build/compiler/" 2>/dev/null || true
[ -f "$cann/bin/setenv.bash" ] && { set +u; source "$cann/bin/setenv.bash"; set -u; }
(cd "$build/compiler" && "$python" setup.py -o "$build/stage/op_host" -k "$build/stage/op_kernel" --soc_version "$soc" \
    --ascend_cann_package_path "$cann" --vendor_name colora --install_path "$install")
[ -f "$install/vendors/colora/op_api/include/aclnn_multi_lora.h" ] ||
    stop "the compiler ended without installing vendors/colora below $install; its log is above."
echo "built for $soc. Now: export ASCEND_CUSTOM_OPP_PATH=$install/vendors/colora"
