"""The integers of GPTQ, AWQ and compressed-tensors folders: unpacked, and put into the formats that are computed in.

w (out, in) = scale * (q - zero), scale and zero point of a group of neighbouring inputs. All functions take the tensors
of one linear as they are stored and return :class:`Integers`. Layouts: the files of AutoGPTQ, GPTQModel, AutoAWQ and
vLLM's compressed-tensors.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import NamedTuple, Optional

import numpy as np

from colora_ms.models.formats import INT4_ZERO, INT4_ZERO_ORDERED, INT8_ZERO, INT8_ZERO_ORDERED, StoredWeight

_ORDERED = {INT4_ZERO: INT4_ZERO_ORDERED, INT8_ZERO: INT8_ZERO_ORDERED}

# Nibble i of an AWQ word holds this one of its eight columns.
_AWQ_ORDER = np.array([0, 2, 4, 6, 1, 3, 5, 7])


class Integers(NamedTuple):
    """A linear's weight as integers.

    Attributes:
        q: (out, in) uint8, from 0 on; scale: (out, groups) float32; zero: (out, groups) float32, in q's numbering.
        bits: 4 or 8; group: (in,) group of each input.
    """

    q: np.ndarray
    scale: np.ndarray
    zero: np.ndarray
    bits: int
    group: np.ndarray

    def stored(self) -> StoredWeight:
        """As int4_zero or int8_zero; with groups that are not contiguous (GPTQ's activation order) with the columns
        sorted by group, as their ordered forms."""
        columns = self.q.shape[1]
        if np.any(np.diff(self.group) < 0):
            order = np.argsort(self.group, kind="stable").astype(np.int32)
            found = self._replace(q=self.q[:, order], group=self.group[order]).stored()
            return replace(found, format=_ORDERED[found.format], order=order)
        starts = np.flatnonzero(np.diff(self.group, prepend=self.group[0] - 1))
        size = math.gcd(columns, *starts.tolist())  # a last group may be shorter: all are cut into equal ones
        chosen = self.group[::size]
        pairs = np.stack([self.scale[:, chosen], self.zero[:, chosen]], 2).astype(np.float32)
        if self.bits == 4 and columns % 2 == 0:
            return StoredWeight(INT4_ZERO, self.q.shape, self.q[:, 0::2] | self.q[:, 1::2] << 4, pairs)
        pairs[:, :, 1] -= 128
        return StoredWeight(INT8_ZERO, self.q.shape, (self.q ^ 128).view(np.int8), pairs)


def _fields(words: np.ndarray, bits: int) -> np.ndarray:
    """int32 (...,) -> uint8 (..., 32 / bits), the lowest bits first."""
    shifts = np.arange(0, 32, bits, dtype=np.uint32)
    return (words.astype(np.int32).view(np.uint32)[..., None] >> shifts & (2 ** bits - 1)).astype(np.uint8)


def gptq(qweight: np.ndarray, qzeros: np.ndarray, scales: np.ndarray, bits: int, add_one: bool,
         group: np.ndarray) -> Integers:
    """GPTQ: packed along the inputs, zero points along the outputs.

    Args:
        qweight: int32 (in * bits / 32, out); qzeros: int32 (groups, out * bits / 32); scales: (groups, out) float32.
        add_one: the file is of version 1, which stores zero points less one (from the whole word: borrows run on).
        group: (in,) int64, group of each input.
    """
    q = _fields(qweight.T, bits).reshape(qweight.shape[1], -1)
    words = qzeros.astype(np.int32).view(np.uint32)
    if add_one:
        words = words + np.uint32(0x11111111 if bits == 4 else 0x01010101)  # modulo 2**32
    zero = _fields(words.view(np.int32), bits).reshape(len(qzeros), -1).T
    return Integers(q, np.ascontiguousarray(scales.T), zero.astype(np.float32), bits, group)


def awq(qweight: np.ndarray, qzeros: np.ndarray, scales: np.ndarray, group: np.ndarray) -> Integers:
    """AWQ's gemm version: four bits, packed along the outputs in an order of its own.

    Args:
        qweight: int32 (in, out / 8); qzeros: int32 (groups, out / 8); scales: (groups, out) float32.
        group: (in,) int64, group of each input.
    """
    def columns(words):
        fields = _fields(words, 4)
        found = np.empty_like(fields)
        found[..., _AWQ_ORDER] = fields
        return np.ascontiguousarray(found.reshape(len(words), -1).T)

    return Integers(columns(qweight), np.ascontiguousarray(scales.T), columns(qzeros).astype(np.float32), 4, group)


def compressed(packed: np.ndarray, scale: np.ndarray, zero: Optional[np.ndarray], group: np.ndarray,
               bits: int) -> Integers:
    """compressed-tensors: packed along the inputs, values + 2**(bits - 1).

    Args:
        packed: int32 (out, ceil(in * bits / 32)), or int8 (out, in) as they are; scale: (out, groups) float32;
            group: (in,), that of each input; zero: signed, int8 (out, groups), or packed int32
            (ceil(out * bits / 32), groups), along the outputs; None: 0.
    """
    (out, groups), columns = scale.shape, len(group)
    half = 2 ** (bits - 1)
    if packed.dtype.itemsize == 1:
        q = (packed ^ -128).view(np.uint8)
    else:
        q = _fields(packed, bits).reshape(out, -1)[:, :columns]
    if zero is None:
        centre = np.full((out, groups), half, np.float32)
    elif zero.dtype == np.int32:
        centre = _fields(zero.T, bits).reshape(groups, -1)[:, :out].T.astype(np.float32)
    else:
        centre = zero.astype(np.float32) + half
    return Integers(np.ascontiguousarray(q), scale, centre, bits, group)
