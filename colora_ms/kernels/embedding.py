"""Rows of a table picked by token ids, from any of the weight formats of the linears."""

from __future__ import annotations

import mindspore as ms
from mindspore import Tensor, ops

from colora_ms.kernels import bound
from colora_ms.kernels.aot import custom
from colora_ms.kernels.dequantize import dequantize
from colora_ms.kernels.linear_operator import check_linear_dtypes, check_matrix
from colora_ms.kernels.operands import flat_base, read_linear
from colora_ms.kernels.registry import operation
from colora_ms.kernels.shapes import element_type, require, require_dtype

_NAME = "embedding"


def embedding(ids: Tensor, base: tuple) -> Tensor:
    """Row ``ids[i]`` of a table, in float32.

    Args:
        ids: any shape, int32, each 0 <= id < vocab.
        base: the table (vocab, hidden) as a linear's base without a bias
            (:func:`colora_ms.kernels.operands.base_of`), in any format of :func:`colora_ms.kernels.multi_lora_linear`.

    Returns:
        (*ids.shape, hidden) float32.

    Raises:
        KernelError: a shape or dtype is wrong.
        RuntimeError: an id is out of range (``KernelError`` text by :func:`colora_ms.kernels.aot.last_error`).

    Gradients: float32 weights only; the other formats are frozen and get zeros.
    """
    return bound.embedding(ids, base)


def embedding_reference(ids: Tensor, base: tuple) -> Tensor:
    """:func:`embedding` in built-in operators; differentiable for float weights, any device; ids are not checked."""
    form, tensors, _ = base
    if len(tensors) > 2:
        raise ValueError("embedding takes one matrix whose columns lie as they are counted")
    flat = ids.reshape((-1,))
    weight = tensors[0]
    # The framework has no bfloat16 gather on a CPU: the whole table is widened first.
    rows = ops.gather(weight.astype(ms.float32) if weight.dtype == ms.bfloat16 else weight, flat, 0)
    if len(tensors) > 1:
        values = dequantize(form, rows, ops.gather(tensors[1], flat, 0))
    else:
        values = dequantize(form, rows)
    return values.reshape(ids.shape + (values.shape[-1],))


# -- the CPU operator -------------------------------------------------------------------------------------------------

def _places(shapes):
    places, end = read_linear(_NAME, shapes, 1)
    alone = end == len(shapes) and not places.adapter and set(places.base) <= {"weight", "weight_scale"}
    require(alone, _NAME, "base", places.form, "one matrix without a bias or an adapter")
    return places


def _shapes(*shapes):
    places = _places(shapes)
    scale = shapes[places.base["weight_scale"]] if "weight_scale" in places.base else None
    _, hidden = check_matrix(_NAME, places.form, shapes[places.base["weight"]], scale, -1)
    return list(shapes[0]) + [hidden]


def _dtypes(shapes, *dtypes):
    kinds = [element_type(kind) for kind in dtypes]
    require_dtype(_NAME, "ids", kinds[0], (ms.int32,))
    check_linear_dtypes(_NAME, _places(shapes), kinds)
    return ms.float32


# The weight's part is dropped by the compiler where the weight is frozen (every adapter method but full tuning).
def _bprop_plain(ids, tag, weight, out, dout):
    if weight.dtype == ms.float32:
        flat = dout.reshape((-1, weight.shape[1]))
        dweight = ops.unsorted_segment_sum(flat, ids.reshape((-1,)), weight.shape[0])
    else:
        dweight = ops.zeros_like(weight)
    return ops.zeros_like(ids), ops.zeros_like(tag), dweight


def _bprop_packed(ids, tag, weight, weight_scale, out, dout):
    return ops.zeros_like(ids), ops.zeros_like(tag), ops.zeros_like(weight), ops.zeros_like(weight_scale)


def _embedding(ids, base):
    flat = flat_base(base)
    if len(flat) == 2:
        return bound.embedding_plain(ids, *flat)
    return bound.embedding_packed(ids, *flat)


operation(_NAME, reference=lambda: embedding_reference, cpu=lambda: _embedding)
def _operator(bprop, tensors):
    # MindSpore keeps one gradient graph for all primitives whose attributes are equal.
    return custom(_NAME, _shapes, _dtypes, bprop, by_shapes=True).add_prim_attr("tensors", tensors)


operation("embedding_plain", cpu=lambda: _operator(_bprop_plain, 1))
operation("embedding_packed", cpu=lambda: _operator(_bprop_packed, 2))
