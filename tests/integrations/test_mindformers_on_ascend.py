"""What can be said here of adapters inside mindformers on an NPU: with the target faked, the graph of each class of
linear is compiled in bfloat16 up to the choice of kernels, and mindformers keeps its own graph settings."""
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def test_graphs_of_mindformers_linears_with_an_adapter(mindformers, tmp_path):
    script = Path(__file__).with_name("mindformers_on_ascend.py")
    contract = str(ROOT / "ops" / "ascend" / "contract.py")
    subprocess.run([sys.executable, contract, str(tmp_path)], check=True, timeout=60)
    done = subprocess.run([sys.executable, str(script), str(tmp_path)], capture_output=True, text=True, timeout=300,
                          env={**os.environ, "PYTHONPATH": str(ROOT), "COLORA_QUIET": "1"}, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.strip().splitlines()[-1])
    assert found["failed"] == [], found["failed"]
    assert found["graphs"] == 22 and found["backend"] == "ascend"
    assert found["left"] == ["off", 2], "infer_boost and strict syntax are for this package's own graphs"


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_the_contrast_takes_half_types(mindformers, dtype):
    import numpy as np

    import mindspore as ms
    from mindspore import Tensor

    from colora_ms.decoding import Contrast
    from colora_ms.integrations.mindformers import ContrastProcessor

    random = np.random.default_rng(0)
    expert, amateur = (random.standard_normal((3, 50)).astype(np.float32) for _ in range(2))
    given = Tensor(expert).astype(getattr(ms, dtype))
    processor = ContrastProcessor(lambda ids: amateur, Contrast(0.1, 0.5))
    got = processor.process_ms(given, Tensor(np.ones((3, 4), np.int32)))
    want = processor.process_np(given.astype(ms.float32).asnumpy(), np.ones((3, 4), np.int32))
    assert got.dtype == ms.float32
    np.testing.assert_allclose(got.asnumpy(), want, rtol=1e-5, atol=1e-5)
