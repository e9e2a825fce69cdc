"""Bytes that multi_lora moves between memory and the cores in one launch, counted by the emulator while it runs the
device source: rows of adapters, of x and y, and what the cores tell each other through the workspace."""

from __future__ import annotations

import functools
import sys
from pathlib import Path
from typing import Any

import numpy as np

sys.path.append(str(Path(__file__).resolve().parents[1] / "ops" / "emulator"))

import build as builder  # noqa: E402
import driver  # noqa: E402

#: Vector cores of a 910B1 or B2.
CORES = 48


@functools.lru_cache(maxsize=None)
def _emulator() -> Any:
    return driver.Emulator(builder.build())


@functools.lru_cache(maxsize=None)
def moved(rows: int, used: int, rank: int, width: int, out: int, slices: int) -> int:
    """Of a launch in float16 for so many rows, whose adapters, ``used`` of them, come in turn.

    Args:
        width, out: columns of x and of y; slices: linears that are packed, here of equal outputs.
    """
    random = np.random.default_rng(0)

    def half(*shape: int) -> np.ndarray:
        return driver.to_dtype(random.standard_normal(shape, np.float32) * np.float32(0.1), "float16")

    tiling, workspace = driver.plan_multi_lora(rows, width, rank, out, "float16", CORES, used, slices)
    y = half(rows, out)
    ends = np.array([out * (i + 1) // slices for i in range(slices)], np.int32)
    given = (half(rows, width), half(used, slices * rank, width), half(used, rank, out),
             np.ones((used, slices), np.float32), np.arange(rows, dtype=np.int32) % used)
    total = _emulator().launch("multi_lora_float16", CORES, [
        *((one, driver.INPUT) for one in given), (y, driver.INOUT), (ends, driver.INPUT), (y, driver.INOUT),
        (workspace, driver.WORKSPACE), (tiling, driver.INPUT)], seed=1)["total"]
    return int(total["bytes_in"] + total["bytes_out"] + total["scalar_gm_bytes"])
