"""Reading of GGUF files: header, metadata, and tensors as they are stored or dequantized.

The header is parsed here with every count and offset checked against the file's size (the
``gguf`` package's own reader trusts them, and builds one object per vocabulary entry).
"""

from __future__ import annotations

import math
import os
import struct

import numpy as np

from colora_ms.errors import CheckpointError
from colora_ms.models.formats import StoredWeight, format_of_ggml
from colora_ms.models.mapped import map_file

# value type -> struct format, for the scalar types of the format
_SCALARS = {0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<?", 10: "<Q",
            11: "<q", 12: "<d"}
_STRING, _ARRAY = 8, 9
_MAX_NAME = 1 << 16


class GgufTensor:
    """Where one tensor lies: ``shape`` as NumPy has it (out, in), type number, byte range."""

    __slots__ = ("name", "shape", "type", "begin", "end")

    def __init__(self, name: str, shape: tuple[int, ...], kind: int, begin: int, end: int) -> None:
        self.name, self.shape, self.type, self.begin, self.end = name, shape, kind, begin, end


class GgufFile:
    """One memory-mapped GGUF file (versions 2 and 3, little-endian).

    Attributes:
        path: as given.
        metadata: ``{key: value}``; strings are ``str``, numeric arrays NumPy arrays, arrays of
            strings lists of ``bytes`` (vocabulary pieces need not be valid UTF-8).
        value_types: ``{key: number of the value's type, or (9, that of the array's values)}``.
        tensors: ``{name: GgufTensor}``.

    Raises:
        CheckpointError: not a GGUF file, truncated, or a count, size or offset that cannot be.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = str(path)
        self._bytes = map_file(self.path)
        self._view = memoryview(self._bytes)
        self._at = 0
        self.metadata = {}
        self.value_types = {}
        self.tensors = {}
        self._parse()

    def _parse(self):
        magic = bytes(self._take(4))
        if magic != b"GGUF":
            raise self._damaged(f"it starts with {magic!r}, expected b'GGUF'")
        version = self._number("<I")
        if version not in (2, 3):
            hint = " (a big-endian file)" if version and version & 0xFFFF == 0 else ""
            raise self._damaged(f"it has version {version}{hint}; versions 2 and 3 are read")
        tensor_count, value_count = self._number("<Q"), self._number("<Q")
        # the smallest possible tensor entry has 32 bytes, the smallest value 13
        if tensor_count * 32 + value_count * 13 > self._bytes.size:
            raise self._damaged(f"its header claims {tensor_count} tensors and {value_count} "
                                f"values, too many for {self._bytes.size} bytes")
        for _ in range(value_count):
            key = self._text("a key")
            if key in self.metadata:
                raise self._damaged(f"the key {key!r} occurs twice")
            self.metadata[key] = self._value(key, self._number("<I"))
        alignment = self.metadata.get("general.alignment", 32)
        if not isinstance(alignment, int) or alignment < 1 or alignment & (alignment - 1):
            raise self._damaged(f"general.alignment is {alignment!r}, expected a power of two")
        infos = [self._tensor_info() for _ in range(tensor_count)]
        self._place_tensors(infos, self._at + -self._at % alignment, alignment)

    def _value(self, key, kind):
        self.value_types[key] = kind
        if kind in _SCALARS:
            return self._number(_SCALARS[kind])
        if kind == _STRING:
            return self._string().decode("utf-8", errors="replace")
        if kind != _ARRAY:
            raise self._damaged(f"the value of {key!r} has the unknown type {kind}")
        inner, count = self._number("<I"), self._number("<Q")
        self.value_types[key] = (kind, inner)
        if inner in _SCALARS:
            dtype = np.dtype("?" if inner == 7 else "<" + _SCALARS[inner][1])
            return np.frombuffer(self._take(count * dtype.itemsize), dtype=dtype)
        if inner != _STRING:
            raise self._damaged(f"the array {key!r} holds values of type {inner}")
        if count * 8 > self._bytes.size - self._at:
            raise self._damaged(f"the array {key!r} claims {count} strings")
        return self._strings(count)

    def _tensor_info(self):
        name = self._text("a tensor's name")
        rank = self._number("<I")
        if not 1 <= rank <= 4:
            raise self._damaged(f"tensor {name!r} has {rank} dimensions, expected 1 to 4")
        sizes = [self._number("<Q") for _ in range(rank)]
        if not all(1 <= size < 1 << 48 for size in sizes):
            raise self._damaged(f"tensor {name!r} has the impossible shape {sizes}")
        return name, tuple(reversed(sizes)), self._number("<I"), self._number("<Q")

    def _place_tensors(self, infos, start, alignment):
        from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType
        placed = []
        for name, shape, kind, offset in infos:
            if name in self.tensors:
                raise self._damaged(f"the tensor {name!r} occurs twice")
            try:
                block, block_bytes = GGML_QUANT_SIZES[GGMLQuantizationType(kind)]
            except (ValueError, KeyError):
                raise self._damaged(f"tensor {name!r} has the unknown type {kind}") from None
            if shape[-1] % block:
                raise self._damaged(f"tensor {name!r} has rows of {shape[-1]} values, expected a "
                                    f"multiple of its block size {block}")
            size = math.prod(shape) // block * block_bytes
            begin, end = start + offset, start + offset + size
            if end > self._bytes.size or offset % alignment:
                raise self._damaged(f"tensor {name!r} lies at bytes {begin} to {end}, the file has "
                                    f"{self._bytes.size} (alignment {alignment})")
            self.tensors[name] = GgufTensor(name, shape, kind, begin, end)
            placed.append((begin, end, name))
        placed.sort()
        for (_, end, first), (begin, _, second) in zip(placed, placed[1:]):
            if begin < end:
                raise self._damaged(f"the tensors {first!r} and {second!r} overlap")

    def stored(self, name: str) -> StoredWeight:
        """One tensor as it is stored, a view of the mapped file, in the file's row order.

        Raises:
            KeyError: no such tensor.
        """
        tensor = self.tensors[name]
        own = self._format(tensor)
        return StoredWeight(own, tensor.shape, self.raw(name).view(own.dtype).reshape(own.data_shape(tensor.shape)))

    def read(self, name: str) -> np.ndarray:
        """One tensor dequantized to float32, in the file's row order.

        Raises:
            KeyError: no such tensor.
            CheckpointError: its type cannot be dequantized.
        """
        return self._values(self.tensors[name], self.stored(name))

    def raw(self, name: str) -> np.ndarray:
        """The stored bytes of a tensor, uint8 (n,), a view of the mapped file."""
        tensor = self.tensors[name]
        return self._bytes[tensor.begin:tensor.end]

    def _format(self, tensor):
        from gguf.constants import GGMLQuantizationType

        return format_of_ggml(GGMLQuantizationType(tensor.type).name)

    def _values(self, tensor, stored):
        try:
            return stored.values()
        except CheckpointError as error:
            raise CheckpointError(f"{self.path}: tensor {tensor.name!r} cannot be read: {error}") from None

    def _take(self, count):
        """The next ``count`` bytes of the header."""
        if count > self._bytes.size - self._at:
            raise self._damaged(f"it ends at byte {self._bytes.size} in the middle of its header "
                                f"({count} bytes were wanted at byte {self._at})")
        piece = self._view[self._at:self._at + count]
        self._at += count
        return piece

    def _number(self, form):
        return struct.unpack(form, self._take(struct.calcsize(form)))[0]

    def _string(self):
        return bytes(self._take(self._number("<Q")))

    def _strings(self, count):
        """``count`` strings; a vocabulary has hundreds of thousands, so that each is cut out without a call."""
        view, at, end, length = self._view, self._at, self._bytes.size, struct.Struct("<Q").unpack_from
        found = []
        for _ in range(count):
            start = at + 8
            at = start + length(view, at)[0] if start <= end else end + 1
            if at > end:
                raise self._damaged(f"it ends at byte {end} in the middle of its header (a string stands at byte "
                                    f"{start - 8})")
            found.append(bytes(view[start:at]))
        self._at = at
        return found

    def _text(self, what):
        text = self._string()
        if len(text) > _MAX_NAME:
            raise self._damaged(f"{what} has {len(text)} bytes")
        try:
            return text.decode("utf-8")
        except UnicodeDecodeError:
            raise self._damaged(f"{what} is not UTF-8: {text[:40]!r}") from None

    def _damaged(self, what):
        return CheckpointError(f"{self.path} is not a usable GGUF file: {what}. It may be "
                               "truncated; fetch it again")
