"""The blocks of GGUF files in NumPy: {name: (GGML's type, values of a block, its bytes)}, and their packing.

Layouts: llama.cpp's ``ggml-common.h``. The ``gguf`` package unpacks all and packs those of 32 values; the packing
of the blocks of 256 here rounds to nearest between the least and the largest value of each scale (no search for better
scales as in llama.cpp, whose files are better than these).
"""

from __future__ import annotations

import numpy as np

from colora_ms.errors import CheckpointError, ConfigError

#: Of the types that the kernels compute in.
BLOCKS = {"q4_0": ("Q4_0", 32, 18), "q4_1": ("Q4_1", 32, 20), "q5_0": ("Q5_0", 32, 22), "q5_1": ("Q5_1", 32, 24),
          "q8_0": ("Q8_0", 32, 34), "q4_k": ("Q4_K", 256, 144), "q5_k": ("Q5_K", 256, 176), "q6_k": ("Q6_K", 256, 210)}


def block_sizes(kind: str) -> tuple[int, int]:
    """(values, bytes) of a block of any GGML type."""
    from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

    return GGML_QUANT_SIZES[GGMLQuantizationType[kind]]


def unpack_type(kind: str, data: np.ndarray) -> np.ndarray:
    """Rows of blocks of a GGML type, uint8 (..., bytes) -> float32 (..., values).

    Raises:
        CheckpointError: the ``gguf`` package cannot unpack it.
    """
    from gguf.constants import GGMLQuantizationType
    from gguf.quants import dequantize

    try:
        with np.errstate(all="ignore"):  # blocks of a damaged file hold anything
            return np.ascontiguousarray(dequantize(data, GGMLQuantizationType[kind]), np.float32)
    except NotImplementedError:
        raise CheckpointError(f"its type is {kind}, which cannot be unpacked; use a Q4, Q5, Q6, Q8, F16 or F32 "
                              "file") from None


def pack_blocks(name: str, weight: np.ndarray) -> np.ndarray:
    """Float32 (rows, values) -> rows of blocks, uint8 (rows, bytes).

    Raises:
        ConfigError: values are too large for the float16 scales.
    """
    kind, values, size = BLOCKS[name]
    with np.errstate(over="ignore", divide="ignore", invalid="ignore"):
        if values == 256:
            blocks = weight.reshape(-1, 256)
            packed = _six(blocks) if name == "q6_k" else _with_minima(blocks, 31 if name == "q5_k" else 15)
            packed = packed.reshape(len(weight), weight.shape[1] // values * size)
        else:
            from gguf.constants import GGMLQuantizationType
            from gguf.quants import quantize

            packed = quantize(weight, GGMLQuantizationType[kind])
    largest = np.abs(weight).max(initial=0)
    if largest > 65504 and not np.isfinite(unpack_type(kind, packed)).all():
        raise ConfigError(f"the scales of {name} are float16, up to 65504, but the weight of shape {weight.shape} has "
                          f"values up to {largest:g}")
    return packed


def _half(values):
    """float16 rounded, as float32, and its bytes (blocks, 2)."""
    half = values.astype("<f2")
    return half.astype(np.float32), half.reshape(-1, 1).view(np.uint8)


def _divided(values, by):
    """Where ``by`` is 0 the values are all 0."""
    return np.divide(values, by, out=np.zeros(np.broadcast_shapes(values.shape, by.shape), np.float32), where=by != 0)


def _with_minima(blocks, most):
    """q4_k (``most`` = 15) and q5_k (31): w = d * scale * q - dmin * least, six bits a scale and a least."""
    parts = blocks.reshape(-1, 8, 32)
    least = np.maximum(-parts.min(2), 0)
    scale = (parts.max(2) + least) / np.float32(most)
    d, d_bytes = _half(scale.max(1) / np.float32(63))
    dmin, dmin_bytes = _half(least.max(1) / np.float32(63))
    sc = np.rint(_divided(scale, d[:, None])).clip(0, 63).astype(np.uint8)
    mn = np.rint(_divided(least, dmin[:, None])).clip(0, 63).astype(np.uint8)
    above = parts + (dmin[:, None] * mn)[..., None]
    q = np.rint(_divided(above, (d[:, None] * sc)[..., None])).clip(0, most).astype(np.uint8)
    six = np.concatenate([sc[:, :4] | sc[:, 4:] >> 4 << 6, mn[:, :4] | mn[:, 4:] >> 4 << 6,
                          sc[:, 4:] & 15 | mn[:, 4:] << 4], 1)
    fifth = (q >> 4 << np.arange(8, dtype=np.uint8)[:, None]).sum(1, dtype=np.uint8)  # bit j: of the j-th 32 values
    low = q & 15
    nibbles = (low[:, 0::2] | low[:, 1::2] << 4).reshape(-1, 128)
    return np.concatenate([d_bytes, dmin_bytes, six, *([fifth] if most > 15 else []), nibbles], 1)


def _six(blocks):
    """q6_k: w = d * scale * (q - 32), eight bits a scale of 16 values."""
    parts = blocks.reshape(-1, 16, 16)
    extreme = np.take_along_axis(parts, np.abs(parts).argmax(2)[..., None], 2)[..., 0]
    scale = extreme / np.float32(-32)
    d, d_bytes = _half(np.abs(scale).max(1) / np.float32(127))
    sc = np.rint(_divided(scale, d[:, None])).clip(-127, 127).astype(np.int8)
    q = np.rint(_divided(parts, (d[:, None] * sc)[..., None])).clip(-32, 31).astype(np.int8).reshape(-1, 2, 4, 32)
    q = (q + 32).astype(np.uint8)  # (blocks, half, quarter, value)
    low, two = q & 15, q >> 4
    nibbles = (low[:, :, :2] | low[:, :, 2:] << 4).reshape(-1, 128)
    twos = (two << np.array([0, 2, 4, 6], np.uint8)[:, None]).sum(2, dtype=np.uint8).reshape(-1, 64)
    return np.concatenate([nibbles, twos, sc.view(np.uint8), d_bytes], 1)
