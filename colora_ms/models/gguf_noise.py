"""How far a stored value may lie from the value that was stored: the rounding of each GGUF type, value by value.

Two tensors of one file can be one matrix stored in two types (an embedding in Q5_0 and the head that is tied to it in
Q8_0), or two matrices that are much alike. They can be one matrix only if everywhere their difference is at most the
sum of what both types round away there. The bounds follow from each block's own step, not from a global number:

* plain types: half a unit in the last place;
* Q4_0 ... Q8_0: half a step, and the rounding of the float16 scale (and offset), which happens after the codes are
  chosen; Q4_0 and Q5_0 have one code less on one side, so that their last code can stand for a value a step further;
* K-quants: half a step, for their codes are chosen last, with the stored scales; the first and last code can stand for
  values beyond, by as much as the rounding of the sub-block's scale and offset moves the ends.

Sources: the quantisers of ggml and of the ``gguf`` package.
"""

from __future__ import annotations

from typing import Optional, Protocol

import numpy as np

from colora_ms.models.formats import StoredWeight
from colora_ms.models.gguf_blocks import block_sizes
from colora_ms.models.mapped import release
from colora_ms.models.repack import fast_values, on_all_cores

#: Relative error of a float16 scale, and its absolute error below the smallest normal number.
_HALF, _TINY = np.float32(2.0 ** -11), np.float32(2.0 ** -25)

#: Arithmetic of the quantisers themselves, in steps.
_SLACK = np.float32(1e-3)

#: Bits of the significand, with the hidden one.
_PLAIN = {"F64": 53, "F32": 24, "F16": 11, "BF16": 8}

_SMALLEST = {"F16": 2.0 ** -25}

_PART = 1 << 19  # values that are compared at a time: they and what is made of them stay in a core's cache


def stored_noise(kind: str, blocks: np.ndarray, values: np.ndarray) -> Optional[np.ndarray]:
    """The largest distance of each stored value from the value that it stands for.

    Args:
        kind: name of the type, such as "Q5_0".
        blocks: (n, bytes of a block) uint8; anything for plain types.
        values: (n, values of a block) float32, the dequantised blocks.

    Returns:
        float32 of the shape of values, or None for a type whose rounding is not known here.
    """
    if kind in _PLAIN:
        half_unit = np.ldexp(np.float32(1), np.frexp(values)[1] - 1 - _PLAIN[kind])
        return np.maximum(np.where(values == 0, 0, half_unit), np.float32(_SMALLEST.get(kind, 0))).astype(np.float32)
    with np.errstate(all="ignore"):
        if kind in ("Q4_0", "Q5_0"):
            return _signed(blocks, values, 7 if kind == "Q4_0" else 15)
        if kind in ("Q4_1", "Q5_1"):
            step, offset = np.abs(_half(blocks, 0)), np.abs(_half(blocks, 2))
            return (step * (0.5 + _SLACK) + (np.abs(values) + 2 * offset) * _HALF + 32 * _TINY).astype(np.float32)
        if kind == "Q8_0":
            return np.abs(_half(blocks, 0)) * (0.5 + _SLACK) + np.abs(values) * _HALF + 128 * _TINY
        parts = _K_PARTS.get(kind)
        return None if parts is None else _super_block(values, *parts(blocks))


def _half(blocks, at):
    """(n, 1) float32 of the float16 at a byte of each block."""
    return np.ascontiguousarray(blocks[:, at:at + 2]).view("<f2").astype(np.float32)


def _signed(blocks, values, last):
    """Q4_0 and Q5_0: codes from -last - 1 to last; the scale's sign makes the largest value the first code."""
    step = _half(blocks, 0)
    code = np.rint(values / np.where(step == 0, 1, step))
    width = np.where(code >= last, np.float32(1), np.float32(0.5)) + _SLACK
    return np.abs(step) * width + np.abs(values) * _HALF + (last + 1) * (np.abs(step) * _HALF * (code >= last) + _TINY)


def _super_block(values, scale, sub, offset_scale, offset, first, last):
    """The bound of a K-quant: value = scale * sub * code - offset_scale * offset, code from first to last.

    scale, offset_scale: (n, 1); sub, offset: (n, sub-blocks).
    """
    n, size = values.shape
    inner = values.reshape(n, sub.shape[1], -1)
    step = (scale * sub)[..., None]
    code = np.rint((inner + (offset_scale * offset)[..., None]) / np.where(step == 0, 1, step))
    step = np.abs(step)
    ends = 2.5 * step + (last - first) * np.abs(scale)[..., None] / 2 + np.abs(offset_scale)[..., None] / 2
    outside = (code <= first) | (code >= last) | (step == 0)
    return (step * (0.5 + _SLACK) + np.where(outside, ends, 0)).reshape(n, size).astype(np.float32)


def _q2_k(blocks):
    scales = blocks[:, :16]
    sub, offset = (scales & 15).astype(np.float32), (scales >> 4).astype(np.float32)
    return _half(blocks, 80), sub, _half(blocks, 82), offset, 0, 3


def _q3_k(blocks):
    low, high = blocks[:, 96:104], blocks[:, 104:108]
    low = np.concatenate([low & 15, low >> 4], 1)
    high = np.concatenate([(high >> shift) & 3 for shift in (0, 2, 4, 6)], 1)
    sub = (low | (high << 4)).astype(np.float32) - 32
    return _half(blocks, 108), sub, np.zeros((len(blocks), 1), np.float32), np.zeros_like(sub), -4, 3


def _q45_k(last):
    def parts(blocks):
        from gguf.quants import Q4_K
        sub, offset = Q4_K.get_scale_min(np.ascontiguousarray(blocks[:, 4:16]))
        return _half(blocks, 0), sub.astype(np.float32), _half(blocks, 2), offset.astype(np.float32), 0, last
    return parts


def _q6_k(blocks):
    sub = np.ascontiguousarray(blocks[:, 192:208]).view(np.int8).astype(np.float32)
    return _half(blocks, 208), sub, np.zeros((len(blocks), 1), np.float32), np.zeros_like(sub), -32, 31


_K_PARTS = {"Q2_K": _q2_k, "Q3_K": _q3_k, "Q4_K": _q45_k(15), "Q5_K": _q45_k(31), "Q6_K": _q6_k}


def least_noise(kind: str, blocks: np.ndarray) -> np.ndarray:
    """What :func:`stored_noise` is at least, for all values of a sub-block at once: half a step.

    Args:
        kind: a type whose rounding is known; blocks: as there.

    Returns:
        (n, sub-blocks) float32.
    """
    with np.errstate(all="ignore"):
        if kind in _PLAIN:
            return np.zeros((len(blocks), 1), np.float32)
        if kind in _K_PARTS:
            scale, sub, *_ = _K_PARTS[kind](blocks)
            return np.abs(scale * sub) * np.float32(0.5)
        return np.abs(_half(blocks, 0)) * np.float32(0.5)


class GgufTensors(Protocol):
    """What is read of a ``GgufFile`` or ``GgufParts``."""

    tensors: dict

    def stored(self, name: str) -> StoredWeight:
        """A tensor as the file holds it."""


def finer_of_one_matrix(file: GgufTensors, first: str, second: str) -> Optional[str]:
    """Whether two matrices of a file are one, stored twice, and which copy is the finer one.

    Args:
        file: ``GgufFile`` or ``GgufParts``; first, second: names of tensors.

    Returns:
        The name of the copy that rounds less (the first if none does; judged by some rows), or None: they are two
        matrices, in shape or in values, or of types whose rounding is not known. Two tensors of one type must be equal,
        because a quantiser gives one matrix the same codes twice.

    Raises:
        CheckpointError: a type that cannot be unpacked.
    """
    from gguf.constants import GGMLQuantizationType

    one, two = file.tensors[first], file.tensors[second]
    if one.shape != two.shape or len(one.shape) != 2:
        return None
    rows, columns = one.shape
    both = [(GGMLQuantizationType(file.tensors[name].type).name, file.stored(name)) for name in (first, second)]
    # a few rows first: two matrices differ everywhere, as a rule
    few = [_part(*copy, np.unique(np.linspace(0, rows - 1, 64).astype(np.int64))) for copy in both]
    if not _one_matrix(few):
        return None
    per_part = max(1, _PART // columns)
    parts = ([_part(*copy, slice(at, at + per_part)) for copy in both] for at in range(0, rows, per_part))
    same = all(on_all_cores(_one_matrix, parts))
    for _, whole in both:
        release(whole.data)
    if not same:
        return None
    if one.type == two.type:
        return first
    total = [float(stored_noise(*part).sum(dtype=np.float64)) for part in few]
    return first if total[0] <= total[1] else second


def _part(kind, whole, rows):
    """(type, blocks (n, bytes of a block), values (n, values of a block)) of some rows."""
    data = np.ascontiguousarray(whole.data[rows])
    values = fast_values(StoredWeight(whole.format, (len(data), whole.shape[1]), data))
    blocks = data.view(np.uint8).reshape(-1, block_sizes(kind)[1])
    return kind, blocks, values.reshape(len(blocks), -1)


def _one_matrix(parts):
    """Whether some rows of two matrices, as of :func:`_part`, can stand for the same values."""
    kinds, blocks, values = zip(*parts)
    a, b = (one.reshape(-1) for one in values)
    if a[0] == b[0] and np.array_equal(a, b):
        return bool(np.isfinite(a).all())
    if kinds[0] == kinds[1] or any(stored_noise(kind, own[:1], own_values[:1]) is None
                                   for kind, own, own_values in zip(kinds, blocks, values)):
        return False
    with np.errstate(all="ignore"):
        distance = a - b
        np.abs(distance, out=distance)
        least = [least_noise(kind, own).reshape(-1) for kind, own in zip(kinds, blocks)]
        width = a.size // max(map(len, least))
        bound = sum(np.repeat(one, a.size // width // len(one)) for one in least)
        near = distance.reshape(-1, width) <= bound[:, None]  # not for NaN
        # Where that is not enough, the whole bound counts: of units that are whole blocks of both.
        unit = max(one.shape[1] for one in values)
        doubtful = np.flatnonzero(~near.reshape(-1, unit).all(1))
        if not len(doubtful):
            return True
        noise = []
        for kind, own, own_values in zip(kinds, blocks, values):
            there = own.reshape(a.size // unit, -1)[doubtful].reshape(-1, own.shape[1])
            noise.append(stored_noise(kind, there, own_values.reshape(-1, unit)[doubtful].reshape(len(there), -1)))
        bound = (noise[0].reshape(-1) + noise[1].reshape(-1)) * np.float32(1 + 1e-6)
        return bool((distance.reshape(-1, unit)[doubtful].reshape(-1) <= bound).all())
