"""What Ascend's built-in operators ask of shapes, dtypes and attributes, checked while a rehearsal's graph is compiled.

One function an operator: it takes an :class:`Argument` for each argument of the stand-in and returns its outputs as
(shape, dtype). The contracts are those of :mod:`colora_ms.kernels.ascend_builtin`; sources: CANN's operator documents
for Atlas A2 and A3, the inference functions of MindSpore 2.9, the calls of mindformers 1.9.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import mindspore as ms

from colora_ms.kernels.shapes import element_type, require, require_dtype, require_shape

HALF = (ms.float16, ms.bfloat16)
FLOATS = (*HALF, ms.float32)

#: Block sizes that the paged operators take.
BLOCKS = (16, 32, 64, 128)

#: PagedAttention's largest head_dim and largest block * head_dim, and rows of a call.
MOST_DIM, MOST_BLOCK_DIM, MOST_ROWS = 256, 128 * 128, 8192

#: Query heads that FlashAttentionScore takes; groups and last axis of GroupedMatmul.
MOST_HEADS, MOST_GROUPS, MOST_AXIS = 256, 1024, 65535

#: Experts that MoeGatingTopKSoftmax takes of a row, and experts of a token of MoeTokenUnpermute.
MOST_TOP, MOST_CHOSEN = 1024, 512

#: Largest head_dim in training.
MOST_TRAINING_DIM = 512


class Argument(NamedTuple):
    """One argument of a call: its shape (a list), dtype, and value where it is a constant of the graph, else None."""

    shape: list[int]
    dtype: Any
    value: Any


Outputs = list[tuple[list[int], Any]]


def argument(record: dict) -> Argument:
    """An :class:`Argument` from what MindSpore hands to ``__infer__``."""
    return Argument(list(record["shape"]), element_type(record["dtype"]), record["value"])


def _bytes(dtype):
    return 4 if dtype == ms.float32 else 2


def _one_dtype(name, **arguments):
    first = next(iter(arguments.values()))
    for label, given in arguments.items():
        require_dtype(name, label, given.dtype, (first.dtype,))


def _caches(name, key_cache, value_cache, dtype):
    require(len(key_cache.shape) == 4, name, "key_cache", key_cache.shape, "(blocks, block, kv_heads, head_dim)")
    require_shape(name, "value_cache", value_cache.shape, key_cache.shape)
    for label, cache in (("key_cache", key_cache), ("value_cache", value_cache)):
        require_dtype(name, label, cache.dtype, HALF)
        require_dtype(name, label, cache.dtype, (dtype,))
    require(key_cache.shape[1] in BLOCKS, name, "block size", key_cache.shape[1], "16, 32, 64 or 128")


def _rms_norm(x: Argument, gamma: Argument, eps: Argument) -> Outputs:
    require_dtype("RmsNorm", "x", x.dtype, FLOATS)
    require_dtype("RmsNorm", "gamma", gamma.dtype, (x.dtype, ms.float32))
    require_shape("RmsNorm", "gamma", gamma.shape, x.shape[-1:])
    return [(x.shape, x.dtype), (x.shape[:-1] + [1], ms.float32)]


def _add_rms_norm(x1: Argument, x2: Argument, gamma: Argument, eps: Argument) -> Outputs:
    require_dtype("AddRmsNorm", "x1", x1.dtype, FLOATS)
    _one_dtype("AddRmsNorm", x1=x1, x2=x2, gamma=gamma)
    require_shape("AddRmsNorm", "x2", x2.shape, x1.shape)
    require_shape("AddRmsNorm", "gamma", gamma.shape, x1.shape[-1:])
    return [(x1.shape, x1.dtype), (x1.shape[:-1] + [1], ms.float32), (x1.shape, x1.dtype)]


def _rotary(query: Argument, key: Argument, cos: Argument, sin: Argument, lengths: Argument,
            cos_format: Argument) -> Outputs:
    name = "ApplyRotaryPosEmb"
    require_dtype(name, "query", query.dtype, HALF)
    _one_dtype(name, query=query, key=key, cos=cos, sin=sin)
    require_dtype(name, "position_ids", lengths.dtype, (ms.int32,))
    require(len(query.shape) == 2, name, "query", query.shape, "(tokens, heads * head_dim)")
    tokens = query.shape[0]
    require(len(cos.shape) == 2 and cos.shape[0] == tokens, name, "cos", cos.shape, f"({tokens}, head_dim)")
    require_shape(name, "sin", sin.shape, cos.shape)
    dim = cos.shape[1]
    for label, given in (("query", query), ("key", key)):
        require(len(given.shape) == 2 and given.shape[0] == tokens and given.shape[1] % dim == 0, name, label,
                given.shape, f"({tokens}, a multiple of head_dim {dim})")
        require(given.shape[1] * _bytes(given.dtype) % 32 == 0, name, label, given.shape,
                "a last axis of a multiple of 32 bytes")
    require(dim % 32 == 0 and dim <= MOST_DIM, name, "head_dim", dim, "a multiple of 32 up to 256")
    return [(query.shape, query.dtype), (key.shape, key.dtype)]


def _reshape_and_cache(key: Argument, value: Argument, key_cache: Argument, value_cache: Argument,
                       slots: Argument) -> Outputs:
    name = "ReshapeAndCache"
    require_dtype(name, "key", key.dtype, HALF)
    _one_dtype(name, key=key, value=value)
    _caches(name, key_cache, value_cache, key.dtype)
    require_dtype(name, "slot_mapping", slots.dtype, (ms.int32,))
    require(len(slots.shape) == 1, name, "slot_mapping", slots.shape, "(tokens,)")
    hidden = key_cache.shape[2] * key_cache.shape[3]
    require(len(key.shape) == 3 and 1 in key.shape[:2] and key.shape[0] * key.shape[1] == slots.shape[0]
            and key.shape[2] == hidden, name, "key", key.shape,
            f"(1, {slots.shape[0]}, {hidden}) or ({slots.shape[0]}, 1, {hidden})")
    require_shape(name, "value", value.shape, key.shape)
    return [(key.shape, key.dtype)]


def _given(argument_):
    """Whether an optional tensor is there: ABSENT, float32 of rank 0, stands for one that is not."""
    return bool(argument_.shape) or argument_.dtype != ms.float32


def _paged_attention(query: Argument, key_cache: Argument, value_cache: Argument, tables: Argument, lengths: Argument,
                     mask: Argument, asked: Argument, heads: Argument, scale: Argument, kv_heads: Argument) -> Outputs:
    name = "PagedAttention"
    require_dtype(name, "query", query.dtype, HALF)
    _caches(name, key_cache, value_cache, query.dtype)
    _, block, held, dim = key_cache.shape
    require(heads.value is not None and kv_heads.value is not None and scale.value is not None, name, "head_num",
            heads.value, "a constant, as kv_head_num and scale are")
    require(kv_heads.value == held, name, "kv_head_num", kv_heads.value, f"{held}, the caches' heads")
    require(heads.value % held == 0, name, "head_num", heads.value, f"a multiple of kv_head_num {held}")
    require(dim <= MOST_DIM and dim % 16 == 0, name, "head_dim", dim, "a multiple of 16 up to 256")
    require(block * dim <= MOST_BLOCK_DIM, name, "block * head_dim", block * dim, f"at most {MOST_BLOCK_DIM}")
    require(len(query.shape) in (2, 3) and query.shape[-1] == heads.value * dim and
            (len(query.shape) == 2 or 1 in query.shape[:2]), name, "query", query.shape,
            f"(tokens, {heads.value * dim}), (1, tokens, ...) or (tokens, 1, ...)")
    require_dtype(name, "block_tables", tables.dtype, (ms.int32,))
    require_dtype(name, "context_lens", lengths.dtype, (ms.int32,))
    require(len(tables.shape) == 2 and 1 <= tables.shape[0] <= MOST_ROWS, name, "block_tables", tables.shape,
            f"(rows up to {MOST_ROWS}, blocks of a row)")
    require_shape(name, "context_lens", lengths.shape, tables.shape[:1])
    if _given(asked):
        require_dtype(name, "q_seq_lens", asked.dtype, (ms.int32,))
        require_shape(name, "q_seq_lens", asked.shape, tables.shape[:1])
    if _given(mask):
        require_dtype(name, "attn_mask", mask.dtype, (query.dtype,))
        require(len(mask.shape) == 2, name, "attn_mask", mask.shape, "(tokens, positions), or (1, 1)")
    return [(query.shape, query.dtype)]


def _flash_attention(query: Argument, key: Argument, value: Argument, mask: Argument, heads: Argument,
                     scale: Argument) -> Outputs:
    name = "FlashAttentionScore"
    require_dtype(name, "query", query.dtype, HALF)
    _one_dtype(name, query=query, key=key, value=value, attn_mask=mask)
    require(heads.value is not None and 1 <= heads.value <= MOST_HEADS, name, "head_num", heads.value,
            f"a constant from 1 to {MOST_HEADS}")
    require(len(query.shape) == 2 and query.shape[1] % heads.value == 0, name, "query", query.shape,
            f"(tokens, a multiple of {heads.value} heads)")
    dim = query.shape[1] // heads.value
    require(dim % 16 == 0 and dim <= MOST_DIM, name, "head_dim", dim, "a multiple of 16 up to 256")
    require(len(key.shape) == 2 and key.shape[0] == query.shape[0] and key.shape[1] % dim == 0
            and query.shape[1] % key.shape[1] == 0, name, "key", key.shape,
            f"({query.shape[0]}, heads that divide the query's, each of {dim})")
    require_shape(name, "value", value.shape, key.shape)
    require_shape(name, "attn_mask", mask.shape, (128, 128))
    return [(query.shape, query.dtype)]


def _causal(query: Argument, key: Argument, value: Argument, mask: Argument, heads: Argument,
            scale: Argument) -> Outputs:
    name = "FlashAttentionScore"
    require_dtype(name, "query", query.dtype, HALF)
    _one_dtype(name, query=query, key=key, value=value)
    require_dtype(name, "attn_mask", mask.dtype, (ms.uint8, ms.bool_))
    require(heads.value is not None and 1 <= heads.value <= MOST_HEADS, name, "head_num", heads.value,
            f"a constant from 1 to {MOST_HEADS}")
    require(len(query.shape) == 3 and query.shape[2] % heads.value == 0, name, "query", query.shape,
            f"(rows, tokens, a multiple of {heads.value} heads)")
    rows, tokens, hidden = query.shape
    dim = hidden // heads.value
    require(dim % 16 == 0 and dim <= MOST_TRAINING_DIM, name, "head_dim", dim, "a multiple of 16 up to 512")
    require(len(key.shape) == 3 and key.shape[:2] == query.shape[:2] and key.shape[2] % dim == 0
            and hidden % key.shape[2] == 0, name, "key", key.shape, f"({rows}, {tokens}, heads dividing the query's)")
    require_shape(name, "value", value.shape, key.shape)
    require(mask.shape in ([2048, 2048], [rows, 1, tokens, tokens]), name, "attn_mask", mask.shape,
            f"(2048, 2048), or ({rows}, 1, {tokens}, {tokens})")
    statistics = ([rows, heads.value, tokens, 8], ms.float32)
    return [statistics, statistics, ([1], query.dtype), (query.shape, query.dtype)]


def _causal_grad(query: Argument, key: Argument, value: Argument, dy: Argument, mask: Argument, top: Argument,
                 total: Argument, y: Argument, heads: Argument, scale: Argument) -> Outputs:
    _one_dtype("FlashAttentionScoreGrad", query=query, dy=dy, attention_in=y)
    return [(query.shape, query.dtype), (key.shape, key.dtype), (value.shape, value.dtype)]


def _swiglu(x: Argument, axis: Argument) -> Outputs:
    require_dtype("Swiglu", "input", x.dtype, FLOATS)
    require(x.shape[-1] % 2 == 0, "Swiglu", "input", x.shape, "an even last axis")
    return [(x.shape[:-1] + [x.shape[-1] // 2], x.dtype)]


def _matmul(x: Argument, weight: Argument) -> Outputs:
    return _two_axes(x, weight, "weight", 1, f"(out, {x.shape[-1]})")


def _product(x: Argument, matrix: Argument) -> Outputs:
    return _two_axes(x, matrix, "matrix", 0, f"({x.shape[-1]}, out)")


def _two_axes(x: Argument, other: Argument, name: str, inner: int, form: str) -> Outputs:
    """A product of x (tokens, in) with a matrix whose axis ``inner`` is x's last one."""
    require_dtype("MatMul", "x", x.dtype, FLOATS)
    _one_dtype("MatMul", x=x, **{name: other})
    require(len(x.shape) == 2, "MatMul", "x", x.shape, "(tokens, in)")
    require(len(other.shape) == 2 and other.shape[inner] == x.shape[1], "MatMul", name, other.shape, form)
    return [([x.shape[0], other.shape[1 - inner]], x.dtype)]


def _select(mask: Argument, x: Argument, other: Argument) -> Outputs:
    require_dtype("Select", "mask", mask.dtype, (ms.bool_,))
    require_dtype("Select", "x", x.dtype, FLOATS)
    _one_dtype("Select", x=x, other=other)
    require_shape("Select", "mask", mask.shape, x.shape)
    require_shape("Select", "other", other.shape, (1,))
    return [(x.shape, x.dtype)]


def _grouped_matmul(x: Argument, weight: Argument, groups: Argument, kind: Argument) -> Outputs:
    name = "GroupedMatmulV4"
    require_dtype(name, "x", x.dtype, FLOATS)
    _one_dtype(name, x=x, weight=weight)
    require_dtype(name, "group_list", groups.dtype, (ms.int64,))
    require(len(x.shape) == 2 and x.shape[1] <= MOST_AXIS, name, "x", x.shape, f"(rows, in up to {MOST_AXIS})")
    require(len(weight.shape) == 3 and weight.shape[0] <= MOST_GROUPS and weight.shape[1] == x.shape[1]
            and weight.shape[2] <= MOST_AXIS, name, "weight", weight.shape,
            f"(groups up to {MOST_GROUPS}, {x.shape[1]}, out up to {MOST_AXIS}), not transposed")
    require_shape(name, "group_list", groups.shape, weight.shape[:1])
    return [([x.shape[0], weight.shape[2]], x.dtype)]


def _top_experts(logits: Argument, count: Argument) -> Outputs:
    name = "MoeGatingTopKSoftmax"
    require_dtype(name, "x", logits.dtype, FLOATS)
    require(len(logits.shape) == 2, name, "x", logits.shape, "(tokens, experts)")
    most = min(logits.shape[1], MOST_TOP)
    require(count.value is not None and 1 <= count.value <= most, name, "k", count.value, f"a constant, 1 to {most}")
    shape = [logits.shape[0], count.value]
    return [(shape, logits.dtype), (shape, ms.int32), (shape, ms.int32)]


def _by_expert(x: Argument, experts: Argument, count: Argument) -> Outputs:
    name = "MoeInitRoutingV2"
    require_dtype(name, "x", x.dtype, FLOATS)
    require_dtype(name, "expert_idx", experts.dtype, (ms.int32,))
    require(len(x.shape) == 2, name, "x", x.shape, "(tokens, hidden)")
    require(len(experts.shape) == 2 and experts.shape[0] == x.shape[0], name, "expert_idx", experts.shape,
            f"({x.shape[0]}, experts of a token)")
    require(count.value is not None and count.value >= 1, name, "expert_num", count.value, "a constant, 1 at least")
    rows = experts.shape[0] * experts.shape[1]
    return [([rows, x.shape[1]], x.dtype), ([rows], ms.int32), ([count.value], ms.int32), ([count.value], ms.int32)]


def _from_experts(y: Argument, places: Argument, shares: Argument) -> Outputs:
    name = "MoeTokenUnpermute"
    require_dtype(name, "permuted_tokens", y.dtype, FLOATS)
    _one_dtype(name, permuted_tokens=y, probs=shares)
    require_dtype(name, "sorted_indices", places.dtype, (ms.int32,))
    require(len(shares.shape) == 2 and 1 <= shares.shape[1] <= MOST_CHOSEN, name, "probs", shares.shape,
            f"(tokens, experts of a token up to {MOST_CHOSEN})")
    rows = shares.shape[0] * shares.shape[1]
    require(len(y.shape) == 2 and y.shape[0] == rows, name, "permuted_tokens", y.shape, f"({rows}, hidden)")
    require_shape(name, "sorted_indices", places.shape, [rows])
    return [([shares.shape[0], y.shape[1]], y.dtype)]


def _scaled_rows(x: Argument, factors: Argument) -> Outputs:
    require_dtype("Mul", "x", x.dtype, FLOATS)
    _one_dtype("Mul", x=x, y=factors)
    require(len(x.shape) == 2, "Mul", "x", x.shape, "(rows, columns)")
    require_shape("Mul", "y", factors.shape, [x.shape[0], 1])
    return [(x.shape, x.dtype)]


def _quantized(x: Argument, weight: Argument, scale: Argument, group: Argument) -> Outputs:
    name = "WeightQuantBatchMatmul"
    require_dtype(name, "x", x.dtype, HALF)
    require_dtype(name, "weight", weight.dtype, (ms.int8, ms.qint4x2))
    _one_dtype(name, x=x, antiquant_scale=scale)
    require(len(x.shape) == 2, name, "x", x.shape, "(tokens, in)")
    width = x.shape[1]
    held = width // 2 if weight.dtype == ms.qint4x2 else width
    require(weight.dtype != ms.qint4x2 or width % 2 == 0, name, "x", x.shape, "an even last axis for int4")
    require(len(weight.shape) == 2 and weight.shape[1] == held, name, "weight", weight.shape, f"(out, {held})")
    out, size = weight.shape[0], group.value
    require(size == 0 or size is not None and 32 <= size < width and size % 32 == 0, name, "antiquant_group_size", size,
            f"0, or a multiple of 32 from 32 to {width - 1}")
    allowed = [[-(-width // size), out]] if size else [[out], [1, out]]
    require(scale.shape in allowed, name, "antiquant_scale", scale.shape,
            " or ".join(str(tuple(one)) for one in allowed))
    return [([x.shape[0], out], x.dtype)]


def _gather(table: Argument, tokens: Argument) -> Outputs:
    require_dtype("Gather", "table", table.dtype, (*FLOATS, ms.int32))
    require_dtype("Gather", "indices", tokens.dtype, (ms.int32,))
    return [(tokens.shape + table.shape[1:], table.dtype)]


def _add(a: Argument, b: Argument) -> Outputs:
    require_dtype("Add", "a", a.dtype, FLOATS)
    _one_dtype("Add", a=a, b=b)
    require(b.shape in (a.shape, a.shape[-1:]), "Add", "b", b.shape, f"{a.shape} or {a.shape[-1:]}")
    return [(a.shape, a.dtype)]


def _reshape(x: Argument, *axes: Argument) -> Outputs:
    shape = [axis.value for axis in axes]
    require(math.prod(shape) == math.prod(x.shape), "Reshape", "shape", shape, f"as many numbers as {tuple(x.shape)}")
    return [(shape, x.dtype)]


def _split(x: Argument, *sizes: Argument) -> Outputs:
    widths = [size.value for size in sizes]
    require(sum(widths) == x.shape[-1], "SplitWithSize", "split_size", widths, f"a sum of {x.shape[-1]}")
    return [(x.shape[:-1] + [width], x.dtype) for width in widths]


#: stand-in -> its check.
CHECKS: dict[str, Callable[..., Outputs]] = {
    "RmsNorm": _rms_norm, "AddRmsNorm": _add_rms_norm, "ApplyRotaryPosEmb": _rotary,
    "ReshapeAndCache": _reshape_and_cache, "PagedAttention": _paged_attention, "FlashAttentionScore": _flash_attention,
    "FlashAttentionScoreBSH": _causal, "FlashAttentionScoreGrad": _causal_grad, "Swiglu": _swiglu, "MatMul": _matmul,
    "Product": _product, "Select": _select, "GroupedMatmul": _grouped_matmul, "MoeGatingTopKSoftmax": _top_experts,
    "MoeInitRoutingV2": _by_expert, "MoeTokenUnpermute": _from_experts, "Mul": _scaled_rows,
    "WeightQuantBatchMatmul": _quantized, "Gather": _gather, "Add": _add, "Reshape": _reshape, "SplitWithSize": _split}
