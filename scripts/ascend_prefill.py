"""What a low-rank pair of many tokens costs beside the base weight's product, by the numbers of ascend_constants.py.

A kernel takes its head (what the smallest measured kernel of its kind takes) and then the longest of its arithmetic and
its transfers. ``cached``: a tensor that an earlier kernel of the same linear has just read or written (x, y, the
difference) is taken from the second-level cache of 192 MB at the cache's rate, as the table's own model does with its
hit rate; without, all bytes come from memory.
"""
from typing import Dict

import ascend_constants as constants

SIZE = 2  # bytes of float16 and bfloat16


def _cube(rows: int, inner: int, columns: int, cold: float, warm: float, out: float, head: float,
          cached: bool) -> float:
    """Microseconds of a product: bytes from memory, from the cache if cached, and of the result."""
    cores = constants.CUBE_CORES
    flop = 2.0 * rows * max(inner, 16) * -(-columns // 16) * 16
    work = flop / (constants.CUBE_FLOP_CYCLE * cores * constants.CLOCK_GHZ * 1e3)
    memory = constants.MEMORY_TB_S * 1e6
    if cached:
        reads = cold / memory + warm / (constants.L2_TO_L1 * cores * 1e3)
        return head + max(work, reads, out / (constants.L0C_TO_GM * cores * 1e3))
    return head + max(work, (cold + warm + out) / memory)


def _vector(read: float, written: float, cached: bool) -> float:
    """Microseconds of an elementwise kernel or a gather of rows."""
    cores = constants.VECTOR_CORES
    if cached:
        return constants.VECTOR_HEAD_US + max(read / (constants.L2_TO_UB * cores * 1e3),
                                              written / (constants.UB_TO_L2 * cores * 1e3))
    return constants.VECTOR_HEAD_US + (read + written) / (constants.MEMORY_TB_S * 1e6)


def prices(tokens: int, hidden: int, rank: int, slots: int, cached: bool, slices: int = 1,
           out: int = 0) -> Dict[str, float]:
    """Microseconds of the base product and, by form, of the pair that is added to it.

    Args:
        tokens: of the prompts. hidden: inputs, and outputs where out is 0. rank: of the adapters.
        slots: adapters of the bank (masked) or in use (grouped), a zero adapter as group 0 on top.
        cached: see the head of this module.
        slices, out: linears packed into one, and their outputs together; every form multiplies the zeros that a slice's
            rows have at the outputs of the others.
    """
    out, rank = out or hidden, slices * rank
    x, y, v = tokens * hidden * SIZE, tokens * out * SIZE, tokens * rank * SIZE
    down, up = hidden * rank * SIZE, out * rank * SIZE
    matmul, grouped = constants.MATMUL_HEAD_US, constants.GROUPED_HEAD_US
    add = _vector(2 * y, y, cached)
    columns = slots * rank
    pair = (_cube(tokens, hidden, rank, (slots + 1) * down, x, v, grouped, cached)
            + _cube(tokens, rank, out, (slots + 1) * up, v, y, grouped, cached) + add)
    return {
        "base": _cube(tokens, hidden, out, hidden * out * SIZE, x, y, matmul, cached),
        "masked dense": (_cube(tokens, hidden, columns, slots * down, x, tokens * columns * SIZE, matmul, cached)
                         + _vector(tokens * columns * (SIZE + 1), tokens * columns * SIZE, cached)  # Select: a bool
                         + _cube(tokens, columns, out, slots * up, tokens * columns * SIZE, y, matmul, cached)
                         + add),
        "grouped, sorted once a model": pair,
        "grouped, sorted each linear": pair + _vector(x, x, cached) + _vector(y, y, cached),
    }
