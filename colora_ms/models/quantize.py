"""Weight formats: float32, bfloat16, int8 (a scale a channel) and int4 (packed, a scale a group).

Integer weights are symmetric: ``w ~ scale * q``. int8 keeps q in -127..127 with one scale an output channel; int4 keeps
q in -8..7 with one scale for ``GROUP`` neighbouring inputs (or one a channel where the group does not divide them) and
packs two columns into a byte: the low nibble is the even column, stored as q + 8.
"""

import numpy as np

import mindspore as ms
from mindspore import Tensor

from colora_ms.errors import ConfigError, near

#: Inputs that share one scale in the int4 format.
GROUP = 32

WEIGHT_FORMATS = ("float32", "bfloat16", "int8", "int4")

_TINY = np.float32(1e-12)


def check_format(name):
    """Return ``name`` if it is a weight format; otherwise raise ConfigError."""
    if name not in WEIGHT_FORMATS:
        raise ConfigError(f"weight format {name!r} is not known; use one of {', '.join(WEIGHT_FORMATS)}."
                          + near(name, WEIGHT_FORMATS))
    return name


def round_to_int8(weight):
    """Round-to-nearest int8. weight: (out, in) float32 -> q (out, in) int8, scale (out,) float32."""
    scale = np.maximum(np.abs(weight).max(axis=1) / np.float32(127), _TINY).astype(np.float32)
    return np.rint(weight / scale[:, None]).clip(-127, 127).astype(np.int8), scale


def round_to_int4(weight, group=GROUP):
    """Round-to-nearest int4. weight: (out, in) float32, ``in`` even -> packed (out, in/2) uint8, scale (out, in/group).

    The value of largest magnitude in a group maps to -8, as in llama.cpp's Q4_0: it keeps the whole signed range.
    """
    out, inner = weight.shape
    if inner % 2:
        raise ConfigError(f"int4 packs two columns into a byte, but the weight of shape {weight.shape} has an odd last axis")
    size = group if inner % group == 0 else inner
    blocks = weight.reshape(out, inner // size, size)
    extreme = np.take_along_axis(blocks, np.abs(blocks).argmax(axis=2)[..., None], axis=2)[..., 0]
    scale = (extreme / np.float32(-8)).astype(np.float32)
    scale = np.where(np.abs(scale) < _TINY, _TINY, scale).astype(np.float32)
    q = np.rint(blocks / scale[..., None]).clip(-8, 7).astype(np.int8).reshape(out, inner)
    return pack_int4(q), scale


def pack_int4(q):
    """(out, in) integers in -8..7 -> (out, in/2) uint8."""
    biased = (q + 8).astype(np.uint8)
    return biased[:, 0::2] | (biased[:, 1::2] << 4)


def unpack_int4(packed):
    """The inverse of :func:`pack_int4`: (out, in/2) uint8 -> (out, in) int8."""
    q = np.empty((packed.shape[0], packed.shape[1] * 2), np.int8)
    q[:, 0::2] = (packed & 15).astype(np.int8) - 8
    q[:, 1::2] = (packed >> 4).astype(np.int8) - 8
    return q


def dequantize(q, scale):
    """Integers (out, in) and scale (out,) or (out, in/group) -> float32 (out, in)."""
    if scale.ndim == 1:
        return q.astype(np.float32) * scale[:, None]
    out, inner = q.shape
    blocks = q.astype(np.float32).reshape(out, scale.shape[1], inner // scale.shape[1])
    return (blocks * scale[:, :, None]).reshape(out, inner)


def to_format(weight, weight_format):
    """A float32 NumPy matrix in one of the weight formats.

    Returns:
        (weight tensor, scale tensor or None), as :class:`colora_ms.models.layers.Linear` takes them.
    """
    check_format(weight_format)
    weight = np.ascontiguousarray(weight, np.float32)
    if weight_format == "float32":
        return Tensor(weight), None
    if weight_format == "bfloat16":
        return Tensor(weight).astype(ms.bfloat16), None
    q, scale = round_to_int8(weight) if weight_format == "int8" else round_to_int4(weight)
    return Tensor(q), Tensor(scale)
