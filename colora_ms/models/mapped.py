"""Files mapped into memory, and Parameters that lie in them.

A weight that a file holds as the kernels read it is never copied: its Parameter's tensor is a view of the mapped file,
whose pages come when a kernel touches them, and go when memory is short. The mapping is private: who writes into such a
Parameter gets own copies of the pages that he changes, and the file stays as it is. A file must not be overwritten in
place while a model of it is loaded (a rename over it is harmless).
"""

from __future__ import annotations

import contextlib
import functools
import math
import mmap
import os
from typing import TYPE_CHECKING, Optional

import numpy as np

from colora_ms.errors import CheckpointError
from colora_ms.files import PathLike

if TYPE_CHECKING:
    import mindspore as ms
    from mindspore import Parameter, Tensor

_NO_RESERVE = getattr(mmap, "MAP_NORESERVE", 0x4000)  # Linux's; Python names it from 3.13 on

_OWN_PAGES = 1 << 20  # bytes; a process may have some 65,000 mappings


class _Mapping(mmap.mmap):
    """A mapping that :func:`map_file` made."""


def map_file(path: PathLike) -> np.ndarray:
    """A file's bytes, uint8 (n,), mapped copy-on-write: what a tensor over them is changed to does not reach the file.

    Raises:
        CheckpointError: the file cannot be opened or mapped.
    """
    try:
        with open(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            if size == 0:
                return np.zeros(0, np.uint8)
            # No memory is set aside for copies: a file may be larger than the memory that is left.
            mapping = _Mapping(file.fileno(), size, flags=mmap.MAP_PRIVATE | _NO_RESERVE,
                               prot=mmap.PROT_READ | mmap.PROT_WRITE)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be opened: {error}") from None
    with contextlib.suppress(OSError):
        mapping.madvise(mmap.MADV_WILLNEED)  # read ahead where the file is not in memory yet
    array = np.frombuffer(mapping, np.uint8)
    array.flags.writeable = False  # for NumPy; tensors over it may be written into
    return array


def release(array: Optional[np.ndarray]) -> None:
    """Let the pages of a mapped file under an array go; they come back unchanged when they are read again.

    Without effect on an array that lies elsewhere. What was written into them would be lost: for arrays that nobody but
    the caller has seen.
    """
    base = array
    while isinstance(base, (np.ndarray, memoryview)):
        base = base.base if isinstance(base, np.ndarray) else base.obj
    if array is None or not isinstance(base, _Mapping) or not array.size or not array.flags.c_contiguous:
        return
    start = array.ctypes.data - np.frombuffer(base, np.uint8).ctypes.data
    page = mmap.PAGESIZE
    first, last = -(-start // page) * page, (start + array.nbytes) // page * page  # whole pages only
    if last > first:
        with contextlib.suppress(OSError):
            base.madvise(mmap.MADV_DONTNEED, first, last - first)


@functools.lru_cache(maxsize=None)
def array_dtype(dtype: ms.dtype.Type) -> np.dtype:
    """The dtype that tensors of a MindSpore dtype have as arrays: of bfloat16 it is found on its arrays only."""
    from mindspore import Tensor

    return Tensor(0, dtype).asnumpy().dtype


def zeros(shape: tuple[int, ...], kind: np.dtype, name: str) -> Parameter:
    """A frozen Parameter of zeros, whose pages come when they are first written: what is sized for the largest load
    costs the time and memory of what is used."""
    from mindspore import Tensor

    size = math.prod(shape) * kind.itemsize
    if size < _OWN_PAGES:
        memory = np.zeros(size, np.uint8)
    else:
        memory = np.frombuffer(mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS), np.uint8)
    return parameter_of(Tensor.from_numpy(memory.view(kind).reshape(shape)), name)


def parameter_of(tensor: Tensor, name: str, requires_grad: bool = False) -> Parameter:
    """A Parameter with a tensor's memory.

    ``Parameter(tensor)`` copies whatever another one still holds, which a tensor over an array always is; ``set_data``
    does not.
    """
    from mindspore import Parameter, Tensor

    parameter = Parameter(Tensor(0, tensor.dtype), name=name, requires_grad=requires_grad)
    parameter.set_data(tensor, slice_shape=True)
    parameter.sliced = False  # said of the shape while the data were set; it is nobody's part
    return parameter
