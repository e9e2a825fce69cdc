"""Tables of weights: a model's tensors handed to an operator as one number instead of as hundreds of graph inputs.

A graph's compilation costs about 30 ms and a MiB for every two tensors that it takes. The operators that go through a
whole model (``step``) take the number and the version of a table instead: addresses, shapes and types, put there from
outside of graphs (``ops/cpu/weight_table.h``). The tensors stay their owners'; addresses are looked at before every
call, and one that has moved (``set_data``) gives the table a new version. An operator refuses an old one.
"""

from __future__ import annotations

import ctypes
import functools
import itertools
import weakref
from collections.abc import Sequence

import numpy as np

import mindspore as ms
from mindspore import Tensor

from colora_ms.kernels.aot import KernelError, library_path

_NAMES = {ms.float32: "float32", ms.bfloat16: "bfloat16", ms.float16: "float16", ms.int8: "int8", ms.uint8: "uint8",
          ms.int32: "int32", ms.int64: "int64"}
_numbers = itertools.count(1)  # 0: no table

#: The handle of no table.
NOTHING = (0, 0)


@functools.lru_cache(maxsize=1)
def _library() -> ctypes.CDLL:
    library = ctypes.CDLL(str(library_path()))
    library.colora_table_set.restype = ctypes.c_int64
    library.colora_table_set.argtypes = [ctypes.c_int64, ctypes.c_int64, ctypes.POINTER(ctypes.c_void_p),
                                         ctypes.POINTER(ctypes.c_char_p), ctypes.POINTER(ctypes.c_int),
                                         ctypes.POINTER(ctypes.c_int64)]
    library.colora_table_drop.argtypes = [ctypes.c_int64]
    library.colora_table_drop.restype = None
    return library


def _set(number: int, addresses: Sequence[int], dtypes: Sequence[str], shapes: Sequence[Sequence[int]]) -> int:
    count = len(addresses)
    dims = [n for shape in shapes for n in shape]
    version = _library().colora_table_set(
        number, count, (ctypes.c_void_p * count)(*addresses),
        (ctypes.c_char_p * count)(*(name.encode() for name in dtypes)),
        (ctypes.c_int * count)(*map(len, shapes)), (ctypes.c_int64 * max(len(dims), 1))(*dims))
    if version == 0:
        raise KernelError(f"no memory for a table of {count} tensors")
    return version


class WeightTable:
    """The tensors of a model for an operator of the CPU library.

    Args:
        tensors: float32, bfloat16, int8 or uint8 Tensors and Parameters, in the order in which the operator reads them;
            the table holds references to them.

    Raises:
        KernelError: a type that no operator reads.
    """

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self.tensors = tuple(tensors)
        unknown = [str(one.dtype) for one in self.tensors if one.dtype not in _NAMES]
        if unknown:
            raise KernelError(f"a table of weights holds {unknown[0]}, expected {', '.join(_NAMES.values())}")
        self._pointers = [one.data_ptr for one in self.tensors]
        self._addresses: list[int] = []
        self._number = next(_numbers)
        self._version = 0
        weakref.finalize(self, _library().colora_table_drop, self._number)

    def handle(self) -> tuple[int, int]:
        """(number, version) of the table with the tensors' present addresses."""
        addresses = [pointer() for pointer in self._pointers]
        if addresses != self._addresses:
            self._version = _set(self._number, addresses, [_NAMES[one.dtype] for one in self.tensors],
                                 [one.shape for one in self.tensors])
            self._addresses = addresses
        return self._number, self._version


class ArrayTable:
    """NumPy arrays of any lengths for one call of an operator, beside the tensors whose shapes its graph fixes."""

    def __init__(self) -> None:
        self._number = next(_numbers)
        self._arrays: tuple[np.ndarray, ...] = ()
        weakref.finalize(self, _library().colora_table_drop, self._number)

    def put(self, arrays: Sequence[np.ndarray]) -> tuple[int, int]:
        """The handle of these arrays, which the table holds until the next ones come; without any, of no table."""
        self._arrays = tuple(np.ascontiguousarray(one) for one in arrays)
        if not any(one.size for one in self._arrays):
            return NOTHING
        return self._number, _set(self._number, [one.ctypes.data for one in self._arrays],
                                  [one.dtype.name for one in self._arrays], [one.shape for one in self._arrays])
