"""The device sources decode the real model: two adapters, greedy and contrastive, the same tokens as the CPU operators."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = """
import json, sys
sys.path.insert(0, sys.argv[1])
import mindspore as ms, numpy as np
from mindspore import Tensor
import rules
from colora_ms.adapters import LoraConfig, inject
from colora_ms.decoding import Contrast, Generator
from colora_ms.kernels import backend
from colora_ms.models import load_model
decoder, tokenizer = load_model("smollm2-135m", max_positions=256)
config = LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "v_proj"])
handle = inject(decoder, config, adapter_name="one", slots=2)
handle.add_adapter("two", config)
for p in handle.trainable_params():
    values = np.stack([rules.adapter_tensor(f"{slot}.{p.name}.", p.shape[1:]) for slot in range(2)])
    p.set_data(Tensor(values * (3 if "lora_B" in p.name else 1)))
generator = Generator(decoder, tokenizer, handle, max_rows=4)
prompts = ["The capital of France is", "Once upon a time, there was a little"]
answers = {name: [list(c.tokens) for c in generator.generate(prompts, adapter=["one", "two"], contrast=contrast,
                                                             max_new_tokens=8, ignore_eos=True)]
           for name, contrast in (("greedy", None), ("cold", Contrast(0.1, 0.5)))}
print(json.dumps([backend(), answers]))
"""


def decode(kernels, tmp_path):
    script = tmp_path / f"{kernels}.py"
    script.write_text(SCRIPT)
    goldens = Path(__file__).resolve().parents[1] / "goldens"
    done = subprocess.run([sys.executable, str(script), str(goldens)], capture_output=True, text=True, timeout=900,
                          env={**os.environ, "COLORA_KERNELS": kernels, "GLOG_v": "3"})
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.strip().splitlines()[-1])


@pytest.mark.slow
def test_device_sources_decode_the_real_model(smollm2, tmp_path):
    from colora_ms.kernels import backend

    if backend() != "cpu":
        pytest.skip("the CPU operators, which this compares with, are not compiled here")
    emulated, fast = decode("emulator", tmp_path), decode("cpu", tmp_path)
    assert (emulated[0], fast[0]) == ("emulator", "cpu")
    assert emulated[1] == fast[1]
    assert fast[1]["greedy"] != fast[1]["cold"]
