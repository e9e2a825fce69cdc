"""A kept graph is used again with the library that it was compiled against, and with no other build of it."""
import json
import os
import shutil
import subprocess
import sys

import pytest

from emulated import ROOT, build

pytest.importorskip("mindspore")

SCRIPT = """
import json
import mindspore as ms, numpy as np
from colora_ms import runtime
from colora_ms.kernels import ascend
ms.set_context(mode=ms.GRAPH_MODE); ms.set_device("CPU")
ascend.load("CPU")
class Expand(ms.nn.Cell):
    def construct(self, h, slots, up, y):
        return ascend.lora_expand(h, slots, up, y)
runtime.configure()
out = runtime.run(Expand(), *(ms.Tensor(a) for a in (np.ones((2, 3), np.float32), np.array([0, -1], np.int32),
                                                     np.full((1, 3, 8), 2, np.float32), np.ones((2, 8), np.float32))))
cache = runtime.graph_cache()
print(json.dumps([out.asnumpy()[:, 0].tolist(), cache.hits, cache.misses]))
"""


def start(folder, library):
    script = folder / "script.py"
    script.write_text(SCRIPT)
    environment = {"COLORA_CACHE": str(folder / "cache"), "COLORA_EMULATOR_LIBRARY": str(library), "GLOG_v": "3",
                   "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    done = subprocess.run([sys.executable, str(script)], env={**os.environ, **environment}, capture_output=True,
                          text=True,
                          timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.strip().splitlines()[-1])


def test_another_build_compiles_again(emulator, tmp_path):
    library = tmp_path / "library.so"
    shutil.copyfile(build.build(), library)
    right = [7.0, 1.0]
    assert start(tmp_path, library) == [right, 0, 1]
    assert start(tmp_path, library) == [right, 1, 0]
    with library.open("ab") as file:
        file.write(b"another build")
    assert start(tmp_path, library) == [right, 0, 1]
