"""Calls the C operators of the CPU library with NumPy arrays, without MindSpore (fast, and usable under ASan).

    y = call("rms_norm", [x, weight, eps], [((4, 64), "float32")])[0]

An input is an array, a ``(uint16 array, "bfloat16")`` pair, or None for an absent one. The library is
``$COLORA_CPU_LIBRARY`` or the one inside the package, built first if it is missing or out of date.
"""

import ctypes
import itertools
import os
import sys
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[2]


class Refused(Exception):
    """The operator returned a non-zero value; the text is colora_last_error()."""


def _open():
    path = os.environ.get("COLORA_CPU_LIBRARY")
    if not path:
        sys.path.insert(0, str(ROOT / "ops" / "cpu"))
        try:
            import build
        finally:
            sys.path.pop(0)
        path = ROOT / "colora_ms" / "_lib" / "libcolora_cpu.so"
        build.build(path)
    library = ctypes.CDLL(str(path))
    library.colora_last_error.restype = ctypes.c_char_p
    library.colora_isa.restype = ctypes.c_char_p
    return library


LIBRARY = _open()


def set_isa(name):
    """Switch to "avx512", "avx2" or "baseline"; returns the one in use (lower if the machine cannot)."""
    assert LIBRARY.colora_set_isa(name.encode()) == 0
    return LIBRARY.colora_isa().decode()


def available_isas():
    """The instruction sets that this machine can run, best first."""
    before = LIBRARY.colora_isa().decode()
    found = [name for name in ("avx512", "avx2", "baseline") if set_isa(name) == name]
    set_isa(before)
    return found


def set_threads(n):
    assert LIBRARY.colora_set_threads(n) == 0


def to_bf16(array):
    """float32 array -> (uint16 bit patterns rounded to nearest even, "bfloat16")."""
    bits = np.ascontiguousarray(array, np.float32).view(np.uint32).astype(np.uint64)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16), "bfloat16"


def from_bf16(pair):
    """The inverse of to_bf16, as float32."""
    bits = pair[0] if isinstance(pair, tuple) else pair
    return (bits.astype(np.uint32) << 16).view(np.float32)


def _tensor(value):
    """-> (array, dtype name, rank)"""
    if value is None:
        return np.zeros((), np.float32), "float32", 0
    array, dtype = value if isinstance(value, tuple) else (value, None)
    array = np.asarray(array)
    if not array.flags.c_contiguous:
        array = np.ascontiguousarray(array)
    return array, dtype or array.dtype.name, array.ndim


def empty(shape, dtype):
    """An output array; bfloat16 is held as uint16. Filled with a marker so that unwritten parts show."""
    array = np.empty(shape, np.uint16 if dtype == "bfloat16" else dtype)
    array.reshape(-1).view(np.uint8)[...] = 0xAB
    return array


class Prepared:
    """A call with its argument block built once, so that a benchmark times only the C function."""

    def __init__(self, name, inputs, outputs):
        self.name = name
        self.outputs = [value if isinstance(value, np.ndarray) else empty(*value) for value in outputs]
        kinds = [value[1] if isinstance(value, tuple) else value.dtype.name for value in outputs]
        tensors = [_tensor(value) for value in inputs]
        tensors += [(array, kind, array.ndim) for array, kind in zip(self.outputs, kinds)]
        self._keep = tensors
        n = len(tensors)
        self._n = n
        self._params = (ctypes.c_void_p * n)(*[array.ctypes.data for array, _, _ in tensors])
        self._ndims = (ctypes.c_int * n)(*[rank for _, _, rank in tensors])
        self._shape_rows = [(ctypes.c_int64 * max(rank, 1))(*array.shape) for array, _, rank in tensors]
        self._shapes = (ctypes.POINTER(ctypes.c_int64) * n)(
            *[ctypes.cast(row, ctypes.POINTER(ctypes.c_int64)) for row in self._shape_rows])
        self._dtypes = (ctypes.c_char_p * n)(*[kind.encode() for _, kind, _ in tensors])
        self._function = getattr(LIBRARY, "colora_" + name)

    def __call__(self):
        code = self._function(self._n, self._params, self._ndims, self._shapes, self._dtypes, None, None)
        if code:
            raise Refused(LIBRARY.colora_last_error().decode())
        return self.outputs


class Table:
    """A table of weights (ops/cpu/weight_table.h) of arrays as ``call`` takes them; ``handle`` is what operators
    take."""

    _numbers = itertools.count(10**9)  # beside those that the package makes in the same process

    def __init__(self, values):
        self.number = next(self._numbers)
        self.set(values)

    def set(self, values):
        """Other arrays under the same number; a new version."""
        self._keep = tensors = [_tensor(value) for value in values]
        n = len(tensors)
        dims = [size for array, _, rank in tensors for size in array.shape[:rank]]
        LIBRARY.colora_table_set.restype = ctypes.c_int64
        version = LIBRARY.colora_table_set(
            ctypes.c_int64(self.number), ctypes.c_int64(n),
            (ctypes.c_void_p * n)(*[a.ctypes.data for a, _, _ in tensors]),
            (ctypes.c_char_p * n)(*[kind.encode() for _, kind, _ in tensors]),
            (ctypes.c_int * n)(*[rank for _, _, rank in tensors]), (ctypes.c_int64 * max(len(dims), 1))(*dims))
        assert version > 0
        self.handle = np.array([self.number, version], np.int64)

    def drop(self):
        LIBRARY.colora_table_drop(ctypes.c_int64(self.number))


def options(whole, real):
    """The tensors of options that the selection takes (``colora_ms/kernels/options.py``), from two dicts of numbers or
    arrays.

    The first one of ``whole`` has an entry a request; ``expert_rows`` and ``amateur_rows`` there are the first two
    columns of ``mix_rows``, ``mix_rows`` and ``mix_weights`` whole tensors. Options that are not given have their
    defaults; values out of range stay what they are, where ``OptionRows`` would refuse them.
    """
    from colora_ms.kernels.options import COLUMN, OptionRows

    rows = OptionRows(np.size(next(iter(whole.values()))))
    for values, array in ((whole, rows.whole), (real, rows.real)):
        for name, value in values.items():
            if name in ("expert_rows", "amateur_rows"):
                rows.mix_rows[:, int(name == "amateur_rows")] = value
            elif name in ("mix_rows", "mix_weights"):
                getattr(rows, name)[...] = value
            else:
                array[:, COLUMN[name]] = value
    return [rows.whole, rows.real, rows.mix_rows, rows.mix_weights]


def linear(weight, weight_scale=None, bias=None, down=None, up=None, scale=None):
    """The tensors of a linear, its tag first; see ``colora_ms/kernels/operands.py``. None: not given."""
    return _tagged(*base(weight, weight_scale), bias, (down, up, scale))


class Packed(np.ndarray):
    """An array with the name of its format, where the dtype does not tell it: ``packed(array, "q4_k")``; and with the
    order of its columns, where the format has one."""

    form = order = None


def packed(array, form, order=None):
    """See Packed."""
    array = np.ascontiguousarray(array).view(Packed)
    array.form, array.order = form, order
    return array


def base(weight, weight_scale):
    """(format, tensors) of a matrix."""
    dtype = weight[1] if isinstance(weight, tuple) else np.asarray(weight).dtype.name
    form = getattr(weight, "form", None)
    if form is None and dtype == "uint8":
        form = "int4"
    elif form is None:
        floats = "bfloat16" if dtype == "bfloat16" else "float32"
        form = "int8" if dtype == "int8" or weight_scale is not None else floats
    order = [weight.order] if form.endswith("_ordered") else []
    return form, [weight, weight_scale, *order] if form.startswith("int") else [weight]


def table(weight, weight_scale=None):
    """The tensors of an embedding's table, its tag first."""
    return _tagged(*base(weight, weight_scale), None, (None,) * 3)


def product(inner, outer, core=None, bias=None, down=None, up=None, scale=None):
    """The tensors of a linear that is a product of small matrices, its tag first."""
    if core is None:
        return _tagged("product", [inner, outer], bias, (down, up, scale))
    return _tagged("product_with_core", [inner, core, outer], bias, (down, up, scale))


def _tagged(form, tensors, bias, adapter):
    from colora_ms.kernels.operands import FORMATS, tag_length

    given = any(one is not None for one in adapter)
    length = tag_length([name for name, _ in FORMATS].index(form), int(bias is not None), int(given))
    return [np.zeros(length, np.int8), *tensors, *([] if bias is None else [bias]), *(adapter if given else ())]


def call(name, inputs, outputs):
    """Run colora_<name>.

    Args:
        name: operator.
        inputs: arrays; see the module docstring. An array that the operator writes in place must be C-contiguous.
        outputs: ``(shape, dtype name)`` pairs, or arrays to write into.

    Returns:
        The list of output arrays.

    Raises:
        Refused: with the operator's message.
    """
    return Prepared(name, inputs, outputs)()
