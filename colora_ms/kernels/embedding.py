"""Rows of a table picked by token ids, from any of the weight formats of the linears."""

from __future__ import annotations

import mindspore as ms
from mindspore import Tensor, ops

from colora_ms.kernels import bound
from colora_ms.kernels.aot import custom
from colora_ms.kernels.registry import operation
from colora_ms.kernels.shapes import element_type, require, require_dtype


def embedding(ids: Tensor, weight: Tensor, weight_scale: Tensor) -> Tensor:
    """Row ``ids[i]`` of ``weight``, in float32.

    Semantics: ``y[i, :] = weight[ids[i], :] * weight_scale[ids[i], ...]`` (no scale for float32 and bfloat16).

    Args:
        ids: any shape, int32, each 0 <= id < vocab.
        weight: (vocab, hidden) float32, bfloat16 or int8, or (vocab, hidden / 2) uint8 for packed int4 (the low
            nibble is the even column, stored as value + 8).
        weight_scale: (vocab,) or (vocab, hidden / group) float32 for the integer formats, else ``ABSENT``.

    Returns:
        (*ids.shape, hidden) float32.

    Raises:
        KernelError: a shape or dtype is wrong.
        RuntimeError: an id is out of range (``KernelError`` text by :func:`colora_ms.kernels.aot.last_error`).

    Gradients: float32 weights only; the other formats are frozen and get zeros.
    """
    return bound.embedding(ids, weight, weight_scale)


def embedding_reference(ids: Tensor, weight: Tensor, weight_scale: Tensor) -> Tensor:
    """:func:`embedding` in built-in operators; differentiable for float weights, any device; ids are not checked."""
    flat = ids.reshape((-1,))
    # The framework has no bfloat16 gather on a CPU: the whole table is widened first.
    rows = ops.gather(weight.astype(ms.float32) if weight.dtype == ms.bfloat16 else weight, flat, 0)
    if weight.dtype == ms.uint8:
        value = rows.astype(ms.int32)
        high = value // 16
        low = value - 16 * high
        value = ops.stack((low, high), -1).astype(ms.float32) - 8.0
        values = value.reshape((flat.shape[0], -1))
    else:
        values = rows.astype(ms.float32)
    if weight.dtype == ms.uint8 or weight.dtype == ms.int8:
        scale = ops.gather(weight_scale, flat, 0).reshape((flat.shape[0], -1, 1))
        groups = scale.shape[1]
        values = (values.reshape((flat.shape[0], groups, -1)) * scale).reshape((flat.shape[0], -1))
    return values.reshape(ids.shape + (values.shape[-1],))


# -- the CPU operators ------------------------------------------------------------------------------------------------

def _shape_function(packing):
    def shapes(ids, weight, weight_scale):
        require(len(weight) == 2, "embedding", "weight", weight, "(vocab, hidden)")
        hidden = weight[1] * packing
        if len(weight_scale) > 0:
            require(len(weight_scale) <= 2 and weight_scale[0] == weight[0], "embedding", "weight_scale", weight_scale,
                    f"({weight[0]},) or ({weight[0]}, groups)")
        if len(weight_scale) == 2:
            require(weight_scale[1] > 0 and hidden % weight_scale[1] == 0, "embedding", "weight_scale", weight_scale,
                    f"a number of groups that divides hidden={hidden}")
        return list(ids) + [hidden]
    return shapes


def _dtypes(ids, weight, weight_scale):
    require_dtype("embedding", "ids", element_type(ids), (ms.int32,))
    require_dtype("embedding", "weight", element_type(weight), (ms.float32, ms.bfloat16, ms.int8, ms.uint8))
    require_dtype("embedding", "weight_scale", element_type(weight_scale), (ms.float32,))
    return ms.float32


def _bprop(ids, weight, weight_scale, out, dout):
    # The weight's part is dropped by the compiler where the weight is frozen (every adapter method but full tuning).
    if weight.dtype == ms.float32:
        flat = dout.reshape((-1, weight.shape[1]))
        dweight = ops.unsorted_segment_sum(flat, ids.reshape((-1,)), weight.shape[0])
    else:
        dweight = ops.zeros_like(weight)
    return ops.zeros_like(ids), dweight, ops.zeros_like(weight_scale)


def _embedding(ids, weight, weight_scale):
    if weight.dtype == ms.uint8:
        return bound.embedding_packed(ids, weight, weight_scale)
    return bound.embedding_plain(ids, weight, weight_scale)


operation("embedding", reference=lambda: embedding_reference, cpu=lambda: _embedding)
operation("embedding_plain", cpu=lambda: custom("embedding", _shape_function(1), _dtypes, _bprop))
operation("embedding_packed", cpu=lambda: custom("embedding", _shape_function(2), _dtypes, _bprop))
