"""What a compiled graph launches: every kernel, no view, and the bytes of weights that it copies."""
from collections import Counter

import numpy as np
import pytest

ms = pytest.importorskip("mindspore")
from mindspore import Parameter, Tensor, mint, mutable, nn, ops  # noqa: E402

from colora_ms.kernels import ascend_builtin as device  # noqa: E402
from colora_ms.kernels.aot import KernelError  # noqa: E402
from colora_ms.kernels.launches import launches_of  # noqa: E402
from test_rehearsal import loaded  # noqa: E402, F401


def t(*shape, dtype=ms.float16):
    return Tensor(np.ones(shape), dtype)


class Layer(nn.Cell):
    """A step with two products that read their weights as they lie; ``wasteful`` adds what must be counted."""

    def __init__(self, wasteful):
        super().__init__()
        self.wasteful = wasteful
        self.up, self.down = Parameter(t(64, 32), name="up"), Parameter(t(32, 32), name="down")
        self.gamma = Parameter(t(32), name="gamma")

    def construct(self, x, caches, slots, tables, batch_valid_length):
        gate = device.linear(device.rms_norm(x, self.gamma, 1e-5), self.up)
        y = device.linear(device.swiglu(gate), self.down)
        key = y.reshape((1, -1, 32))
        device.reshape_and_cache(key, key, caches[0], caches[1], slots)
        if self.wasteful:
            turned = ops.transpose(self.up, (1, 0))
            total = caches[0].astype(ms.float32).sum().astype(y.dtype)
            y = y[:, :16] + device.linear(y, turned[:, :32])[:, 16:] + total
        return y


def graph(wasteful):
    cell = Layer(wasteful)
    cell(t(2, 32), mutable([t(3, 16, 1, 32), t(3, 16, 1, 32)]), Tensor(np.array([3, 4], np.int32)),
         Tensor(np.zeros((2, 1), np.int32)), Tensor(np.array([4, 5], np.int32)))
    return launches_of(cell)


def test_a_lean_step_is_its_operators_and_copies_nothing():
    found = graph(False)
    assert found.by_name() == {"RmsNorm": 1, "MatMul": 2, "Swiglu": 1, "ReshapeAndCache": 1}
    assert found.copied_bytes() == 0 and found.views_refused == ()
    norm, up = found.launches[:2]
    assert norm.reads == (("", 128.0), ("gamma", 64.0)) and norm.writes == 128
    assert up.reads == (("", 128.0), ("up", 4096.0)) and up.writes == 256
    half = found.moved_bytes({"ReshapeAndCache": 256.0})  # writes two rows of each cache
    assert half == (128 + 64 + 128) + (128 + 4096 + 256) + (256 + 128) + (128 + 2048 + 128) + (256 + 8 + 256 + 128)


def test_casts_transposes_and_slices_are_launches_and_those_of_weights_are_counted():
    found = graph(True)
    extra = Counter({"Transpose": 1, "MatMul": 1, "StridedSlice": 3, "Cast": 2, "Add": 2, "SumExt": 1})
    assert found.by_name() - graph(False).by_name() == extra
    assert found.copied_bytes() == 64 * 32 * 2 + 3 * 16 * 32 * 2  # the transposed weight and the cache


class Viewed(nn.Cell):
    """A cut by a view, handed to an operator of the internal library as it is, or made contiguous first."""

    def __init__(self, contiguous):
        super().__init__()
        self.contiguous = contiguous

    def construct(self, x):
        part = mint.narrow(x, 1, 0, 32)
        return device.swiglu(part.contiguous() if self.contiguous else part)


def test_a_view_is_no_launch_but_the_internal_library_refuses_it():
    lean, copied = Viewed(False), Viewed(True)
    lean(t(2, 64)), copied(t(2, 64))
    assert launches_of(lean).by_name() == {"Swiglu": 1}
    assert len(launches_of(lean).views_refused) == 1 and "NarrowView" in launches_of(lean).views_refused[0]
    assert launches_of(copied).by_name() == {"Contiguous": 1, "Swiglu": 1} and launches_of(copied).views_refused == ()


class Loop(nn.Cell):
    def construct(self, x):
        while x.sum() < 100:
            x = x + 1
        return x


def test_a_graph_with_a_loop_or_none_at_all_is_refused():
    cell = Loop()
    with pytest.raises(KernelError, match="run it once"):
        launches_of(cell)
    cell(t(3, dtype=ms.float32))
    with pytest.raises(KernelError, match="control flow"):
        launches_of(cell)
