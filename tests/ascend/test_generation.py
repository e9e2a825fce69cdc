"""The device sources in the real model, with two adapters: greedy and contrastive decoding give the tokens of the CPU
operators, and the logits agree within the rounding of the dtype in which the low-rank product runs."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parents[2]
MODEL = """
import json, sys
import mindspore as ms, numpy as np
from mindspore import Tensor
import rules
from colora_ms import runtime
from colora_ms.adapters import LoraConfig, inject
from colora_ms.decoding import Contrast, Generator
from colora_ms.kernels import ascend, backend
from colora_ms.models import load_model
decoder, tokenizer = load_model("smollm2-135m", max_positions=256)
config = LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "v_proj"])
handle = inject(decoder, config, adapter_name="one", slots=2)
handle.add_adapter("two", config)
for p in handle.trainable_params():
    values = np.stack([rules.adapter_tensor(f"{slot}.{p.name}.", p.shape[1:]) for slot in range(2)])
    p.set_data(Tensor(values * (3 if "lora_B" in p.name else 1)))
prompts = ["The capital of France is", "Once upon a time, there was a little"]
"""
TOKENS = MODEL + """
generator = Generator(decoder, tokenizer, handle, max_rows=4)
answers = {name: [list(c.tokens) for c in generator.generate(prompts, adapter=["one", "two"], contrast=contrast,
                                                             max_new_tokens=8, ignore_eos=True)]
           for name, contrast in (("greedy", None), ("cold", Contrast(0.1, 2.0)))}
print(json.dumps([backend(), answers]))
"""
LOGITS = MODEL + """
from mindspore import ops
dtype = {"float32": ms.float32, "float16": ms.float16, "bfloat16": ms.bfloat16}[sys.argv[1]]
def in_dtype(x, slots, down, up, scale):  # a CPU has no Reshape and Transpose of bfloat16: the casts stand innermost
    rows, tokens, width = x.shape
    flat, each = x.reshape((rows * tokens, width)), ops.broadcast_to(slots.reshape((rows, 1)), (rows, tokens))
    y = ops.zeros((rows * tokens, up.shape[1]), ms.float32).astype(dtype)
    out = ascend.multi_lora(flat.astype(dtype), each.reshape((rows * tokens,)), down.astype(dtype),
                            ops.transpose(up, (0, 2, 1)).astype(dtype), scale, y)
    return out.astype(ms.float32).reshape((rows, tokens, up.shape[1]))
if sys.argv[1] != "float32":
    ascend.low_rank = in_dtype
ids = [tokenizer.encode(prompt) for prompt in prompts for _ in range(2)]
padded = np.zeros((4, max(map(len, ids))), np.int32)
for row, one in zip(padded, ids):
    row[:len(one)] = one
lengths = np.array([len(one) for one in ids], np.int32)
logits = runtime.run(decoder, Tensor(padded), Tensor(lengths), Tensor(np.array([0, -1, 1, -1], np.int32))).asnumpy()
np.save(sys.argv[2], np.stack([logits[r, n - 1] for r, n in enumerate(lengths)]))
print(json.dumps(backend()))
"""


def run(text, kernels, tmp_path, *arguments):
    """The last printed line of a process with these kernels, as JSON."""
    script = tmp_path / f"{kernels}.py"
    script.write_text(text)
    paths = os.pathsep.join([str(ROOT), str(ROOT / "tests" / "goldens"), os.environ.get("PYTHONPATH", "")])
    # No graph cache: it does not know the replaced low_rank.
    environment = {"COLORA_KERNELS": kernels, "COLORA_COMPILE_CACHE": "0", "GLOG_v": "3", "PYTHONPATH": paths}
    done = subprocess.run([sys.executable, str(script), *map(str, arguments)], capture_output=True, text=True,
                          timeout=900,
                          env={**os.environ, **environment})
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.strip().splitlines()[-1])


@pytest.fixture(scope="module")
def compiled(smollm2):
    from colora_ms.kernels import backend

    if backend() != "cpu":
        pytest.skip("the CPU operators, which this compares with, are not compiled here")


@pytest.mark.slow
def test_device_sources_decode_the_real_model(compiled, emulator, tmp_path):
    emulated, fast = run(TOKENS, "emulator", tmp_path), run(TOKENS, "cpu", tmp_path)
    assert (emulated[0], fast[0]) == ("emulator", "cpu")
    assert emulated[1] == fast[1]
    assert fast[1]["greedy"] != fast[1]["cold"]


@pytest.fixture(scope="module")
def cpu_logits(compiled, tmp_path_factory):
    folder = tmp_path_factory.mktemp("cpu")
    assert run(LOGITS, "cpu", folder, "float32", folder / "logits.npy") == "cpu"
    return np.load(folder / "logits.npy")


# The error allowed as a share of what the adapters change; a 16-bit run must also show that it is one.
@pytest.mark.slow
@pytest.mark.parametrize("dtype, least, most",
                         [("float32", 0, 1e-4), ("float16", 1e-4, 4e-3), ("bfloat16", 1e-3, 2e-2)])
def test_logits_of_the_real_model(cpu_logits, emulator, tmp_path, dtype, least, most):
    assert run(LOGITS, "emulator", tmp_path, dtype, tmp_path / "logits.npy") == "emulator"
    logits = np.load(tmp_path / "logits.npy")
    adapted, base = cpu_logits[[0, 2]], cpu_logits[[1, 3]]
    effect = np.sqrt(np.mean((adapted - base) ** 2, axis=-1))
    error = np.sqrt(np.mean((logits[[0, 2]] - adapted) ** 2, axis=-1))
    print(f"{dtype}: error {error}, effect of the adapters {effect}, largest {np.abs(logits - cpu_logits).max()}")
    assert (effect > 0.1).all()
    assert (error >= least * effect).all() and (error < most * effect).all()
    assert np.abs(logits[[1, 3]] - base).max() < 1e-3  # rows without an adapter: the low-rank dtype must not matter
