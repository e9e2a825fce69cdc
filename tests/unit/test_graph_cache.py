"""The graph cache: right results whatever the order of compilation, hits in the second process, and its key."""

import json
import os
import subprocess
import sys

import numpy as np

SCRIPT = """
import json, sys
import mindspore as ms, numpy as np
from mindspore import Parameter, Tensor, nn
from colora_ms import runtime
ms.set_context(mode=ms.GRAPH_MODE); ms.set_device("CPU")
class Scale(nn.Cell):
    def __init__(self, factor, size):
        super().__init__()
        self.factor = factor
        self.weight = Parameter(np.full(size, 2, np.float32), name="weight")
    def construct(self, x):
        return x * self.weight * self.factor
runtime.configure()
values = []
for text in sys.argv[1:]:
    factor, size = map(int, text.split("x"))
    values.append(runtime.run(Scale(float(factor), size), Tensor(np.ones(size, np.float32))).asnumpy().tolist())
cache = runtime.graph_cache()
print(json.dumps([values, cache.hits if cache else None, cache.misses if cache else None]))
"""


def start(tmp_path, *graphs, **environment):
    env = {**os.environ, "COLORA_CACHE": str(tmp_path / "cache"), "GLOG_v": "3", **environment}
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    done = subprocess.run([sys.executable, str(script), *graphs], env=env, capture_output=True, text=True, check=True,
                          timeout=300)
    return json.loads(done.stdout.strip().splitlines()[-1])


def test_another_order_gives_the_right_graphs(tmp_path):
    graphs = ["3x4", "5x4", "3x8"]
    right = [[6.0] * 4, [10.0] * 4, [6.0] * 8]
    assert start(tmp_path, *graphs) == [right, 0, 3]
    assert start(tmp_path, *graphs[::-1]) == [right[::-1], 3, 0]
    # A new graph between known ones.
    assert start(tmp_path, "3x8", "7x4", "3x4") == [[[6.0] * 8, [14.0] * 4, [6.0] * 4], 2, 1]


def test_a_child_of_a_caching_process_caches_too(tmp_path):
    inherited = {"MS_COMPILER_CACHE_PATH": str(tmp_path / "cache" / "colora-process-of-the-parent")}
    assert start(tmp_path, "3x4", **inherited)[1:] == [0, 1]
    assert start(tmp_path, "3x4", **inherited)[1:] == [1, 0]


def test_the_cache_can_be_switched_off(tmp_path):
    assert start(tmp_path, "3x4", COLORA_COMPILE_CACHE="0") == [[[6.0] * 4], None, None]
    assert not (tmp_path / "cache").exists()


def test_an_unusable_folder_costs_only_time(tmp_path):
    (tmp_path / "cache").write_text("a file stands where the folder should be")
    assert start(tmp_path, "3x4")[0] == [[6.0] * 4]


def test_key_depends_on_the_emulated_library(tiny_decoder, monkeypatch):
    from mindspore import Tensor

    from colora_ms.graph_cache import graph_key
    from colora_ms.kernels import ascend

    decoder, ids = tiny_decoder(), Tensor(np.zeros((1, 4), np.int32))
    keys = {graph_key(decoder, (ids,), "f")}
    for libraries in ({"/a.so": "1"}, {"/a.so": "2"}, {"/b.so": "1"}, {"/a.so": "1", "/b.so": "1"}):
        monkeypatch.setattr(ascend, "_LIBRARIES", libraries)
        keys.add(graph_key(decoder, (ids,), "f"))
    assert len(keys) == 5
    assert graph_key(decoder, (ids,), "f") in keys


def test_key_depends_on_structure_and_shapes(tiny_decoder):
    from mindspore import Tensor

    from colora_ms.adapters import LoraConfig, inject
    from colora_ms.graph_cache import graph_key

    ids = Tensor(np.zeros((1, 4), np.int32))
    decoder = tiny_decoder()
    key = graph_key(decoder, (ids,), "f")
    assert key == graph_key(tiny_decoder(), (ids,), "f")
    assert key != graph_key(decoder, (Tensor(np.zeros((1, 5), np.int32)),), "f")
    assert key != graph_key(decoder, (ids,), "g")
    assert key != graph_key(tiny_decoder(rms_norm_eps=1e-5), (ids,), "f")
    assert key != graph_key(tiny_decoder(num_key_value_heads=4), (ids,), "f")
    inject(decoder, LoraConfig(r=2, target_modules=["q_proj"]))
    assert key != graph_key(decoder, (ids,), "f")


def test_a_mindspore_without_the_name_that_is_replaced_runs_without_the_cache(tmp_path):
    script = "import mindspore.graph.api as api\ndel api._get_compile_cache_dep_files\n" + SCRIPT
    env = {**os.environ, "COLORA_CACHE": str(tmp_path / "cache"), "GLOG_v": "3"}
    path = tmp_path / "script.py"
    path.write_text(script + "runtime.configure()\n")
    done = subprocess.run([sys.executable, str(path), "3x4", "5x4"], env=env, capture_output=True, text=True, check=True,
                          timeout=300)
    assert json.loads(done.stdout.strip().splitlines()[-1]) == [[[6.0] * 4, [10.0] * 4], None, None]
    assert done.stderr.count("has no mindspore.graph.api._get_compile_cache_dep_files") == 1
    assert "compiles them anew" in done.stderr
    assert not (tmp_path / "cache").exists()
