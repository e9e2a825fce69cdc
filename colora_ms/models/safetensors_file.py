"""Reading and writing of safetensors files, strictly and one tensor at a time.

Layout of the format: 8 bytes little-endian header length, a JSON header
``{name: {"dtype", "shape", "data_offsets": [begin, end]}}``, then the bytes, without holes.
Every size in a header is checked against the file before anything is allocated, so a damaged or
hostile file gives a ``CheckpointError``.  Pure NumPy (bfloat16 is handled through its bits).
"""

from __future__ import annotations

import json
import math
import os
import struct
from collections.abc import Callable, Mapping
from typing import Optional

import numpy as np

from colora_ms.errors import CheckpointError
from colora_ms.files import PathLike
from colora_ms.models.mapped import map_file

MAX_HEADER_BYTES = 100_000_000  # the limit of the reference implementation
ITEM_BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1,
              "U64": 8, "U32": 4, "U16": 2, "U8": 1, "BOOL": 1, "F8_E4M3": 1, "F8_E5M2": 1}
FLOAT_DTYPES = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "<u2"}
WRITE_DTYPES = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}

_CHUNK = 1 << 16  # numbers that are rounded at a time: the temporaries stay in a core's cache


class SafetensorsFile:
    """One memory-mapped safetensors file.

    Attributes:
        path: as given.
        entries: ``{name: (dtype, shape, begin, end)}``, offsets absolute in the file.
        metadata: the header's ``__metadata__`` (strings by name).

    Raises:
        CheckpointError: the file cannot be opened, is truncated, or its header is not valid.
    """

    def __init__(self, path: PathLike) -> None:
        self.path = os.fspath(path)
        self._bytes = map_file(self.path)
        self.entries, self.metadata = self._parse()

    def _parse(self):
        size = self._bytes.size
        if size < 8:
            raise self._damaged(f"it has {size} bytes, a safetensors file has at least 8")
        (length,) = struct.unpack("<Q", self._bytes[:8].tobytes())
        if length > min(size - 8, MAX_HEADER_BYTES):
            raise self._damaged(f"its header claims {length} bytes, the file has {size}")
        try:
            header = json.loads(self._bytes[8:8 + length].tobytes().decode("utf-8"),
                                object_pairs_hook=_unique_keys)
        except (ValueError, RecursionError) as error:
            raise self._damaged(f"its header is not valid JSON ({error})") from None
        if not isinstance(header, dict):
            raise self._damaged("its header is not a JSON object")
        metadata = header.pop("__metadata__", None) or {}
        if not isinstance(metadata, dict):
            raise self._damaged("its __metadata__ is not a JSON object")
        entries = {name: self._entry(name, value, 8 + length) for name, value in header.items()}
        expected = 8 + length
        for name, (_, _, begin, end) in sorted(entries.items(), key=lambda item: item[1][2:]):
            if begin != expected:
                kind = "overlaps the tensor before it" if begin < expected else "leaves a hole"
                raise self._damaged(f"tensor {name!r} starts at byte {begin}, expected "
                                    f"{expected}: it {kind}")
            expected = end
        if expected != size:
            raise self._damaged(f"its tensors end at byte {expected}, the file at {size}")
        return entries, metadata

    def _entry(self, name, value, data_start):
        """Check one header entry and make its offsets absolute."""
        if not isinstance(value, dict):
            raise self._damaged(f"tensor {name!r} has the header entry {value!r:.80}")
        dtype, shape, offsets = (value.get(key) for key in ("dtype", "shape", "data_offsets"))
        if not isinstance(dtype, str) or dtype not in ITEM_BYTES:
            raise self._damaged(f"tensor {name!r} has the unknown dtype {dtype!r:.80}")
        if not isinstance(shape, list) or len(shape) > 32 or not all(_is_size(n) for n in shape):
            raise self._damaged(f"tensor {name!r} has the impossible shape {shape!r:.80}")
        if not isinstance(offsets, list) or len(offsets) != 2 \
                or not all(_is_size(n) for n in offsets):
            raise self._damaged(f"tensor {name!r} has the impossible offsets {offsets!r:.80}")
        begin, end = offsets[0] + data_start, offsets[1] + data_start
        if end > self._bytes.size or begin > end:
            raise self._damaged(f"tensor {name!r} lies at bytes {begin} to {end}, the file has "
                                f"{self._bytes.size}")
        if end - begin != math.prod(shape) * ITEM_BYTES[dtype]:
            raise self._damaged(f"tensor {name!r} of shape {tuple(shape)} and dtype {dtype} has "
                                f"{end - begin} bytes")
        return dtype, tuple(shape), begin, end

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor, a tuple of ints."""
        return self.entries[name][1]

    def read(self, name: str) -> np.ndarray:
        """One tensor as float32.

        A float32 tensor is a read-only view of the mapped file (no copy, see
        :func:`colora_ms.models.mapped.map_file`); float64, float16 and bfloat16 are converted into a new array.

        Raises:
            KeyError: no such tensor.
            CheckpointError: the tensor does not hold floating-point numbers.
        """
        dtype, shape, begin, end = self.entries[name]
        if dtype not in FLOAT_DTYPES:
            raise CheckpointError(f"{self.path}: tensor {name!r} has dtype {dtype}; only "
                                  f"{', '.join(FLOAT_DTYPES)} can be read as weights")
        # frombuffer keeps the mapping alive and copies nothing
        raw = np.frombuffer(self._bytes[begin:end], dtype=FLOAT_DTYPES[dtype]).reshape(shape)
        if dtype == "F32":
            return raw if raw.flags.aligned else raw.copy()
        if dtype == "BF16":
            return bfloat16_to_float32(raw)
        with np.errstate(over="ignore"):
            return raw.astype(np.float32)

    def raw(self, name: str) -> np.ndarray:
        """The bytes of a tensor, uint8 (n,), a view of the mapped file."""
        _, _, begin, end = self.entries[name]
        return self._bytes[begin:end]

    def _damaged(self, what):
        return CheckpointError(f"{self.path} is not a usable safetensors file: {what}. It may be "
                               "truncated; fetch or save it again")


def write_safetensors(path: PathLike, shapes: Mapping[str, tuple[int, ...]], get: Callable[[str], np.ndarray],
                      dtype: str = "float32", metadata: Optional[Mapping[str, str]] = None) -> None:
    """Write one safetensors file, holding one tensor in memory at a time.

    Args:
        path: file to create.
        shapes: ``{name: shape}`` in the order of writing.
        get: ``get(name)`` returns the array (any float dtype).
        dtype: ``"float32"``, ``"bfloat16"`` or ``"float16"``.
        metadata: ``{str: str}`` for the header.

    Raises:
        CheckpointError: unknown dtype, a wrong shape, or a value that float16 cannot hold.
    """
    if dtype not in WRITE_DTYPES:
        raise CheckpointError(f"dtype {dtype!r} cannot be written; choose one of "
                              f"{', '.join(WRITE_DTYPES)}")
    code = WRITE_DTYPES[dtype]
    header, begin = {"__metadata__": metadata or {"format": "pt"}}, 0
    for name, shape in shapes.items():
        end = begin + math.prod(shape) * ITEM_BYTES[code]
        header[name] = {"dtype": code, "shape": list(shape), "data_offsets": [begin, end]}
        begin = end
    text = json.dumps(header, separators=(",", ":")).encode("utf-8")
    text += b" " * (-len(text) % 8)  # keeps the data aligned for memory mapping
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", len(text)))
        file.write(text)
        for name, shape in shapes.items():
            array = np.asarray(get(name))
            if array.shape != tuple(shape):
                raise CheckpointError(f"tensor {name!r} has shape {array.shape}, expected "
                                      f"{tuple(shape)}")
            file.write(_encode(name, array, dtype).tobytes())
        file.flush()
        os.fsync(file.fileno())


def _encode(name, array, dtype):
    """The array in the file's dtype (bfloat16 as its uint16 bits), C order."""
    array = np.ascontiguousarray(array, dtype="<f4")
    if dtype == "bfloat16":
        return float32_to_bfloat16(array)
    if dtype == "float16":
        with np.errstate(over="ignore"):
            half = array.astype("<f2")
        if not np.array_equal(np.isfinite(half), np.isfinite(array)):
            raise CheckpointError(f"tensor {name!r} has values beyond float16's range of 65504; "
                                  "write it as bfloat16 or float32")
        return half
    return array


def bfloat16_to_float32(bits: np.ndarray) -> np.ndarray:
    """uint16 bit patterns of bfloat16, any shape, to float32 (exact)."""
    return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)


def float32_to_bfloat16(array: np.ndarray) -> np.ndarray:
    """float32 to bfloat16 bit patterns (uint16), rounded to nearest, ties to even; NaN stays."""
    array = np.ascontiguousarray(array, dtype=np.float32)
    bits, out = array.reshape(-1).view(np.uint32), np.empty(array.size, "<u2")
    for begin in range(0, bits.size, _CHUNK):
        part = bits[begin:begin + _CHUNK]
        rounded = part >> np.uint32(16)
        rounded &= np.uint32(1)
        rounded += np.uint32(0x7FFF)
        with np.errstate(over="ignore"):
            rounded += part
        rounded >>= np.uint32(16)
        # a NaN's payload could carry over into the sign or be rounded to infinity
        nan = (part & np.uint32(0x7FFFFFFF)) > np.uint32(0x7F800000)
        if nan.any():
            rounded[nan] = (part[nan] >> np.uint32(16)) | np.uint32(0x0040)
        out[begin:begin + _CHUNK] = rounded
    return out.reshape(array.shape)


def _unique_keys(pairs):
    values = dict(pairs)
    if len(values) != len(pairs):
        seen = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))
        raise ValueError(f"the name {twice!r} occurs twice")
    return values


def _is_size(value):
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 1 << 63
