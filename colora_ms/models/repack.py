"""Packing a stored weight into another format, some rows at a time on all cores: no weight is whole in float32 beside
the model, and the pages of the mapped file go when they have been read."""

from __future__ import annotations

import dataclasses
import functools
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Optional, TypeVar

import numpy as np

from colora_ms.kernels.aot import library_path
from colora_ms.kernels.unpack import unpack_rows
from colora_ms.models.formats import StoredWeight, WeightFormat
from colora_ms.models.mapped import release

T, R = TypeVar("T"), TypeVar("R")

#: Values that one worker has in float32 at a time.
_VALUES = 1 << 20


def repacked(stored: StoredWeight, wanted: Optional[WeightFormat]) -> StoredWeight:
    """``stored.as_format(wanted)``, row blocks side by side; bits are those of packing it whole.

    Args:
        stored: (out, in), or a vector; wanted: the format, None: its own.

    Returns:
        ``stored`` itself where it stays as it is.
    """
    if len(stored.shape) != 2 or not all(len(array) == stored.shape[0] for array in _arrays(stored).values()):
        return stored.as_format(wanted)
    if wanted is None or _part(stored, 0, 1).as_format(wanted).format is stored.format:
        return stored.as_format(wanted)  # nothing to pack
    rows = max(1, _VALUES // stored.shape[1])
    out: dict[str, np.ndarray] = {}

    def put(at: int) -> StoredWeight:
        part = wanted.pack(fast_values(_part(stored, at, at + rows)))
        for name, array in _arrays(part).items():
            if at == 0:
                out[name] = np.empty((stored.shape[0], *array.shape[1:]), array.dtype)
            out[name][at:at + rows] = array
        for array in _arrays(stored).values():
            release(array[at:at + rows])
        return part

    first = put(0)
    for _ in on_all_cores(put, range(rows, stored.shape[0], rows)):
        pass
    return dataclasses.replace(first, shape=stored.shape, **out)


def on_all_cores(function: Callable[[T], R], items: Iterable[T]) -> Iterator[R]:
    """The results of a function of NumPy arrays, in order; NumPy leaves the interpreter to others while it computes.

    Who stops to ask for results leaves the rest undone. Not to be nested.
    """
    workers, ahead = _workers(), 2 * _threads()
    waiting: deque = deque()
    try:
        for item in items:
            waiting.append(workers.submit(function, item))
            if len(waiting) > ahead:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        for one in waiting:
            one.cancel()


def _threads() -> int:
    wanted = os.environ.get("COLORA_NUM_THREADS", "")
    return int(wanted) if wanted.isdigit() and int(wanted) else len(os.sched_getaffinity(0))


@functools.lru_cache(maxsize=1)
def _workers() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(_threads(), "colora-repack")


def fast_values(stored: StoredWeight) -> np.ndarray:
    """``stored.values()`` (rows, columns), of rows of blocks by the kernels' own readers."""
    kind = stored.format
    if kind.ggml is None or kind.values == kind.items or kind.tag is None or not library_path().is_file():
        return stored.values()
    return unpack_rows(kind.tag, stored.data, stored.shape[1])


def _arrays(stored: StoredWeight) -> dict[str, np.ndarray]:
    """Its arrays that have a row for each output."""
    return {name: value for name, value in vars(stored).items() if name != "order" and isinstance(value, np.ndarray)}


def _part(stored: StoredWeight, begin: int, end: int) -> StoredWeight:
    arrays = {name: array[begin:end] for name, array in _arrays(stored).items()}
    return dataclasses.replace(stored, shape=(min(end, stored.shape[0]) - begin, stored.shape[1]), **arrays)
