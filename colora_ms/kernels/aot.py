"""Loading of the compiled CPU operators; which form of an operation runs is chosen in ``registry``."""

from __future__ import annotations

import ctypes
import importlib.util
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, Optional

import mindspore as ms
from mindspore import Tensor, ops

from colora_ms.errors import ColoraError

#: Stands for an optional input that is not given: a float32 tensor of rank 0 (the kernels test ``ndims == 0``).
ABSENT = Tensor(0.0, ms.float32)


class KernelError(ColoraError, RuntimeError):
    """A custom operator refused its arguments or is not available; the message names operator, argument and value."""


def library_path() -> Path:
    """Path of the compiled CPU library; it exists only if a C++ compiler was there at installation."""
    override = os.environ.get("COLORA_CPU_LIBRARY")
    return Path(override) if override else Path(__file__).resolve().parent.parent / "_lib" / "libcolora_cpu.so"


def source_builder(folder: str) -> Path:
    """``ops/<folder>/build.py`` of the source tree; it is not there where only the package is installed."""
    return Path(__file__).resolve().parents[2] / "ops" / folder / "build.py"


def run_builder(builder: Path) -> Path:
    """The library that a builder's ``build()`` makes, or finds made.

    Raises:
        RuntimeError: there is no compiler, or a source does not compile.
    """
    spec = importlib.util.spec_from_file_location(f"colora_{builder.parent.name}_build", builder)
    module = importlib.util.module_from_spec(spec)  # type: ignore[arg-type]  # the file is there
    spec.loader.exec_module(module)  # type: ignore[union-attr]
    return Path(module.build())


class _Operator(ops.Custom):
    """An ``ops.Custom`` whose dtype function gets the shapes too: what the tensors of a call are may hang on these."""

    def __infer__(self, *args):
        shapes = tuple(x["shape"] for x in args)
        return {"shape": self.out_shape(*shapes), "dtype": self.out_dtype(shapes, *(x["dtype"] for x in args)),
                "value": None}


def custom(name: str, shape_fn: Callable[..., Any], dtype_fn: Callable[..., Any],
           bprop: Optional[Callable[..., Any]] = None,
           by_shapes: bool = False) -> ops.Custom:
    """An ``ops.Custom`` primitive for the C function ``colora_<name>`` of the CPU library.

    Args:
        name: operator name without the ``colora_`` prefix.
        shape_fn: maps the input shapes (lists of int) to the output shape, or a tuple of them.
        dtype_fn: maps the input dtypes to the output dtype, or a tuple of them.
        bprop: gradient function ``(*inputs, out, dout) -> tuple``; without it gradients are refused by MindSpore.
        by_shapes: the dtype function's first argument is the tuple of the input shapes.

    Returns:
        The primitive, to be called with tensors inside ``construct``.
    """
    return (_Operator if by_shapes else ops.Custom)(f"{library_path()}:colora_{name}", shape_fn, dtype_fn, "aot",
                                                    bprop=bprop)


def last_error() -> str:
    """Text of the last refusal inside the CPU library ("" if there was none, or no library)."""
    if not library_path().is_file():
        return ""
    function = ctypes.CDLL(str(library_path())).colora_last_error
    function.restype = ctypes.c_char_p
    return function().decode("utf-8", "replace")
