"""The cost model (scripts/ascend_costs.py): its simulation against counts by hand and a published measurement; every
instruction of the kernels has a price."""
import sys

import numpy as np
import pytest

from emulated import INPUT, OUTPUT, ROOT, STRICT, TRACE, WORKSPACE, Emulator, build

sys.path.insert(0, str(ROOT / "scripts"))
import ascend_constants as constants  # noqa: E402
import ascend_costs as costs  # noqa: E402
import ascend_prefill  # noqa: E402

SOURCE = """
#include "kernel_operator.h"
using namespace AscendC;
extern "C" void steps(uint8_t* in, uint8_t* out, uint8_t*, uint8_t*) {
    TPipe pipe;
    TBuf<TPosition::VECCALC> buffer;
    TQue<TPosition::VECIN, 1> queue;
    pipe.InitBuffer(buffer, 65536);
    pipe.InitBuffer(queue, 1, 8192);
    GlobalTensor<float> gm;
    gm.SetGlobalBuffer(reinterpret_cast<float*>(in), 4096);
    LocalTensor<float> t = buffer.Get<float>(), x = queue.AllocTensor<float>();
    if (GetBlockIdx() == 0) {
        DataCopy(x, gm, 2048);
        queue.EnQue(x);
        x = queue.DeQue<float>();
        Add(t, x, x, 1024);
        Add(t[2048], x, x, 1024);
        PipeBarrier<PIPE_V>();
        Add(t, t, t[2048], 64);
        queue.FreeTensor(x);
    } else {
        queue.FreeTensor(x);
    }
    SyncAll();
    if (GetBlockIdx() == 1) Muls(t, t[4096], 1.0f, 100);
}
"""


@pytest.fixture(scope="module")
def steps(emulator, tmp_path_factory):
    text = SOURCE + build.registration("steps", 4)
    library = Emulator(build.compile_units({"machine.cpp": build.HERE / "src" / "machine.cpp", "steps.cpp": text},
                                           tmp_path_factory.mktemp("steps") / "steps.so", "-O0"))
    arrays = [np.zeros(4096, np.float32) for _ in range(4)]
    library.launch("steps", 2, list(zip(arrays, (INPUT, OUTPUT, WORKSPACE, INPUT))), 0, STRICT | TRACE)
    return library.trace(2)


def test_a_launch_by_hand(steps):
    traces, names = steps
    issue = constants.SCALAR_ISSUE
    each, head, after = constants.VECTOR["Add"]
    read = costs.read_cycles(8192, 1, costs.bandwidth(1))
    both = read + issue + head + 2 * 16 * each + after  # the second finds the pipe filled: no head
    first = both + head + each + after                  # waits for both, and finds it empty
    slow, start, end = constants.VECTOR["Muls"]
    for meeting in (0, 400):
        price = costs.simulate(traces, names, meeting)
        assert price["meetings"] == 1
        want = first + meeting + issue + start + 2 * slow + constants.RAGGED_MASK + end
        assert price["cycles"] == pytest.approx(want)


@pytest.mark.parametrize("repeats,measured", [(8, 48.458), (16, 64.331), (32, 96.055), (64, 159.708), (128, 287.72)])
def test_one_instruction_is_the_published_measurement(repeats, measured):
    """VADD of float32 on an Ascend 910B, rows of whole repeats: msopmodeling 1.0.9, op_model/pto/warmup_10_tadd.csv."""
    each, head, after = constants.VECTOR["Add"]
    assert head + each * repeats + after == pytest.approx(measured, abs=1.5)


def test_every_instruction_of_the_kernels_has_a_price(emulator):
    names = emulator.library.emulator_instructions().decode().split()
    costs.vector_costs(names)
    with pytest.raises(KeyError, match="Sort.f32 has no price"):
        costs.vector_costs(["Sort.f32"])


def test_transfers_cost_by_size_and_cores():
    rate = costs.bandwidth(48)
    assert rate == pytest.approx(33.7 / constants.CLOCK_GHZ) and costs.bandwidth(1) > costs.bandwidth(40) > rate
    sizes = [costs.read_cycles(size, 1, rate) for size in (4, 512, 4096, 8192, 65536)]
    assert sizes == sorted(sizes) and sizes[0] == sizes[1]
    assert sizes[-1] == pytest.approx(65536 / rate)
    assert costs.read_cycles(64 * 64, 64, rate) > costs.read_cycles(64 * 64, 1, rate)  # short bursts
    assert costs.write_cycles(32, 1) > constants.WRITE_LATENCY_US * constants.CLOCK_GHZ * 1e3


def test_the_masked_form_of_prompts_ends_where_the_grouped_one_is_cheaper():
    """1,024 tokens, tensors from the cache, rank 16; more columns by another adapter."""
    from colora_ms.models.device_prompts import MASKED_COLUMNS, is_masked

    def costs_least(columns, slices, out):
        forms = ascend_prefill.prices(1024, 4096, 16, columns // (16 * slices), True, slices, out)
        return forms["masked dense"] <= forms["grouped, sorted once a model"]

    for slices, out in ((1, 4096), (3, 12288), (3, 6144), (2, 22016)):
        assert is_masked(MASKED_COLUMNS // (16 * slices), 16 * slices) and costs_least(MASKED_COLUMNS, slices, out)
    assert not is_masked(MASKED_COLUMNS // 16 + 1, 16) and not costs_least(MASKED_COLUMNS + 48, 3, 12288)
    assert costs_least(256, 1, 4096) and not costs_least(288, 1, 4096)  # what is packed ends first


def test_prefill_by_hand():
    """Bytes and operations of the base product and of one form, from memory."""
    tokens, hidden, rank = 1024, 4096, 16
    forms = ascend_prefill.prices(tokens, hidden, rank, 4, False)
    peak = constants.CUBE_FLOP_CYCLE * constants.CUBE_CORES * constants.CLOCK_GHZ * 1e3
    assert forms["base"] == pytest.approx(constants.MATMUL_HEAD_US + 2 * tokens * hidden * hidden / peak)
    x, weights = tokens * hidden * 2, 5 * hidden * rank * 2
    moved = 2 * (x + weights + tokens * rank * 2) + 3 * x
    heads = 2 * constants.GROUPED_HEAD_US + constants.VECTOR_HEAD_US
    assert forms["grouped, sorted once a model"] == pytest.approx(heads + moved / (constants.MEMORY_TB_S * 1e6))
    cached = ascend_prefill.prices(tokens, hidden, rank, 4, True)
    assert all(cached[name] <= forms[name] for name in forms)
