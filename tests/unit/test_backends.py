"""The compiled operators and the reference operators answer with the same tokens."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest

from colora_ms.kernels import backend

SCRIPT = """
import json, sys
sys.path.insert(0, sys.argv[1])
import mindspore as ms, numpy as np
from mindspore import Tensor
from conftest import WordTokenizer
from colora_ms import runtime
from colora_ms.adapters import LoraConfig, inject
from colora_ms.decoding import Contrast, Generator
from colora_ms.kernels import backend
from colora_ms.models.config import DecoderConfig
from colora_ms.models.decoder import Decoder
ms.set_context(mode=ms.GRAPH_MODE)
config = DecoderConfig(model_type="qwen3", qk_norm=True, vocab_size=97, hidden_size=32, intermediate_size=48,
                       num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=8,
                       max_position_embeddings=128, eos_token_ids=(2,))
random = np.random.default_rng(7)
weights = {name: (random.standard_normal(shape) * 0.3 + ("norm" in name)).astype(np.float32)
           for name, shape in config.parameter_shapes().items()}
decoder = Decoder(config, weights)
handle = inject(decoder, LoraConfig(r=4, lora_alpha=8, target_modules="all-linear"), adapter_name="a")
for p in handle.trainable_params():
    if "lora_B" in p.name:
        p.set_data(Tensor(random.standard_normal(p.shape).astype(np.float32) * 0.3))
generator = Generator(decoder, WordTokenizer(), handle, max_rows=8)
prompts = [[int(t) for t in random.integers(3, 97, n)] for n in (1, 5, 9, 17)]
answers = {}
for name, options in {"base": {}, "greedy": {"adapter": "a"}, "cold": {"adapter": "a", "contrast": Contrast()}}.items():
    answers[name] = [list(c.tokens) for c in generator.generate(prompts, max_new_tokens=32, **options)]
ids = Tensor(np.array([prompts[3]], np.int32))
logits = runtime.run(decoder, ids, Tensor(np.array([17], np.int32)), handle.slots(1)).asnumpy()
print(json.dumps([backend(), answers, logits.tolist()]))
"""


def answers(kernels, tmp_path):
    script = tmp_path / f"{kernels}.py"
    script.write_text(SCRIPT)
    # One graph cache for all: graphs of different kernels must not meet in it.
    env = {**os.environ, "COLORA_KERNELS": kernels, "GLOG_v": "3", "COLORA_CACHE": str(tmp_path / "cache")}
    done = subprocess.run([sys.executable, str(script), os.path.dirname(os.path.dirname(__file__))], env=env,
                          capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.strip().splitlines()[-1])


def test_device_sources_give_the_same_tokens(tmp_path):
    emulated, slow = answers("emulator", tmp_path), answers("reference", tmp_path)
    assert (emulated[0], slow[0]) == ("emulator", "reference")
    assert emulated[1] == slow[1]
    assert np.abs(np.array(emulated[2]) - np.array(slow[2])).max() <= 2e-4


@pytest.mark.skipif(backend() != "cpu", reason="the operators are not compiled here")
def test_compiled_and_reference_operators_agree(tmp_path):
    fast, slow = answers("cpu", tmp_path), answers("reference", tmp_path)
    assert (fast[0], slow[0]) == ("cpu", "reference")
    assert fast[1] == slow[1]
    assert fast[1]["cold"] != fast[1]["greedy"] != fast[1]["base"]
    assert 0 < np.abs(np.array(fast[2]) - np.array(slow[2])).max() <= 2e-4


@pytest.mark.skipif(backend() != "cpu", reason="the operators are not compiled here")
@pytest.mark.parametrize("setting, threads", [({}, len(os.sched_getaffinity(0))), ({"OMP_NUM_THREADS": "3"}, 3),
                                              ({"COLORA_NUM_THREADS": "1"}, 1)])
def test_operators_use_all_cores_beside_mindspore(setting, threads):
    code = ("import mindspore, ctypes; from colora_ms.kernels import bind; from colora_ms.kernels.aot import "
            "library_path; bind(); print(ctypes.CDLL(str(library_path())).colora_thread_count())")
    env = {k: v for k, v in os.environ.items() if k not in ("OMP_NUM_THREADS", "COLORA_NUM_THREADS")}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120,
                          env={**env, **setting, "GLOG_v": "3"})
    assert int(done.stdout.strip().splitlines()[-1]) == threads
