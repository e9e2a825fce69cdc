#!/bin/bash
# The contrast experiment: data, training, choice on validation, test, tables.
#
#   bash scripts/experiment_contrast.sh FOLDER [TASK ...]      FOLDER holds banking77/ and wikisql/, see contrast_data.py
#
# Tasks: steps banking77 wikisql (all of these by default), svamp (needs Qwen's weights, see model_zoo/qwen2.5-0.5b/README.md).
# An interrupted run goes on where it stopped.
set -euo pipefail
cd "$(dirname "$0")/.."
[ $# -ge 1 ] || { sed -n '2,7p' "$0"; exit 2; }
python=${PYTHON:-.venv/bin/python}
data=$1; shift
[ $# -gt 0 ] || set -- steps banking77 wikisql
for task in "$@"; do
  recipe=model_zoo/smollm2-135m/contrast-$task.yaml
  [ -f "$recipe" ] || recipe=model_zoo/qwen2.5-0.5b/$task.yaml
  [ -f "runs/contrast/data/$task.test.jsonl" ] || "$python" scripts/contrast_data.py "$task" --data "$data"
  [ -d "runs/contrast/$task/adapter" ] || "$python" -m colora_ms train "$recipe" --resume
  "$python" scripts/experiment_contrast.py "$task" --json "runs/contrast/$task.json"
done
"$python" scripts/experiment_contrast.py --table runs/contrast/*.json --into model_zoo/smollm2-135m/CONTRAST.md
