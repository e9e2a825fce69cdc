"""What the cost model (scripts/ascend_costs.py) says of a launch, in microseconds. Modelled, not measured: the emulator
runs the device source, its trace is priced."""
import functools
import sys
from pathlib import Path

import numpy as np

SCRIPTS = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(SCRIPTS), str(SCRIPTS.parent / "ops" / "emulator")]

import ascend_constants as constants  # noqa: E402
import ascend_costs as costs  # noqa: E402
import build as builder  # noqa: E402
import driver  # noqa: E402


@functools.lru_cache(maxsize=None)
def _emulator():
    return driver.Emulator(builder.build())


def multi_lora(batch, hidden, rank, cores):
    """Of multi_lora in float16, square, two adapters in turn: its kernel's time and one start of a kernel."""
    rng = np.random.default_rng(0)

    def half(*shape):
        return driver.to_dtype(rng.standard_normal(shape, np.float32) * np.float32(0.1), "float16")

    y, slots = half(batch, hidden), np.arange(batch, dtype=np.int32) % 2
    tiling, workspace = driver.plan_multi_lora(batch, hidden, rank, hidden, "float16", cores, slots=2)
    given = (half(batch, hidden), half(2, rank, hidden), half(2, rank, hidden), np.ones((2, 1), np.float32), slots)
    arguments = [(one, driver.INPUT) for one in given]
    arguments += [(y, driver.INOUT), (np.array([hidden], np.int32), driver.INPUT), (y, driver.INOUT),
                  (workspace, driver.WORKSPACE), (tiling, driver.INPUT)]
    _emulator().launch("multi_lora_float16", cores, arguments, seed=1, flags=driver.TRACE)
    cycles = costs.simulate(*_emulator().trace(cores))["cycles"]
    return cycles / constants.CLOCK_GHZ / 1e3 + constants.LAUNCH_US


def product(batch, hidden):
    """Of the base product in float16: its operands' way from memory, and one start of a kernel."""
    moved = 2 * (hidden * hidden + 2 * batch * hidden)
    return moved / constants.MEMORY_TB_S / 1e6 + constants.LAUNCH_US
