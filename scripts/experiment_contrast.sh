#!/bin/bash
# The contrast experiment: data, training, choice on validation, test, tables.
#
#   bash scripts/experiment_contrast.sh FOLDER [TASK ...]      FOLDER holds banking77/ and wikisql/, see contrast_data.py
#
# Tasks: steps banking77 wikisql (all of them by default). An interrupted run goes on where it stopped.
set -euo pipefail
cd "$(dirname "$0")/.."
[ $# -ge 1 ] || { sed -n '2,6p' "$0"; exit 2; }
python=${PYTHON:-.venv/bin/python}
data=$1; shift
[ $# -gt 0 ] || set -- steps banking77 wikisql
for task in "$@"; do
  [ -f "runs/contrast/data/$task.test.jsonl" ] || "$python" scripts/contrast_data.py "$task" --data "$data"
  [ -d "runs/contrast/$task/adapter" ] || "$python" -m colora_ms train "model_zoo/smollm2-135m/contrast-$task.yaml" --resume
  "$python" scripts/experiment_contrast.py "$task" --json "runs/contrast/$task.json"
done
"$python" scripts/experiment_contrast.py --table runs/contrast/*.json --into model_zoo/smollm2-135m/CONTRAST.md
