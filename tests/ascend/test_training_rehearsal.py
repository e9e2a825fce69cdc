"""Training on Ascend, rehearsed: which operators have gradients, and updates of a tiny model against the float32 CPU
path."""
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

ms = pytest.importorskip("mindspore")
from mindspore import Tensor, nn  # noqa: E402

from colora_ms.kernels.ascend_builtin import GRADIENTS  # noqa: E402
from colora_ms.kernels.ascend_builtin_calls import CALLS  # noqa: E402

HERE = Path(__file__).resolve().parent

#: What the rehearsal may differ from the float32 path, relative (losses of three updates; gradients of the first one,
#: by their norms): attention is in bfloat16, forth and back.
LOSS, GRADIENT = (5e-4, 2e-3, 2e-3), 2e-2


def t(*shape, dtype=ms.float16):
    return Tensor(np.ones(shape), dtype)


def ints(*values):
    return Tensor(np.array(values, np.int32))


class Of(nn.Cell):
    """The first result of a primitive's call with its constants behind the tensors."""

    def __init__(self, name, constants):
        super().__init__()
        self.call, self.constants = CALLS[name], constants

    def construct(self, *tensors):
        result = self.call(*tensors, *self.constants)
        if isinstance(result, tuple):
            result = result[0]
        return result


class Attended(Of):
    def construct(self, query, key_cache, value_cache, tables, lengths):
        return self.call(query, key_cache, value_cache, tables, lengths, None, None, *self.constants)


CASES = {
    "rms_norm": ((t(3, 64), t(64)), (1e-5,)), "add_rms_norm": ((t(3, 64), t(3, 64), t(64)), (1e-5,)),
    "rotary": ((t(3, 64), t(3, 64), t(3, 64), t(3, 64), ints(3)), ()), "swiglu": ((t(3, 64),), ()),
    "paged_attention": ((t(2, 256), t(4, 16, 2, 64), t(4, 16, 2, 64), Tensor(np.zeros((2, 2), np.int32)), ints(1, 2)),
                        (4, 0.125, 2)),
    "causal": ((t(1, 16, 256), t(1, 16, 128), t(1, 16, 128), t(2048, 2048, dtype=ms.uint8)), (4, 0.125)),
    "grouped_linear": ((t(6, 32), t(3, 32, 16), Tensor(np.array([2, 4, 6]))), (False,)),
    "top_experts": ((t(3, 5),), (2,)),
    "by_expert": ((t(3, 32), Tensor(np.zeros((3, 2), np.int32))), (5,)),
    "from_experts": ((t(6, 32), ints(*range(6)), t(3, 2)), ()),
    "quantized_linear": ((t(3, 64), t(8, 64, dtype=ms.int8), t(8)), (0,)),
}


@pytest.mark.parametrize("name", sorted(CASES))
def test_the_operators_that_have_gradients(name):
    """A CPU has a kernel of neither: with a gradient it is the kernel that is missed, without one the gradient."""
    tensors, constants = CASES[name]
    ms.set_context(mode=ms.GRAPH_MODE)
    with pytest.raises(RuntimeError) as said:
        ms.grad((Attended if name == "paged_attention" else Of)(name, constants))(*tensors)
    assert ("bprop not defined" in str(said.value)) != GRADIENTS[name]
    assert ("Unsupported op" in str(said.value)) == GRADIENTS[name]


@pytest.fixture(scope="module", params=["rows", "packed"])
def steps(tmp_path_factory, request):
    found = {}
    for column in ("cpu", "rehearsal"):
        output = tmp_path_factory.mktemp("step") / f"{column}.npz"
        done = subprocess.run([sys.executable, str(HERE / "training_step.py"), str(output), request.param],
                              capture_output=True, text=True, timeout=300,
                              env={**os.environ, "COLORA_KERNELS": column, "GLOG_v": "3"})
        assert done.returncode == 0, done.stderr[-3000:]
        found[column] = dict(np.load(output))
        assert found[column]["backend"] == column
    return found


def test_losses_of_three_updates_and_the_gradients_of_the_first_are_those_of_the_cpu(steps):
    cpu, rehearsed = steps["cpu"], steps["rehearsal"]
    off = np.abs(rehearsed["losses"] - cpu["losses"]) / cpu["losses"]
    assert np.all(off < LOSS) and off.max() > 0
    assert cpu["losses"][2] < cpu["losses"][0]
    names = [name for name in cpu if name.startswith("gradient")]
    assert len(names) == 2 * 7 and names == [name for name in rehearsed if name.startswith("gradient")]
    for name in names:
        size = np.linalg.norm(cpu[name])
        assert size > 0
        assert np.linalg.norm(rehearsed[name] - cpu[name]) < GRADIENT * size, name


def test_the_step_runs_the_operators_of_the_device(steps):
    launches = list(steps["rehearsal"]["launches"])
    assert launches.count("FlashAttentionScore") == launches.count("FlashAttentionScoreGrad") == 1
    assert not [name for name in launches if name.startswith("colora_")]  # nothing of the CPU's library
