"""The two halves of a LoRA product, each row (or segment of tokens) with its own adapter."""

from __future__ import annotations

import mindspore as ms
from mindspore import Tensor, ops

from colora_ms.kernels import bound
from colora_ms.kernels.aot import ABSENT, custom
from colora_ms.kernels.registry import operation
from colora_ms.kernels.shapes import element_type, require, require_dtype, require_shape


def lora_shrink(x: Tensor, slots: Tensor, down: Tensor, scale: Tensor, segments: Tensor = ABSENT) -> Tensor:
    """The first half: from ``in`` columns to ``rank``.

    Semantics: ``v[r] = scale[s] * (x[r] @ down[s].T)`` with s = slots[r]; zeros where s = -1.

    Args:
        x: (rows, tokens, in) or (rows, in) float32; with ``segments``: (total_tokens, in).
        slots: int32, one per row; with ``segments``: one per segment. -1 = no adapter.
        down: (slots, rank, in) float32.
        scale: (slots,) float32.
        segments: (segments + 1,) int32 token offsets, ascending from 0 to total_tokens (a segment may be empty):
            segment i is the tokens ``segments[i]`` to ``segments[i + 1] - 1``. ``ABSENT``: one slot per row.

    Returns:
        x's shape with ``rank`` in place of ``in``, float32.

    Raises:
        KernelError: a shape or dtype is wrong (while the graph is compiled).
        RuntimeError: a slot number or a segment offset is out of range; nothing is written then.

    Gradients: none with the CPU operator; training goes through :func:`multi_lora_linear`.

    Source: BGMV (one slot per row) and SGMV (one per segment), Punica, arXiv 2310.18547, section 4.
    """
    return bound.lora_shrink(x, slots, down, scale, segments)


def lora_expand(v: Tensor, slots: Tensor, up: Tensor, y: Tensor, segments: Tensor = ABSENT) -> Tensor:
    """The second half: from ``rank`` columns to ``out``, added to y.

    Semantics: ``result[r] = y[r] + v[r] @ up[s].T`` with s = slots[r]; ``y[r]`` where s = -1.

    Args:
        v: (rows, tokens, rank) or (rows, rank) float32; with ``segments``: (total_tokens, rank).
        slots: int32, one per row; with ``segments``: one per segment. -1 = no adapter.
        up: (slots, out, rank) float32.
        y: v's shape with ``out`` in place of ``rank``, float32; not changed.
        segments: as in :func:`lora_shrink`.

    Returns:
        A new tensor of y's shape, float32.

    Raises:
        KernelError: a shape or dtype is wrong (while the graph is compiled).
        RuntimeError: a slot number or a segment offset is out of range; nothing is written then.

    Gradients: none with the CPU operator; training goes through :func:`multi_lora_linear`.

    Source: as :func:`lora_shrink`.
    """
    return bound.lora_expand(v, slots, up, y, segments)


def lora_shrink_reference(x: Tensor, slots: Tensor, down: Tensor, scale: Tensor, segments: Tensor = ABSENT) -> Tensor:
    """:func:`lora_shrink` in built-in operators (gather, then batched product); differentiable, any device."""
    slots = _slots_of_rows(x, slots, segments)
    chosen, used = _gathered(down, slots)
    v = _product(x, chosen) * _per_row(ops.gather(scale, ops.maximum(slots, 0), 0), x)
    return ops.where(_per_row(used, x), v, ops.zeros_like(v))


def lora_expand_reference(v: Tensor, slots: Tensor, up: Tensor, y: Tensor, segments: Tensor = ABSENT) -> Tensor:
    """:func:`lora_expand` in built-in operators; differentiable, any device."""
    slots = _slots_of_rows(v, slots, segments)
    chosen, used = _gathered(up, slots)
    return ops.where(_per_row(used, v), y + _product(v, chosen), y)


def low_rank_reference(x: Tensor, slots: Tensor, down: Tensor, up: Tensor, scale: Tensor) -> Tensor:
    """The whole low-rank part, ``scale * (x·downᵀ)·upᵀ`` of each row's slot and 0 where it is -1."""
    v = lora_shrink_reference(x, slots, down, scale)
    chosen, used = _gathered(up, slots)
    part = _product(v, chosen)
    return ops.where(_per_row(used, x), part, ops.zeros_like(part))


def _slots_of_rows(x, slots, segments):
    """One slot per row of x: with segments, the slot of the segment that holds the token."""
    if segments.ndim == 0:
        return slots
    token = ops.arange(x.shape[0]).astype(ms.int32).reshape((-1, 1))
    ended = (token >= segments[1:].reshape((1, -1))).astype(ms.int32)  # (tokens, segments): the segment ended before
    return ops.gather(slots, ended.sum(axis=1).astype(ms.int32), 0)


def _gathered(stack, slots):
    """stack[slots] with zeros for slot -1, so that what slot 0 holds reaches neither result nor gradient."""
    used = slots >= 0
    stack = stack.astype(ms.float32)  # the framework has no bfloat16 gather on a CPU
    chosen = ops.gather(stack, ops.maximum(slots, 0), 0)
    return ops.where(used.reshape((-1, 1, 1)), chosen, ops.zeros_like(chosen)), used


def _per_row(values, like):
    """(rows,) -> (rows, 1) or (rows, 1, 1), to broadcast over the rows of ``like``."""
    return values.reshape((-1, 1)) if like.ndim == 2 else values.reshape((-1, 1, 1))


def _product(x, matrices):
    """x[r] @ matrices[r].T for every row."""
    transposed = ops.transpose(matrices, (0, 2, 1))
    if x.ndim == 3:
        return ops.bmm(x, transposed)
    return ops.bmm(ops.expand_dims(x, 1), transposed).reshape((x.shape[0], matrices.shape[1]))


# -- the CPU operators ------------------------------------------------------------------------------------------------

def _check_rows(name, argument, x, slots, segments):
    if segments:
        require(len(x) == 2, name, argument, x, "(total_tokens, columns) when segments are given")
        require(len(segments) == 1 and segments[0] >= 1, name, "segments", segments, "(number of segments + 1,)")
        require_shape(name, "slots", slots, (segments[0] - 1,))
    else:
        require(len(x) in (2, 3), name, argument, x, "(rows, tokens, columns) or (rows, columns)")
        require_shape(name, "slots", slots, (x[0],))


def _shrink_shapes(x, slots, down, scale, segments):
    _check_rows("lora_shrink", "x", x, slots, segments)
    require(len(down) == 3 and down[2] == x[-1], "lora_shrink", "down", down, f"(slots, rank, {x[-1]})")
    require_shape("lora_shrink", "scale", scale, (down[0],))
    return list(x[:-1]) + [down[1]]


def _shrink_dtypes(x, slots, down, scale, segments):
    for name, kind in (("x", x), ("down", down), ("scale", scale)):
        require_dtype("lora_shrink", name, element_type(kind), (ms.float32,))
    require_dtype("lora_shrink", "slots", element_type(slots), (ms.int32,))
    return x


def _expand_shapes(v, slots, up, y, segments):
    _check_rows("lora_expand", "v", v, slots, segments)
    require(len(up) == 3 and up[2] == v[-1], "lora_expand", "up", up, f"(slots, out, {v[-1]})")
    require_shape("lora_expand", "y", y, list(v[:-1]) + [up[1]])
    return y


def _expand_dtypes(v, slots, up, y, segments):
    for name, kind in (("v", v), ("up", up), ("y", y)):
        require_dtype("lora_expand", name, element_type(kind), (ms.float32,))
    require_dtype("lora_expand", "slots", element_type(slots), (ms.int32,))
    return y


operation("lora_shrink", reference=lambda: lora_shrink_reference,
          cpu=lambda: custom("lora_shrink", _shrink_shapes, _shrink_dtypes))
operation("lora_expand", reference=lambda: lora_expand_reference,
          cpu=lambda: custom("lora_expand", _expand_shapes, _expand_dtypes))
