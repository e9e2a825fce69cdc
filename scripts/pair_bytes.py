"""Bytes of the low-rank pairs. Of a decode step: what multi_lora moves between memory and the cores in one launch,
counted by the emulator while it runs the device source: rows of adapters, of x and y, and what the cores tell each
other through the workspace. Of prompts: what the launches of each form read and write, from shapes alone; held to the
compiled graph by tests/ascend/test_device_prompts.py."""

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


#: Bytes of a half type, and of int32.
HALF, INT = 2, 4


def masked(tokens: int, width: int, out: int, columns: int) -> int:
    """MatMul, Select, MatMul and Add of a half type; columns: slots * slices * rank."""
    down, up, inner = columns * width * HALF, columns * out * HALF, tokens * columns
    x, y = tokens * width * HALF, tokens * out * HALF
    return (x + down + inner * HALF) + (inner * (1 + 2 * HALF) + HALF) + (inner * HALF + up + y) + 3 * y


def mask(tokens: int, columns: int) -> int:
    """Equal, once a step for each width of a slot."""
    return INT * (tokens + columns) + tokens * columns


def grouped(tokens: int, width: int, out: int, columns: int, slots: int) -> int:
    """GroupedMatmul twice and Add; columns: slices * rank of a slot."""
    groups, x, y, inner = 1 + slots, tokens * width * HALF, tokens * out * HALF, tokens * columns * HALF
    ends = groups * 2 * INT
    return (x + groups * columns * width * HALF + ends + inner) + (
        inner + groups * columns * out * HALF + ends + y) + 3 * y


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
