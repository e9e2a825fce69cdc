#!/usr/bin/env bash
# Style and types of the sources, as pyproject.toml asks for them; arguments go to ruff, for example --fix.
# PYTHON names an interpreter with ruff and mypy in place of that of .venv.
set -euo pipefail
cd "$(dirname "$0")/.."
python="${PYTHON:-.venv/bin/python}"
"$python" -m ruff check "$@"
if "$python" -c 'import mypy' 2>/dev/null; then
    "$python" -m mypy
else
    echo "check_sources.sh: mypy is not installed (it needs Python 3.10); types are not checked" >&2
fi
