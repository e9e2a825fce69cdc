"""Weights of every format as float32, in built-in operators: what the reference forms compute with on any device."""

from __future__ import annotations

import numpy as np

import mindspore as ms
from mindspore import Tensor, ops

from colora_ms.kernels.aot import ABSENT
from colora_ms.kernels.operands import (
    INT4,
    INT4_ZERO,
    INT4_ZERO_ORDERED,
    INT8,
    INT8_ZERO,
    INT8_ZERO_ORDERED,
    Q4_0,
    Q4_1,
    Q4_K,
    Q5_0,
    Q5_1,
    Q5_K,
    Q6_K,
    Q8_0,
)

# Every float16 by its bits.
_HALVES = Tensor(np.arange(1 << 16, dtype=np.uint16).view(np.float16).astype(np.float32))
# Of the formats from q4_0 to q6_k, in the order of their numbers.
_BLOCK_BYTES = (18, 20, 22, 24, 34, 144, 176, 210)
_BITS = Tensor(np.array([1, 2, 4, 8, 16, 32, 64, 128], np.int32))


def dequantize(form: int, weight: Tensor, weight_scale: Tensor = ABSENT) -> Tensor:
    """A weight as float32 (out, in), each value rounded once; its columns as they lie.

    Args:
        form: number of its format in :mod:`colora_ms.kernels.operands`; weight, weight_scale: as for
            :func:`colora_ms.kernels.multi_lora_linear`; some rows of them do as well.
    """
    rows = weight.shape[0]
    if form >= Q4_0 and form <= Q6_K:
        return _blocks(form, weight, rows).reshape((rows, -1))
    if form == INT4 or form == INT4_ZERO or form == INT4_ZERO_ORDERED:
        low, high = _nibbles(weight.astype(ms.int32))
        values = ops.stack((low, high), -1).reshape((rows, weight.shape[1] * 2)).astype(ms.float32)
        if form == INT4:
            values = values - 8.0
    else:
        values = weight.astype(ms.float32)
    if form == INT4_ZERO or form == INT8_ZERO or form == INT4_ZERO_ORDERED or form == INT8_ZERO_ORDERED:
        factor, zero = weight_scale[:, :, 0], weight_scale[:, :, 1]
        values = values.reshape((rows, factor.shape[1], -1)) - ops.expand_dims(zero, -1)
        return (values * ops.expand_dims(factor, -1)).reshape((rows, -1))
    if form == INT4 or form == INT8:
        if weight_scale.ndim == 1:
            return values * weight_scale.reshape((-1, 1))
        values = values.reshape((rows, weight_scale.shape[1], -1))
        return (values * ops.expand_dims(weight_scale, -1)).reshape((rows, -1))
    return values


def _nibbles(raw):
    """(low, high) of int32 bytes."""
    high = ops.div(raw, 16, rounding_mode="floor").astype(ms.int32)
    return raw - high * 16, high


def _divided(raw, by):
    return ops.div(raw, by, rounding_mode="floor").astype(ms.int32)


def _half(b, at):
    """(rows, blocks, 1) float32: the float16 at byte ``at`` of every block."""
    return ops.gather(_HALVES, b[:, :, at:at + 1] + b[:, :, at + 1:at + 2] * 256, 0)


def _signed(b):
    return b - 256 * (b > 127).astype(ms.int32)


def _remainder(raw, by):
    return raw - _divided(raw, by) * by


def _blocks(form, weight, rows):
    size = _BLOCK_BYTES[form - Q4_0]
    b = weight.reshape((rows, weight.shape[1] // size, size)).astype(ms.int32)  # (rows, blocks, bytes)
    d = _half(b, 0)
    if form == Q4_0:
        return (ops.concat(_nibbles(b[:, :, 2:18]), -1) - 8).astype(ms.float32) * d
    if form == Q4_1:
        return ops.concat(_nibbles(b[:, :, 4:20]), -1).astype(ms.float32) * d + _half(b, 2)
    if form == Q8_0:
        return _signed(b[:, :, 2:34]).astype(ms.float32) * d
    if form == Q5_0:
        return (_with_fifth(b[:, :, 6:22], b[:, :, 2:6]) - 16).astype(ms.float32) * d
    if form == Q5_1:
        return _with_fifth(b[:, :, 8:24], b[:, :, 4:8]).astype(ms.float32) * d + _half(b, 2)
    if form == Q6_K:
        return _six_bits(b)
    return _with_minima(form, b, d)


def _with_fifth(q, bits):
    """Values 0...31 of blocks of 32: q (rows, blocks, 16) nibbles, bits (rows, blocks, 4)."""
    fifth = _remainder(_divided(ops.expand_dims(bits, -1), _BITS), 2)  # (rows, blocks, 4, 8)
    return ops.concat(_nibbles(q), -1) + 16 * fifth.reshape((q.shape[0], q.shape[1], 32))


def _with_minima(form, b, d):
    """q4_k and q5_k: (rows, blocks, 8, 32) float32."""
    rows, blocks = b.shape[0], b.shape[1]
    first, second, third = b[:, :, 4:8], b[:, :, 8:12], b[:, :, 12:16]
    low, high = _nibbles(third)
    scale = ops.concat((_remainder(first, 64), low + 16 * _divided(first, 64)), -1)  # (rows, blocks, 8)
    least = ops.concat((_remainder(second, 64), high + 16 * _divided(second, 64)), -1)
    at = 16 if form == Q4_K else 48
    q = ops.stack(_nibbles(b[:, :, at:at + 128].reshape((rows, blocks, 4, 32))), 3).reshape((rows, blocks, 8, 32))
    if form == Q5_K:
        fifth = _divided(ops.expand_dims(b[:, :, 16:48], 2), _BITS.reshape((8, 1)))  # (rows, blocks, 8, 32)
        q = q + 16 * _remainder(fifth, 2)
    scale = d * scale.astype(ms.float32)
    least = _half(b, 2) * least.astype(ms.float32)
    return ops.expand_dims(scale, -1) * q.astype(ms.float32) - ops.expand_dims(least, -1)


def _six_bits(b):
    """q6_k: (rows, blocks, 16, 16) float32."""
    rows, blocks = b.shape[0], b.shape[1]
    low, high = _nibbles(b[:, :, 0:128].reshape((rows, blocks, 2, 2, 32)))
    twos = b[:, :, 128:192].reshape((rows, blocks, 2, 1, 32))
    twos = _remainder(_divided(twos, Tensor(np.array([[1], [4], [16], [64]], np.int32))), 4)  # (rows, blocks, 2, 4, 32)
    q = (ops.concat((low, high), 3) + 16 * twos - 32).reshape((rows, blocks, 16, 16))
    scale = _half(b, 208) * _signed(b[:, :, 192:208]).astype(ms.float32)
    return q.astype(ms.float32) * ops.expand_dims(scale, -1)
