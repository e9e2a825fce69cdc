"""Dropout (Srivastava et al., JMLR 15, 2014) whose mask is a function of a key and the element's place."""

from __future__ import annotations

import numpy as np

import mindspore as ms
from mindspore import Tensor, ops

from colora_ms.kernels import bound
from colora_ms.kernels.aot import custom
from colora_ms.kernels.registry import operation
from colora_ms.kernels.shapes import element_type, require, require_dtype, require_shape

#: Bits of a random word that are compared with the rate.
_BITS = 24


def dropout(x: Tensor, key: Tensor, least: Tensor, scale: Tensor) -> Tensor:
    """Zero elements at random and scale the others, so that the mean stays.

    Semantics, with x seen as (rows, columns) and all numbers modulo 2^32::

        word(r, c) = mix(mix(r + mix(key[0])) ^ (c * 0x9e3779b9 + mix(key[1])))
        y[r, c]    = scale * x[r, c] if word(r, c) >> 8 >= least else 0

    ``mix`` is the finalizer of MurmurHash3. Equal keys give equal masks, on every device and for any number of threads.

    Args:
        x: (..., columns), any float dtype; the custom operator takes float32, others go through the reference.
        key: (2,) int32.
        least, scale: what :func:`dropout_constants` gives for the rate.

    Returns:
        x's shape and dtype. A dropped element is 0 whatever it was, NaN included.

    Raises:
        KernelError: a shape or dtype is wrong.

    Gradients: x.
    """
    return bound.dropout(x, key, least, scale)


def dropout_constants(rate: float) -> tuple:
    """(least (1,) int32, scale (1,) float32) of :func:`dropout` for a probability 0 <= rate < 1 of dropping."""
    return Tensor(np.array([round(rate * 2 ** _BITS)], np.int32)), Tensor(np.array([1 / (1 - rate)], np.float32))


def dropout_reference(x: Tensor, key: Tensor, least: Tensor, scale: Tensor) -> Tensor:
    """:func:`dropout` in built-in operators; differentiable, any device."""
    shape = x.shape
    x = x.reshape((-1, shape[-1]))
    start = _mix(key)
    row = _mix(ops.arange(x.shape[0]).astype(ms.int32).reshape((-1, 1)) + start[0])
    column = ops.arange(x.shape[1]).astype(ms.int32).reshape((1, -1)) * _signed(0x9e3779b9) + start[1]
    word = _mix(ops.bitwise_xor(row, column))
    kept = _right(word, 8) >= least
    return ops.where(kept, x * scale.astype(x.dtype), ops.zeros_like(x)).reshape(shape)


def _signed(number):
    return number - 2 ** 32 if number >= 2 ** 31 else number


def _right(word, bits):
    """Shift of an unsigned word that is kept as int32, whose own shift copies the sign."""
    return ops.bitwise_and(ops.bitwise_right_shift(word, bits), 2 ** (32 - bits) - 1)


def _mix(word):
    word = ops.bitwise_xor(word, _right(word, 16)) * _signed(0x85ebca6b)
    word = ops.bitwise_xor(word, _right(word, 13)) * _signed(0xc2b2ae35)
    return ops.bitwise_xor(word, _right(word, 16))


# -- the CPU operator -------------------------------------------------------------------------------------------------

def _shapes(x, key, least, scale):
    require(len(x) > 0, "dropout", "x", x, "at least one dimension")
    require_shape("dropout", "key", key, [2])
    require_shape("dropout", "least", least, [1])
    require_shape("dropout", "scale", scale, [1])
    return x


def _dtypes(x, key, least, scale):
    require_dtype("dropout", "x", element_type(x), (ms.float32,))
    require_dtype("dropout", "key", element_type(key), (ms.int32,))
    require_dtype("dropout", "least", element_type(least), (ms.int32,))
    require_dtype("dropout", "scale", element_type(scale), (ms.float32,))
    return ms.float32


def _bprop(x, key, least, scale, out, dout):
    return bound.dropout_operator(dout, key, least,
                                  scale), ops.zeros_like(key), ops.zeros_like(least), ops.zeros_like(scale)


def _dropout(x, key, least, scale):
    if x.dtype == ms.float32:
        return bound.dropout_operator(x, key, least, scale)
    return dropout_reference(x, key, least, scale)


operation("dropout", reference=lambda: dropout_reference, cpu=lambda: _dropout)
operation("dropout_operator", cpu=lambda: custom("dropout", _shapes, _dtypes, _bprop))
