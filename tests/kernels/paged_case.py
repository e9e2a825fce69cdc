"""Paged caches for tests: a row's positions laid out in blocks, and read back."""

import numpy as np

from call import from_bf16, to_bf16
from colora_ms.kernels.paged import BLOCK

#: numbers of a type's block, beside BLOCK * head_dim.
SCALES = {"float32": 0, "bfloat16": 0, "int8": 4 * BLOCK}


def empty_cache(blocks, kv_heads, dim, kind, fill=np.nan):
    """A cache as the operators take it, of numbers that must not be read (int8: scales of NaN)."""
    shape = (blocks, kv_heads, BLOCK * dim + SCALES[kind])
    if kind == "int8":
        cache = np.zeros(shape, np.int8)
        cache[..., BLOCK * dim:] = np.full((blocks, kv_heads, BLOCK), fill, np.float32).view(np.int8)
        return cache
    return to_bf16(np.full(shape, fill)) if kind == "bfloat16" else np.full(shape, fill, np.float32)


def numbers(cache):
    """The array of a cache."""
    return cache[0] if isinstance(cache, tuple) else cache


def rounded(x, kind):
    """x (..., head_dim) as a cache of this kind holds it, float32."""
    if kind == "bfloat16":
        return from_bf16(to_bf16(x))
    if kind == "int8":
        scale = (np.abs(x).max(-1, keepdims=True) / np.float32(127)).astype(np.float32)
        safe = np.where(scale > 0, scale, 1).astype(np.float32)
        return np.rint((x / safe).astype(np.float32)).astype(np.float32) * np.where(scale > 0, scale, 0)
    return x


def put(cache, kind, keys, block, at, head, x):
    """Write x (head_dim,) as one position."""
    dim = len(x)
    array = numbers(cache)[block, head]
    view = array[:BLOCK * dim].reshape(dim, BLOCK).T if keys else array[:BLOCK * dim].reshape(BLOCK, dim)
    if kind == "int8":
        scale = np.float32(np.abs(x).max() / np.float32(127))
        view[at] = np.rint(x / scale) if scale else 0
        array[BLOCK * dim:].view(np.float32)[at] = scale
    else:
        view[at] = to_bf16(x)[0] if kind == "bfloat16" else x


def get(cache, kind, keys, block, at, head, dim):
    """One position, (head_dim,) float32."""
    array = numbers(cache)[block, head]
    view = array[:BLOCK * dim].reshape(dim, BLOCK).T if keys else array[:BLOCK * dim].reshape(BLOCK, dim)
    if kind == "bfloat16":
        return from_bf16(np.ascontiguousarray(view[at]))
    x = view[at].astype(np.float32)
    return x * array[BLOCK * dim:].view(np.float32)[at] if kind == "int8" else x


def history(cache, kind, keys, table, count, head, dim):
    """The positions 0 .. count - 1 of a row, (count, head_dim) float32."""
    return np.stack([get(cache, kind, keys, table[p // BLOCK], p % BLOCK, head, dim) for p in range(count)])
