"""Loading of the compiled CPU operators; which form of an operation runs is chosen in ``registry``."""

import ctypes
import os
from pathlib import Path

import mindspore as ms
from mindspore import Tensor, ops

from colora_ms.errors import ColoraError

#: Stands for an optional input that is not given: a float32 tensor of rank 0 (the kernels test ``ndims == 0``).
ABSENT = Tensor(0.0, ms.float32)


class KernelError(ColoraError, RuntimeError):
    """A custom operator refused its arguments or is not available; the message names operator, argument and value."""


def library_path():
    """Path of the compiled CPU library; it exists only if a C++ compiler was there at installation."""
    override = os.environ.get("COLORA_CPU_LIBRARY")
    return Path(override) if override else Path(__file__).resolve().parent.parent / "_lib" / "libcolora_cpu.so"


def custom(name, shape_fn, dtype_fn, bprop=None):
    """An ``ops.Custom`` primitive for the C function ``colora_<name>`` of the CPU library.

    Args:
        name: operator name without the ``colora_`` prefix.
        shape_fn: maps the input shapes (lists of int) to the output shape, or a tuple of them.
        dtype_fn: maps the input dtypes to the output dtype, or a tuple of them.
        bprop: gradient function ``(*inputs, out, dout) -> tuple``; without it gradients are refused by MindSpore.

    Returns:
        The primitive, to be called with tensors inside ``construct``.
    """
    return ops.Custom(f"{library_path()}:colora_{name}", shape_fn, dtype_fn, "aot", bprop=bprop)


def last_error():
    """Text of the last refusal inside the CPU library ("" if there was none, or no library)."""
    if not library_path().is_file():
        return ""
    function = ctypes.CDLL(str(library_path())).colora_last_error
    function.restype = ctypes.c_char_p
    return function().decode("utf-8", "replace")
