"""The arithmetic of the formats of :mod:`colora_ms.models.formats`, in NumPy: values to stored arrays and back.

Every ``pack_*`` takes float32 (out, in) and the inputs that share a scale (None: its own choice), and returns the
stored array and its scale or None; every ``unpack_*`` is the inverse, with one rounding a value, as in the kernels.
"""

from __future__ import annotations

from typing import Optional

import numpy as np

from colora_ms.errors import ConfigError
from colora_ms.models.safetensors_file import bfloat16_to_float32, float32_to_bfloat16

#: Inputs that share one scale in int4, where they divide a row.
GROUP = 32

_TINY = np.float32(1e-12)

Packed = tuple[np.ndarray, Optional[np.ndarray]]


def pack_float32(weight: np.ndarray, group: Optional[int]) -> Packed:
    """As it is."""
    return weight, None


def unpack_float32(data: np.ndarray, scale: Optional[np.ndarray]) -> np.ndarray:
    """As it is."""
    return data


def pack_bfloat16(weight: np.ndarray, group: Optional[int]) -> Packed:
    """Rounded to nearest, ties to even."""
    return float32_to_bfloat16(weight), None


def unpack_bfloat16(data: np.ndarray, scale: Optional[np.ndarray]) -> np.ndarray:
    """Exact."""
    return bfloat16_to_float32(data)


def _blocks(weight, size):
    return weight.reshape(weight.shape[0], weight.shape[1] // size, size)  # (out, groups, inputs of one scale)


def pack_int8(weight: np.ndarray, group: Optional[int]) -> Packed:
    """The largest magnitude of a row, or of a group, maps to 127."""
    blocks = _blocks(weight, group or weight.shape[1])
    scale = np.maximum(np.abs(blocks).max(axis=2) / np.float32(127), _TINY).astype(np.float32)
    q = np.rint(blocks / scale[..., None]).clip(-127, 127).astype(np.int8).reshape(weight.shape)
    return q, scale[:, 0] if group is None else scale


def unpack_int8(data: np.ndarray, scale: Optional[np.ndarray]) -> np.ndarray:
    """Factor times integer."""
    return _scaled(data, scale)


def itself(q: np.ndarray) -> np.ndarray:
    """The integers, which are stored as they are."""
    return q


def pack_int4(weight: np.ndarray, group: Optional[int]) -> Packed:
    """The value of largest magnitude in a group maps to -8, as in llama.cpp's Q4_0: it keeps the whole signed range."""
    inner = weight.shape[1]
    blocks = _blocks(weight, group or (GROUP if inner % GROUP == 0 else inner))
    extreme = np.take_along_axis(blocks, np.abs(blocks).argmax(axis=2)[..., None], axis=2)[..., 0]
    scale = (extreme / np.float32(-8)).astype(np.float32)
    scale = np.where(np.abs(scale) < _TINY, _TINY, scale).astype(np.float32)
    q = np.rint(blocks / scale[..., None]).clip(-8, 7).astype(np.int8).reshape(weight.shape)
    return join_int4(q), scale


def unpack_int4(data: np.ndarray, scale: Optional[np.ndarray]) -> np.ndarray:
    """Factor times integer."""
    return _scaled(split_int4(data), scale)


def join_int4(q: np.ndarray) -> np.ndarray:
    """(out, in) integers in -8..7 -> (out, in/2) uint8."""
    biased = (q + 8).astype(np.uint8)
    return biased[:, 0::2] | (biased[:, 1::2] << 4)


def split_int4(packed: np.ndarray) -> np.ndarray:
    """The inverse of :func:`join_int4`: (out, in/2) uint8 -> (out, in) int8."""
    q = np.empty((packed.shape[0], packed.shape[1] * 2), np.int8)
    q[:, 0::2] = (packed & 15).astype(np.int8) - 8
    q[:, 1::2] = (packed >> 4).astype(np.int8) - 8
    return q


def _scaled(q, scale):
    """Integers (out, in), scale (out,) or (out, groups) -> float32 (out, in): one rounding a weight, as in kernels."""
    if scale.ndim == 1:
        return q.astype(np.float32) * scale[:, None]
    blocks = _blocks(q.astype(np.float32), q.shape[1] // scale.shape[1])
    return (blocks * scale[:, :, None]).reshape(q.shape)


def pack_float16(weight: np.ndarray, group: Optional[int]) -> Packed:
    """Rounded to nearest, ties to even; ConfigError where a finite value is too large."""
    with np.errstate(over="ignore"):
        half = weight.astype("<f2")
    if np.isinf(half).any() and not np.array_equal(np.isinf(half), np.isinf(weight)):
        raise ConfigError(f"float16 holds values up to 65504, but the weight of shape {weight.shape} has "
                          f"{np.abs(weight[np.isfinite(weight)]).max():g}")
    return half, None


def unpack_float16(data: np.ndarray, scale: Optional[np.ndarray]) -> np.ndarray:
    """Exact."""
    return data.astype(np.float32)


def pack_int4_zero(weight: np.ndarray, group: Optional[int]) -> Packed:
    """q in 0...15: the least and the largest value of a group, and 0, are in its range."""
    q, scale = _with_zeros(weight, group, 15)
    return q[:, 0::2] | q[:, 1::2] << 4, scale


def unpack_int4_zero(data: np.ndarray, scale: Optional[np.ndarray]) -> np.ndarray:
    """Factor times (integer less zero point)."""
    return _scaled_with_zeros(split_int4(data).astype(np.float32) + 8, scale)


def pack_int8_zero(weight: np.ndarray, group: Optional[int]) -> Packed:
    """As int4_zero with q in -128...127."""
    q, scale = _with_zeros(weight, group, 255)
    return (q.astype(np.int16) - 128).astype(np.int8), scale - np.array([0, 128], np.float32)


def unpack_int8_zero(data: np.ndarray, scale: Optional[np.ndarray]) -> np.ndarray:
    """Factor times (integer less zero point)."""
    return _scaled_with_zeros(data.astype(np.float32), scale)


def _with_zeros(weight, group, most):
    """(integers (out, in) uint8, factors and zero points (out, groups, 2))."""
    inner = weight.shape[1]
    blocks = _blocks(weight, group or (GROUP if inner % GROUP == 0 else inner))
    least, largest = np.minimum(blocks.min(2), 0), np.maximum(blocks.max(2), 0)
    scale = np.maximum((largest - least) / np.float32(most), _TINY).astype(np.float32)
    zero = np.rint(-least / scale).clip(0, most).astype(np.float32)
    q = (np.rint(blocks / scale[..., None]) + zero[..., None]).clip(0, most).astype(np.uint8)
    return q.reshape(weight.shape), np.stack([scale, zero], 2)


def _scaled_with_zeros(q, scale):
    blocks = _blocks(q, q.shape[1] // scale.shape[1]) - scale[:, :, 1:]
    return (blocks * scale[:, :, :1]).reshape(q.shape)
