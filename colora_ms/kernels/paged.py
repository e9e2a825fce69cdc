"""Attention over a paged key/value cache, for flat batches of tokens (block tables as in PagedAttention, arXiv
2309.06180)."""

from __future__ import annotations

from typing import Any

import mindspore as ms
from mindspore import Tensor, ops

from colora_ms.kernels import bound
from colora_ms.kernels.aot import ABSENT, custom
from colora_ms.kernels.attention import attend, rotate
from colora_ms.kernels.registry import operation
from colora_ms.kernels.shapes import element_type, require, require_dtype, require_shape

#: Positions of a block.
BLOCK = 16

_NAME = "paged_attention"
_ARGUMENTS = ("q", "k", "v", "cos", "sin", "k_cache", "v_cache", "rows", "positions", "tables", "form")
_CACHES = (ms.float32, ms.bfloat16, ms.int8)


def block_numbers(head_dim: int, dtype: Any) -> int:
    """Numbers of a block of one head: keys or values of 16 positions; int8 ones end with 16 float32 scales, a
    position's largest magnitude over 127, as bytes."""
    return BLOCK * head_dim + (4 * BLOCK if dtype == ms.int8 else 0)


def paged_attention(q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor, k_cache: Tensor, v_cache: Tensor,
                    rows: Tensor, positions: Tensor, tables: Tensor, window: int = 0, cap: float = 0.0,
                    factor: float = 0.0, form: Tensor = ABSENT) -> Tensor:
    """Rotate q and k, append k and v to the cache in place, and attend over each row's own past.

    Semantics, for token t of row r = rows[t] at position p = positions[t]: its key (rotated) and value go to place p %
    16 of block tables[r, p // 16], and per query head ``y[t] = softmax(rotate(q[t], p) . K / sqrt(head_dim)) @ V`` over
    the positions 0 ... p of the row, in float32. All tokens of the call are appended first. A token's result does not
    depend on the other rows nor on how its row was cut into calls, to the last bit on a CPU.

    Args:
        q: (T, heads * head_dim) float32, not rotated yet.
        k, v: (T, kv_heads * head_dim) float32, not rotated yet.
        cos, sin: (positions, head_dim / 2) float32, from :func:`colora_ms.models.rope.rope_tables`.
        k_cache, v_cache: Parameters (blocks, kv_heads, :func:`block_numbers`) float32, bfloat16 or int8, written in
            place; a head's block holds keys as (head_dim, 16), values as (16, head_dim).
        rows: (T,) int32; the tokens of a row stand together; -1: a token that only fills, nothing of it is read or
            written.
        positions: (T,) int32, ascending by one within a row.
        tables: (rows, blocks of a row) int32, the blocks of each row's positions; behind those that it uses anything.
        window: 0, or how many positions a token sees, its own counted; cap: 0, or c of c * tanh(score / c); factor: on
            scores, 0: 1 / sqrt(head_dim). form: the three as (3,) float32, unless all are 0.

    Returns:
        (T, heads * head_dim) float32; 0 for tokens that only fill.

    Raises:
        KernelError: a shape or dtype is wrong.
        RuntimeError: a row, position or block is out of range, or a block that one row writes is used by another one.
            Then nothing was written.

    Gradients: refused (use :func:`colora_ms.kernels.causal_attention` for training).
    """
    if window == 0 and cap == 0 and factor == 0:
        return bound.paged_attention(q, k, v, cos, sin, k_cache, v_cache, rows, positions, tables)
    return bound.formed_attention(q, k, v, cos, sin, k_cache, v_cache, rows, positions, tables, window, cap, factor,
                                  form)


def paged_attention_reference(q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor, k_cache: Tensor,
                              v_cache: Tensor, rows: Tensor, positions: Tensor, tables: Tensor, window: int = 0,
                              cap: float = 0.0, factor: float = 0.0, form: Tensor = ABSENT) -> Tensor:
    """:func:`paged_attention` in built-in operators over float32 caches, any device; numbers are not checked."""
    tokens = q.shape[0]
    blocks, kv_heads, _ = k_cache.shape
    half = cos.shape[1]
    dim = 2 * half
    real = rows >= 0  # (T,)
    count = real.astype(ms.int32)
    table = ops.gather(tables, ops.maximum(rows, 0), 0)  # (T, blocks of a row)
    places = ops.maximum(table, 0)
    used = ops.minimum(positions, cos.shape[0] - 1) * count
    cosines = ops.gather(cos, used, 0).reshape((tokens, 1, half))
    sines = ops.gather(sin, used, 0).reshape((tokens, 1, half))
    queries = rotate(q.reshape((tokens, -1, dim)), cosines, sines)  # (T, heads, head_dim)
    keys = rotate(k.reshape((tokens, kv_heads, dim)), cosines, sines)
    block = ops.gather_elements(places, 1, (used // BLOCK).reshape((tokens, 1))).reshape((tokens,))
    # Tokens that only fill scatter zeros to place 0, so that sums there stay what the real token brought.
    where = ((block * BLOCK + used % BLOCK) * count).reshape((tokens, 1))
    written = ops.scatter_nd(where, real.astype(ms.float32), (blocks * BLOCK,)) > 0.5
    k_cache = ops.assign(k_cache, _by_dimension(_appended(_by_position(k_cache, dim, True), keys, where, real, written),
                                                k_cache.shape))
    v_cache = ops.assign(v_cache, _appended(_by_position(v_cache, dim, False), v.reshape((tokens, kv_heads, dim)),
                                            where,
                                            real, written)
                         .reshape((blocks, BLOCK, kv_heads, dim)).transpose((0, 2, 1, 3)).reshape(v_cache.shape))
    width = places.shape[1] * BLOCK
    place = ops.arange(width).astype(ms.int32).reshape((1, 1, width))
    seen = place <= positions.reshape((tokens, 1, 1))
    if window > 0:
        seen = ops.logical_and(seen, place > positions.reshape((tokens, 1, 1)) - window)
    spread = places.reshape((-1,))
    past_keys = ops.gather(_by_position(k_cache, dim, True).reshape((blocks, BLOCK, kv_heads, dim)), spread, 0)
    past_values = ops.gather(_by_position(v_cache, dim, False).reshape((blocks, BLOCK, kv_heads, dim)), spread, 0)
    shape = (tokens, width, kv_heads, dim)
    out = attend(queries.expand_dims(1), past_keys.reshape(shape).transpose((0, 2, 1, 3)),
                 past_values.reshape(shape).transpose((0, 2, 1, 3)), seen, cap, factor)  # (T, 1, heads * head_dim)
    out = out.reshape((tokens, -1))
    return ops.where(real.reshape((tokens, 1)), out, ops.zeros_like(out))


def _by_position(cache, dim, keys):
    """A cache as (blocks * 16, kv_heads, head_dim)."""
    blocks, kv_heads, _ = cache.shape
    if keys:
        cache = cache.reshape((blocks, kv_heads, dim, BLOCK)).transpose((0, 3, 1, 2))
    else:
        cache = cache.reshape((blocks, kv_heads, BLOCK, dim)).transpose((0, 2, 1, 3))
    return cache.reshape((blocks * BLOCK, kv_heads, dim))


def _by_dimension(keys, shape):
    """The keys of a cache of this shape, from those by position."""
    blocks, kv_heads, _ = shape
    return keys.reshape((blocks, BLOCK, kv_heads, -1)).transpose((0, 2, 3, 1)).reshape(shape)


def _appended(cache, new, where, real, written):
    """(positions, kv_heads, head_dim): the cache with ``new`` at the places ``where``; what else is there stays."""
    new = ops.where(real.reshape((-1, 1, 1)), new, ops.zeros_like(new))
    placed = ops.scatter_nd(where, new, cache.shape)
    return ops.where(written.reshape((-1, 1, 1)), placed, cache)


def _shapes(q, k, v, cos, sin, k_cache, v_cache, rows, positions, tables, form=(3,)):
    require(list(form) == [3], _NAME, "form", form, "(3,), window, cap and factor")
    require(len(q) == 2, _NAME, "q", q, "(tokens, heads * head_dim)")
    require(len(cos) == 2 and cos[1] > 0, _NAME, "cos", cos, "(positions, head_dim / 2)")
    require_shape(_NAME, "sin", sin, cos)
    dim = 2 * cos[1]
    require(len(k) == 2 and k[0] == q[0] and k[1] > 0 and k[1] % dim == 0, _NAME, "k", k,
            f"({q[0]}, a multiple of head_dim={dim})")
    require_shape(_NAME, "v", v, k)
    require(q[1] > 0 and q[1] % k[1] == 0, _NAME, "q", q, f"a last axis that is a multiple of k's {k[1]}")
    require(len(k_cache) == 3 and k_cache[1] * dim == k[1], _NAME, "k_cache", k_cache,
            f"(blocks, {k[1] // dim} heads as in k, numbers of a block)")
    require_shape(_NAME, "v_cache", v_cache, k_cache)
    for argument, shape in (("rows", rows), ("positions", positions)):
        require_shape(_NAME, argument, shape, q[:1])
    require(len(tables) == 2, _NAME, "tables", tables, "(rows, blocks of a row)")
    return q


def _dtypes(*dtypes):
    for argument, dtype in zip(_ARGUMENTS, dtypes):
        allowed = _CACHES if argument in ("k_cache", "v_cache") else (
            (ms.int32,) if argument in ("rows", "positions", "tables") else (ms.float32,))
        require_dtype(_NAME, argument, element_type(dtype), allowed)
    return ms.float32


def _no_gradient(*arguments):
    raise RuntimeError("paged_attention has no gradient; use causal_attention for training")


def _formed_attention(q, k, v, cos, sin, k_cache, v_cache, rows, positions, tables, window, cap, factor, form):
    return bound.formed_attention_operator(q, k, v, cos, sin, k_cache, v_cache, rows, positions, tables, form)


operation(_NAME, reference=lambda: paged_attention_reference,
          cpu=lambda: custom(_NAME, _shapes, _dtypes, _no_gradient))
operation("formed_attention", reference=lambda: paged_attention_reference, cpu=lambda: _formed_attention)
operation("formed_attention_operator", cpu=lambda: custom(_NAME, _shapes, _dtypes, _no_gradient))
