"""Rows of a stored matrix as float32, outside of graphs: the CPU library's embedding operator called from NumPy."""

from __future__ import annotations

import ctypes
import functools
import threading
from collections.abc import Callable

import numpy as np

from colora_ms.kernels.aot import KernelError, last_error, library_path
from colora_ms.kernels.operands import tag_length

_one = threading.Lock()  # the operator's own threads compute one call at a time


@functools.lru_cache(maxsize=1)
def _function() -> Callable[..., int]:
    return ctypes.CDLL(str(library_path())).colora_embedding


def unpack_rows(form: int, rows: np.ndarray, columns: int) -> np.ndarray:
    """The values of rows of blocks.

    Args:
        form: the tag of a format whose scales stand in its rows (``models.formats.WeightFormat.tag``).
        rows: (n, bytes of a row) uint8, of whole blocks; columns: values of a row.

    Returns:
        (n, columns) float32, the numbers that the products compute with.

    Raises:
        KernelError: rows of another size than the format's.
    """
    inputs: list[np.ndarray] = [np.arange(len(rows), dtype=np.int32), np.zeros(tag_length(form, 0, 0), np.int8),
              np.ascontiguousarray(rows), np.empty((len(rows), columns), np.float32)]
    count = len(inputs)
    shapes = [(ctypes.c_int64 * one.ndim)(*one.shape) for one in inputs]
    pointer = ctypes.POINTER(ctypes.c_int64)
    with _one:
        if _function()(count, (ctypes.c_void_p * count)(*(one.ctypes.data for one in inputs)),
                       (ctypes.c_int * count)(*(one.ndim for one in inputs)),
                       (pointer * count)(*(ctypes.cast(one, pointer) for one in shapes)),
                       (ctypes.c_char_p * count)(*(one.dtype.name.encode() for one in inputs)), None, None):
            raise KernelError(last_error() or "the rows cannot be unpacked")
    return inputs[-1]
