"""Attention of whole sequences with rotary positions and grouped queries, without a cache: the form for training.

Rotary embedding (RoFormer, arXiv 2104.09864) in the layout of Hugging Face checkpoints: a head's vector with the halves
x1 and x2 becomes ``(x1 cos - x2 sin, x2 cos + x1 sin)``. Query head h reads key/value head ``h // (heads / kv_heads)``
(grouped-query attention, arXiv 2305.13245).
"""

from __future__ import annotations

import math

import mindspore as ms
from mindspore import Tensor, ops

from colora_ms.kernels import bound
from colora_ms.kernels.activation import soft_cap
from colora_ms.kernels.aot import custom
from colora_ms.kernels.registry import operation
from colora_ms.kernels.shapes import element_type, require, require_dtype, require_shape

# Low enough to vanish in a softmax, and finite, so that a row without any position has no NaN.
_MASKED = -1e30


def causal_attention(q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor, lengths: Tensor) -> Tensor:
    """Causal attention of whole sequences that start at position 0, without a cache: the form for training.

    Semantics: as :func:`colora_ms.kernels.paged_attention` from position 0 on, keys and values not rounded. A row may
    hold several sequences one after another (packing): each is as if it stood alone in a row, to the last bit on a CPU,
    with positions from 0.

    Args:
        q: (rows, T, heads * head_dim) float32, not rotated yet.
        k, v: (rows, T, kv_heads * head_dim) float32, not rotated yet.
        cos, sin: (max_len, head_dim / 2) float32, max_len >= T; with segments, at least the longest one.
        lengths: (rows,) int32, the real tokens of each row, 0..T (padding stands on the right); or (rows, segments)
            int32, the tokens of the sequences in each row from the left, their sum 0..T. A 0 is no sequence.

    Returns:
        (rows, T, heads * head_dim) float32; 0 at and behind the row's length.

    Raises:
        KernelError: a shape or dtype is wrong.
        RuntimeError: a length, or the sum of a row's lengths, is not in 0..T; a segment is longer than max_len.

    Gradients: q, k and v. The backward pass computes the scores again from the saved log-sum-exp of each query, so
    that memory grows with T and not with its square (FlashAttention-2, arXiv 2307.08691, algorithm 2).
    """
    return bound.causal_attention(q, k, v, cos, sin, lengths)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """The rotary embedding in built-in operators.

    Args:
        x: (..., head_dim).
        cos, sin: broadcastable to (..., head_dim / 2).

    Returns:
        x's shape.
    """
    half = x.shape[-1] // 2
    first, second = x[..., :half], x[..., half:]
    return ops.concat((first * cos - second * sin, second * cos + first * sin), -1)


def causal_attention_reference(q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor, lengths: Tensor,
                               window: int = 0, cap: float = 0.0, factor: float = 0.0) -> Tensor:
    """:func:`causal_attention` in built-in operators; differentiable, any device; lengths are not checked.

    Args:
        window, cap, factor: as for :func:`colora_ms.kernels.paged_attention`.
    """
    rows, tokens, _ = q.shape
    queries, keys, seen, lengths = _rotated(q, k, cos, sin, lengths, window)
    values = v.reshape((rows, tokens, -1, 2 * cos.shape[1])).transpose((0, 2, 1, 3))
    return _of_real_tokens(attend(queries, keys.transpose((0, 2, 1, 3)), values, seen, cap, factor), lengths)


def causal_attention_device(q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor, lengths: Tensor) -> Tensor:
    """:func:`causal_attention` with Ascend's own attention operator, in bfloat16 between float32 borders.

    Head sizes that are no multiple of 16 take :func:`causal_attention_reference`.
    """
    dim = 2 * cos.shape[1]
    if dim % 16 != 0:
        return causal_attention_reference(q, k, v, cos, sin, lengths)
    queries, keys, seen, real = _rotated(q, k, cos, sin, lengths)
    if lengths.ndim == 2:
        mask = ops.logical_not(seen).expand_dims(1).astype(ms.uint8)
    else:  # what a query may see are earlier tokens, and padding stands behind them
        mask = bound.builtin_causal_mask
    out = bound.builtin_causal(queries.reshape(q.shape).astype(ms.bfloat16), keys.reshape(k.shape).astype(ms.bfloat16),
                               v.astype(ms.bfloat16), mask, q.shape[2] // dim, 1 / math.sqrt(dim))
    return _of_real_tokens(out.astype(ms.float32), real)


def _rotated(q, k, cos, sin, lengths, window=0):
    """Queries and keys (rows, T, heads, head_dim), rotated; which keys each query sees, (rows or 1, T, T) bool; the
    real tokens of each row, (rows,)."""
    rows, tokens, _ = q.shape
    steps = ops.arange(tokens).astype(ms.int32)
    seen = steps.reshape((1, 1, tokens)) <= steps.reshape((1, tokens, 1))
    if window > 0:
        seen = ops.logical_and(seen, steps.reshape((1, 1, tokens)) > steps.reshape((1, tokens, 1)) - window)
    if lengths.ndim == 2:
        # A segment starts where those that are over by then end: what they sum up to.
        over = steps.reshape((1, tokens, 1)) >= ops.cumsum(lengths, 1).reshape((rows, 1, -1))
        begin = (over.astype(ms.int32) * lengths.reshape((rows, 1, -1))).sum(-1)  # (rows, T)
        seen = ops.logical_and(seen, steps.reshape((1, 1, tokens)) >= begin.reshape((rows, tokens, 1)))
        table = ops.minimum(steps.reshape((1, tokens)) - begin, cos.shape[0] - 1).reshape((-1,))
        cosines = ops.gather(cos, table, 0).reshape((rows, tokens, 1, -1))
        sines = ops.gather(sin, table, 0).reshape((rows, tokens, 1, -1))
        lengths = lengths.sum(1)
    else:
        cosines, sines = cos[:tokens].reshape((1, tokens, 1, -1)), sin[:tokens].reshape((1, tokens, 1, -1))
    dim = 2 * cos.shape[1]
    queries = rotate(q.reshape((rows, tokens, -1, dim)), cosines, sines)
    keys = rotate(k.reshape((rows, tokens, -1, dim)), cosines, sines)
    return queries, keys, seen, lengths


def _of_real_tokens(out, lengths):
    """``out`` (rows, T, ...) with 0 at and behind each row's length."""
    rows, tokens, _ = out.shape
    real = ops.arange(tokens).astype(ms.int32).reshape((1, tokens)) < lengths.reshape((rows, 1))
    return ops.where(real.reshape((rows, tokens, 1)), out, ops.zeros_like(out))


def attend(queries: Tensor, keys: Tensor, values: Tensor, seen: Tensor, cap: float = 0.0,
           factor: float = 0.0) -> Tensor:
    """Softmax attention in built-in operators.

    Args:
        queries: (rows, T, heads, dim).
        keys, values: (rows, kv_heads, positions, dim).
        seen: (rows or 1, T, positions) bool.
        cap: 0, or c of c * tanh(score / c); factor: on scores, 0: 1 / sqrt(dim).

    Returns:
        (rows, T, heads * dim).
    """
    rows, tokens, heads, dim = queries.shape
    kv_heads, positions = keys.shape[1], keys.shape[2]
    group = heads // kv_heads
    queries = queries.transpose((0, 2, 1, 3)).reshape((rows, kv_heads, group * tokens, dim))
    scores = ops.matmul(queries, keys.transpose((0, 1, 3, 2)))
    scores = scores * factor if factor > 0 else scores / math.sqrt(dim)
    if cap > 0:
        scores = soft_cap(scores, cap)
    scores = scores.reshape((rows, heads, tokens, positions))
    mask = seen.reshape((seen.shape[0], 1, tokens, positions))
    scores = ops.where(mask, scores, ops.full_like(scores, _MASKED))
    weights = ops.softmax(scores, -1).reshape((rows, kv_heads, group * tokens, positions))
    # What was never written may be anything, even NaN, and 0 * NaN is NaN.
    reached = mask.astype(ms.float32).sum((1, 2)).reshape((-1, 1, positions, 1)) > 0.5
    values = ops.where(reached, values, ops.zeros_like(values))
    out = ops.matmul(weights, values).reshape((rows, heads, tokens, dim))
    return out.transpose((0, 2, 1, 3)).reshape((rows, tokens, heads * dim))


# -- the CPU operators ------------------------------------------------------------------------------------------------

def _heads(name, q, k, v, cos, sin, dim):
    """The checks that both operators share."""
    require(len(q) == 3, name, "q", q, "(rows, tokens, heads * head_dim)")
    require(len(cos) == 2, name, "cos", cos, "(max_len, head_dim / 2)")
    require_shape(name, "sin", sin, cos)
    require(dim > 0 and dim % 2 == 0, name, "head_dim", dim, "an even number >= 2")
    require(len(k) == 3 and k[0] == q[0] and k[1] == q[1] and k[2] > 0 and k[2] % dim == 0, name, "k", k,
            f"({q[0]}, {q[1]}, a multiple of head_dim={dim})")
    require_shape(name, "v", v, k)
    require(q[2] > 0 and q[2] % k[2] == 0, name, "q", q, f"a last axis that is a multiple of k's {k[2]}")


def _causal_shapes(q, k, v, cos, sin, lengths):
    name = "causal_attention"
    require(len(cos) == 2, name, "cos", cos, "(max_len, head_dim / 2)")
    _heads(name, q, k, v, cos, sin, 2 * cos[1])
    if len(lengths) == 2:
        require(lengths[0] == q[0], name, "lengths", lengths, f"({q[0]}, segments)")
    else:
        require(cos[0] >= q[1], name, "cos", cos, f"at least the {q[1]} positions of q")
        require_shape(name, "lengths", lengths, q[:1])
    return q, [q[0], q[2] // (2 * cos[1]), q[1]]


def _dtype_function(name, arguments, outputs):
    def dtypes(*given):
        for argument, dtype in zip(arguments, given):
            require_dtype(name, argument, element_type(dtype), (ms.int32 if argument == "lengths" else ms.float32,))
        return (ms.float32,) * outputs if outputs > 1 else ms.float32
    return dtypes


def _causal_bprop(q, k, v, cos, sin, lengths, out, dout):
    dq, dk, dv = bound.causal_attention_grad(q, k, v, cos, sin, lengths, out[0], out[1], dout[0])
    return dq, dk, dv, ops.zeros_like(cos), ops.zeros_like(sin), ops.zeros_like(lengths)


# The second output is the log-sum-exp of each query's scores, (rows, heads, T).
def _causal_attention(q, k, v, cos, sin, lengths):
    return bound.causal_attention_operator(q, k, v, cos, sin, lengths)[0]


operation("causal_attention", reference=lambda: causal_attention_reference, cpu=lambda: _causal_attention,
          rehearsal=lambda: causal_attention_device, ascend=lambda: causal_attention_device)
operation("causal_attention_operator", cpu=lambda: custom(
    "causal_attention", _causal_shapes,
    _dtype_function("causal_attention", ("q", "k", "v", "cos", "sin", "lengths"), 2), _causal_bprop))
operation("causal_attention_grad", cpu=lambda: custom("causal_attention_grad", lambda q, k, v, *rest: (q, k, v),
                                                      lambda *dtypes: (ms.float32,) * 3))
