"""The CPU operator of :func:`colora_ms.kernels.multi_lora_linear`: its checks, its primitives and its gradient."""

from __future__ import annotations

import linecache
from collections.abc import Callable
from typing import Any, Optional

import mindspore as ms
from mindspore import ops

from colora_ms.kernels import bound
from colora_ms.kernels.aot import custom
from colora_ms.kernels.operands import (
    ADAPTER,
    FORMATS,
    LEAST_TENSORS,
    MOST_TENSORS,
    PACKED,
    WITH_ZEROS,
    Places,
    flat_linears,
    linears_of,
    read_linear,
    without_bias,
)
from colora_ms.kernels.shapes import element_type, require, require_dtype, require_shape

#: Most linears that one call may fuse.
MOST_LINEARS = 4

_NAME = "multi_lora_linear"
_WEIGHTS = {"float32": ms.float32, "bfloat16": ms.bfloat16, "float16": ms.float16, "int8": ms.int8,
            "int8_zero": ms.int8, "int8_zero_ordered": ms.int8}  # the others are bytes
_DENSE = (ms.float32, ms.bfloat16)


# -- checks ------------------------------------------------------------------------------------------------------------


def check_matrix(op: str, form: str, weight: list, scale: Optional[list], columns: int,
                 tag: str = "") -> tuple[int, int]:
    """Shapes of a matrix in a format -> (rows, columns).

    Args:
        op, tag: for messages; form: name of the format; weight, scale: shapes, None: the format has no scale; columns:
            that it must have, below 0: any.

    Raises:
        KernelError: one does not fit.
    """
    values, elements = PACKED.get(form, (1, 1))
    require(len(weight) == 2, op, "weight" + tag, weight, "(out, in), or (out, elements of a packed row)")
    require(weight[1] % elements == 0, op, "weight" + tag, weight,
            f"rows of whole blocks of {elements} bytes, which are {values} values of {form}")
    out, found = weight[0], weight[1] // elements * values
    stored = f" ({columns / values * elements:g} elements of {form})" if values > 1 else ""
    require(columns < 0 or found == columns, op, "weight" + tag, weight, f"{columns} columns like x{stored}")
    if scale is not None:
        pairs = form in WITH_ZEROS
        fits = len(scale) == 3 and scale[2] == 2 if pairs else len(scale) in (1, 2)
        require(fits and scale[0] == out, op, "weight_scale" + tag, scale,
                f"({out}, groups, 2)" if pairs else f"({out},) or ({out}, groups)")
        if len(scale) > 1:
            require(scale[1] > 0 and found % scale[1] == 0, op, "weight_scale" + tag, scale,
                    f"a number of groups that divides {found}")
    return out, found


def check_base(op: str, places: Places, shapes: tuple, columns: int, tag: str = "") -> int:
    """Shapes of a linear's base -> number of outputs.

    Args:
        op, tag: for messages; shapes: of all inputs; columns: of x, below 0: any.

    Raises:
        KernelError: one does not fit.
    """
    given = {name: shapes[place] for name, place in places.base.items()}
    if "weight" not in given:
        out = columns
        for argument in dict(FORMATS)[places.form]:
            factor = given[argument]
            require(len(factor) == 2 and factor[1] == out, op, argument + tag, factor, f"(outputs, {out})")
            out = factor[0]
    else:
        out, found = check_matrix(op, places.form, given["weight"], given.get("weight_scale"), columns, tag)
        if "order" in given:
            require_shape(op, "order" + tag, given["order"], (found,))
    if "bias" in given:
        require_shape(op, "bias" + tag, given["bias"], (out,))
    return out


def check_linear(op: str, places: Places, shapes: tuple, columns: int, tag: str = "") -> int:
    """:func:`check_base` and the shapes of the adapters -> number of outputs."""
    out = check_base(op, places, shapes, columns, tag)
    if places.adapter:
        down, up, scale = (shapes[places.adapter[name]] for name in ADAPTER)
        for argument, shape in zip(ADAPTER, (down, up, scale)):
            require(len(shape) > 0, op, argument + tag, "absent", "given, since 'down', 'up' and 'scale' come together")
        require(len(down) == 3 and down[2] == columns, op, "down" + tag, down, f"(slots, rank, {columns})")
        require_shape(op, "up" + tag, up, (down[0], out, down[1]))
        require_shape(op, "scale" + tag, scale, (down[0],))
    return out


def check_linear_dtypes(op: str, places: Places, kinds: tuple) -> None:
    """Types of a linear's tensors; kinds: of all inputs.

    Raises:
        KernelError: one is not of the types that its place may have.
    """
    given = places.of(kinds)
    for name, kind in given.items():
        if name == "weight":
            require_dtype(op, name, kind, (_WEIGHTS.get(places.form, ms.uint8),))
        elif name == "order":
            require_dtype(op, name, kind, (ms.int32,))
        else:
            dense = name in dict(FORMATS)[places.form] and name != "weight_scale" or name in ("down", "up")
            require_dtype(op, name, kind, _DENSE if dense else (ms.float32,))
    if places.adapter:
        require(given["down"] == given["up"], op, "up", given["up"], f"{given['down']} like 'down'")


def _linears(shapes, first=2, before=0):
    """The Places of all linears of a call from input ``first`` on, each behind ``before`` other tensors."""
    found, at = [], first
    while not found or at < len(shapes):
        places, at = read_linear(_NAME, shapes, at + before)
        found.append(places)
    return found


# -- forward ----------------------------------------------------------------------------------------------------------


def _shapes(*shapes):
    x, slots = shapes[:2]
    linears = _linears(shapes)
    require(len(linears) <= MOST_LINEARS, _NAME, "number of linears", len(linears), f"1 to {MOST_LINEARS}")
    require(len(x) in (2, 3) and x[-1] > 0, _NAME, "x", x, "(rows, tokens, in) or (rows, in)")
    if slots:
        require_shape(_NAME, "slots", slots, (x[0],))
    outputs = tuple(list(x[:-1]) + [check_linear(_NAME, places, shapes, x[-1], f" (linear {i})" if i else "")]
                    for i, places in enumerate(linears))
    return outputs if len(outputs) > 1 else outputs[0]


def _dtypes(shapes, *dtypes):
    kinds = [element_type(kind) for kind in dtypes]
    require_dtype(_NAME, "x", kinds[0], (ms.float32,))
    require_dtype(_NAME, "slots", kinds[1], (ms.int32, ms.float32))
    linears = _linears(shapes)
    for places in linears:
        check_linear_dtypes(_NAME, places, kinds)
    return (dtypes[0],) * len(linears) if len(linears) > 1 else dtypes[0]


def forward_operators() -> tuple:
    """The primitives: ``operators[linears - 1][tensors of all of them]``, None where no linears have so many."""
    table = []
    for linears in range(1, MOST_LINEARS + 1):
        row: list[Any] = [None] * (linears * MOST_TENSORS + 1)
        for tensors in range(linears * LEAST_TENSORS, len(row)):
            row[tensors] = custom(_NAME, _shapes, _dtypes, bprop=_backward(linears, tensors), by_shapes=True)
            # MindSpore keeps one gradient graph for all primitives whose attributes are equal.
            row[tensors].add_prim_attr("linears", linears).add_prim_attr("tensors", tensors)
        table.append(tuple(row))
    return tuple(table)


# -- gradient ---------------------------------------------------------------------------------------------------------


def _grad_places(shapes):
    return _linears(shapes, first=3, before=1)


def _grad_shapes(*shapes):
    outputs = [list(shapes[1])]
    for places in _grad_places(shapes):
        for name in ADAPTER[:2]:  # rank 0 where there is no adapter
            outputs.append(list(shapes[places.adapter[name]]) if places.adapter else [])
    return tuple(outputs)


def _grad_dtypes(shapes, *dtypes):
    linears = _grad_places(shapes)
    for places in linears:
        for name in ADAPTER[:2] if places.adapter else ():
            kind = dtypes[places.adapter[name]]
            require(element_type(kind) == ms.float32, _NAME, name, kind, "float32 adapters where gradients are wanted")
    return (dtypes[1],) * (1 + 2 * len(linears))


def gradient_operator() -> ops.Custom:
    """The primitive of the gradient: count, x, slots, then dy and the tensors of each linear -> dx, (ddown, dup) of
    each."""
    return custom(_NAME + "_grad", _grad_shapes, _grad_dtypes, by_shapes=True)


_COUNT = tuple(ms.Tensor([n], ms.int32) for n in range(1, MOST_LINEARS + 1))


def _gradients(x, slots, flat, douts):
    """A gradient for every input, given one dout a linear; those of frozen inputs are zeros."""
    linears = linears_of(flat)
    inputs = ()
    for i in range(len(douts)):
        base, adapter = linears[i]
        inputs = inputs + (douts[i],) + flat_linears(((without_bias(base), adapter),))
    gradients = bound.multi_lora_linear_grad(_COUNT[len(douts) - 1], x, slots, *inputs)
    result = (gradients[0], ops.zeros_like(slots))
    for i in range(len(douts)):
        base, adapter = linears[i]
        _, tensors, bias = base
        for frozen in flat_linears(((base, ()),)):
            result = result + (ops.zeros_like(frozen),)
        if len(adapter) > 0:
            result = result + (gradients[1 + 2 * i], gradients[2 + 2 * i], ops.zeros_like(adapter[2]))
    return result


def _backward(linears: int, tensors: int) -> Callable:
    """The gradient function of the primitive for so many linears with so many tensors together.

    MindSpore passes a gradient function its arguments one by one and does not fill a ``*args``, so there is one
    function for each number; and it reads their source, so this puts where ``inspect`` looks for it.
    """
    names = ", ".join(f"t{i}" for i in range(tensors))
    douts = "dout" if linears > 1 else "(dout,)"
    name = f"_backward_{linears}_{tensors}"
    source = f"def {name}(x, slots, {names}, out, dout):\n    return _gradients(x, slots, ({names}), {douts})\n"
    file = f"<{__name__} {name}>"
    linecache.cache[file] = (len(source), None, source.splitlines(True), file)
    exec(compile(source, file, "exec"), globals())
    return globals()[name]
