#!/usr/bin/env bash
# Runs the kernels' tests that need no MindSpore graph under AddressSanitizer and UndefinedBehaviorSanitizer.
#
#   scripts/check_kernels_asan.sh [pytest arguments]
#
# Builds a separate library in build/asan; needs g++ with its sanitizer libraries. PYTHON names the interpreter.
set -euo pipefail
cd "$(dirname "$0")/.."

python=${PYTHON:-python}
compiler=${CXX:-g++}
library=$PWD/build/asan/libcolora_cpu.so
runtime=$($compiler -print-file-name=libasan.so)
if [ ! -e "$runtime" ]; then
  echo "check_kernels_asan: $compiler has no libasan.so; install its sanitizer libraries" >&2
  exit 1
fi

"$python" ops/cpu/build.py "$library" --compiler "$compiler" --sanitize

if [ $# -eq 0 ]; then
  set -- -k "not graph and not face and not while_loop" tests/kernels
fi

# Python itself leaks by design, so leaks are not looked for. Tests that compile MindSpore graphs are left out: they
# would load the ordinary library beside this one.
COLORA_CPU_LIBRARY=$library \
COLORA_KERNELS=reference \
LD_PRELOAD="$runtime $($compiler -print-file-name=libstdc++.so)" \
ASAN_OPTIONS=detect_leaks=0:halt_on_error=1:abort_on_error=1 \
UBSAN_OPTIONS=print_stacktrace=1:halt_on_error=1 \
  "$python" -m pytest -q -p no:cacheprovider "$@"
