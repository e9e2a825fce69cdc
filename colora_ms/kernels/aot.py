"""Loading of the compiled operators and the choice of the implementation.

Every kernel has one Python face (a function of this package) and several implementations: ``reference`` (pure
MindSpore operators, any device), ``cpu`` (the C++ library built from ``ops/cpu``), ``emulator`` (the Ascend C device
sources compiled for the host) and ``ascend``. The choice is made once, at import: the environment variable
``COLORA_KERNELS`` names one, otherwise the device target decides, and a CPU without the compiled library falls back
to ``reference``.
"""

import ctypes
import os
from pathlib import Path

import mindspore as ms
from mindspore import Tensor, ops

from colora_ms.errors import ColoraError

# The operators' threads. MindSpore's C++ side sets OMP_NUM_THREADS for its own reasons, which os.environ does not show:
# what stands there is what the user has set.
if "OMP_NUM_THREADS" in os.environ:
    os.environ.setdefault("COLORA_NUM_THREADS", os.environ["OMP_NUM_THREADS"])

BACKENDS = ("reference", "cpu", "emulator", "ascend")

#: Stands for an optional input that is not given: a float32 tensor of rank 0 (the kernels test ``ndims == 0``).
ABSENT = Tensor(0.0, ms.float32)


class KernelError(ColoraError, RuntimeError):
    """A custom operator refused its arguments or is not available; the message names operator, argument and value."""


def library_path():
    """Path of the compiled CPU library; it exists only if a C++ compiler was there at installation."""
    override = os.environ.get("COLORA_CPU_LIBRARY")
    return Path(override) if override else Path(__file__).resolve().parent.parent / "_lib" / "libcolora_cpu.so"


def _choose_backend():
    wanted = os.environ.get("COLORA_KERNELS", "").strip().lower()
    if wanted:
        if wanted not in BACKENDS:
            raise KernelError(f"COLORA_KERNELS={wanted!r} is not known; use one of {', '.join(BACKENDS)}")
        if wanted == "cpu" and not library_path().is_file():
            raise KernelError(
                f"COLORA_KERNELS=cpu, but {library_path()} does not exist; install a C++ compiler (g++ or clang++) "
                "and run `python ops/cpu/build.py colora_ms/_lib/libcolora_cpu.so`, or reinstall the package"
            )
        return wanted
    if ms.get_context("device_target") == "Ascend":
        return "ascend"
    return "cpu" if library_path().is_file() else "reference"


_BACKEND = _choose_backend()


def backend():
    """The implementation in use: "reference", "cpu", "emulator" or "ascend". Fixed for the life of the process."""
    return _BACKEND


def uses_cpu_library():
    """Whether the operators that have no emulated form, or all of them, come from the CPU library."""
    return _BACKEND == "cpu" or (_BACKEND == "emulator" and library_path().is_file())


def uses_device_source():
    """Whether the low-rank part and the contrast run the Ascend C sources, on an NPU or emulated."""
    return _BACKEND in ("emulator", "ascend")


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
