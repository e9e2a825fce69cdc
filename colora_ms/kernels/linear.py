"""Linear layers whose rows may each use another adapter: one pass over the base weight for all rows."""

import mindspore as ms
from mindspore import ops

from colora_ms.kernels import ascend, bound
from colora_ms.kernels.aot import ABSENT, custom
from colora_ms.kernels.lora import low_rank_reference
from colora_ms.kernels.registry import operation
from colora_ms.kernels.shapes import element_type, require, require_dtype, require_shape

#: Tensors that describe one linear: weight, weight_scale, bias, down, up, scale.
OPERANDS = 6
#: Most linears that one call may fuse.
MOST_LINEARS = 4

_WEIGHT_DTYPES = (ms.float32, ms.bfloat16, ms.int8, ms.uint8)


def multi_lora_linear(x, slots, *operands):
    """One to four linear layers on the same input, each row with its own LoRA adapter or none.

    Semantics, for every linear and row r with s = slots[r]:
    ``y[r] = x[r] @ W.T + bias + (scale[s] * (x[r] @ down[s].T)) @ up[s].T``; the last term is skipped where s = -1 (what
    an unused adapter holds, NaN included, never reaches a result). Sums are float32; a row's result is bit-identical
    whatever other rows are in the call and however many tokens it has.

    Args:
        x: (rows, tokens, in) or (rows, in) float32.
        slots: (rows,) int32, -1 or an adapter number; one slot holds for all tokens of a row. ``ABSENT`` = all -1.
        operands: six tensors per linear, ``ABSENT`` for what is not there:
            weight (out, in) float32, bfloat16 or int8, or (out, in/2) uint8 = packed int4 (low nibble = even column,
            stored as value + 8);
            weight_scale float32 (out,) or (out, groups), only and always with int8 and int4;
            bias (out,) float32;
            down (slots, rank, in) and up (slots, out, rank), both float32 or both bfloat16; scale (slots,) float32.

    Returns:
        (rows, tokens, out) or (rows, out) float32; a tuple of these when more than one linear is given.

    Raises:
        KernelError: a shape or dtype is wrong (while the graph is compiled).
        RuntimeError: a slot number is below -1 or not below the number of slots; nothing is written then.

    Gradients: x, down and up. The base weight, its scale, the bias and the adapter scale are taken to be frozen and get
    zeros: to train those use :func:`multi_lora_linear_reference`. bfloat16 adapters have no gradients: KernelError.

    Source: LoRA, arXiv 2106.09685, eq. 3; rows of many adapters in one product: Punica, arXiv 2310.18547; int4 and int8
    as LR-QAT exports them, arXiv 2406.06385.
    """
    return bound.multi_lora_linear(x, slots, *operands)


def _with_device_source(x, slots, *operands):
    """:func:`multi_lora_linear` with the low-rank part by the Ascend C operator, forward only."""
    outputs = ()
    for i in range(len(operands) // OPERANDS):
        weight, weight_scale, bias, down, up, scale = operands[OPERANDS * i : OPERANDS * i + OPERANDS]
        base = (weight, weight_scale, bias, ABSENT, ABSENT, ABSENT)
        y = bound.base_linear(x, slots, *base)
        if down.ndim > 0 and slots.ndim > 0:
            y = y + ascend.low_rank(x, slots, down, up, scale)
        outputs = outputs + (y,)
    if len(outputs) == 1:
        return outputs[0]
    return outputs


def multi_lora_linear_reference(x, slots, *operands):
    """:func:`multi_lora_linear` in built-in operators; differentiable in everything, any device."""
    outputs = ()
    for i in range(len(operands) // OPERANDS):
        weight, weight_scale, bias, down, up, scale = operands[OPERANDS * i : OPERANDS * i + OPERANDS]
        w = dequantize(weight, weight_scale)
        flat = x.reshape((-1, x.shape[-1]))
        y = ops.matmul(flat, ops.transpose(w, (1, 0))).reshape(x.shape[:-1] + (w.shape[0],))
        if bias.ndim > 0:
            y = y + bias
        if down.ndim > 0 and slots.ndim > 0:
            y = y + low_rank_reference(x, slots, down, up, scale)
        outputs = outputs + (y,)
    if len(outputs) == 1:
        return outputs[0]
    return outputs


def dequantize(weight, weight_scale):
    """A weight in any of the formats of :func:`multi_lora_linear` as float32 (out, in), in built-in operators."""
    if weight.dtype == ms.uint8:
        pairs = weight.astype(ms.int32)
        high = ops.div(pairs, 16, rounding_mode="floor").astype(ms.int32)
        low = pairs - high * 16
        values = ops.stack((low, high), -1).reshape((weight.shape[0], weight.shape[1] * 2)).astype(ms.float32) - 8.0
    else:
        values = weight.astype(ms.float32)
    if weight_scale.ndim == 0:
        return values
    if weight_scale.ndim == 1:
        return values * weight_scale.reshape((-1, 1))
    out, columns = values.shape
    groups = weight_scale.shape[1]
    return (values.reshape((out, groups, columns // groups)) * ops.expand_dims(weight_scale, -1)).reshape((out, columns))


# -- the CPU operator -------------------------------------------------------------------------------------------------

_NAME = "multi_lora_linear"


def check_linear(i, columns, operands, name=_NAME):
    """Shapes of one linear -> number of outputs. ``operands`` are six shapes (lists of int); i, name: for messages."""
    weight, weight_scale, bias, down, up, scale = operands
    tag = f" (linear {i})" if i else ""
    require(len(weight) == 2, name, "weight" + tag, weight, "(out, in), or (out, in/2) for int4")
    out = weight[0]
    require(weight[1] in (columns, columns / 2), name, "weight" + tag, weight,
            f"{columns} columns like x ({columns / 2:g} for packed int4)")
    if weight_scale:
        require(len(weight_scale) in (1, 2) and weight_scale[0] == out, name, "weight_scale" + tag, weight_scale,
                f"({out},) or ({out}, groups)")
        if len(weight_scale) == 2:
            require(weight_scale[1] > 0 and columns % weight_scale[1] == 0, name, "weight_scale" + tag, weight_scale,
                    f"a number of groups that divides {columns}")
    if bias:
        require_shape(name, "bias" + tag, bias, (out,))
    given = [len(shape) > 0 for shape in (down, up, scale)]
    if any(given):
        for argument, shape, there in zip(("down", "up", "scale"), (down, up, scale), given):
            require(there, name, argument + tag, "absent", "given, since 'down', 'up' and 'scale' come together")
        require(len(down) == 3 and down[2] == columns, name, "down" + tag, down, f"(slots, rank, {columns})")
        require_shape(name, "up" + tag, up, (down[0], out, down[1]))
        require_shape(name, "scale" + tag, scale, (down[0],))
    return out


def _shapes(x, slots, *operands):
    n = len(operands) // OPERANDS
    require(1 <= n <= MOST_LINEARS and len(operands) == n * OPERANDS, _NAME, "number of operands", len(operands),
            "6, 12, 18 or 24 tensors (six per linear)")
    require(len(x) in (2, 3) and x[-1] > 0, _NAME, "x", x, "(rows, tokens, in) or (rows, in)")
    if slots:
        require_shape(_NAME, "slots", slots, (x[0],))
    outputs = tuple(
        list(x[:-1]) + [check_linear(i, x[-1], operands[OPERANDS * i : OPERANDS * (i + 1)])] for i in range(n)
    )
    return outputs if n > 1 else outputs[0]


def _dtypes(x, slots, *operands):
    kinds = [element_type(kind) for kind in (x, slots) + operands]
    require_dtype(_NAME, "x", kinds[0], (ms.float32,))
    require_dtype(_NAME, "slots", kinds[1], (ms.int32, ms.float32))
    for i in range(len(operands) // OPERANDS):
        weight, *others = kinds[2 + OPERANDS * i : 2 + OPERANDS * (i + 1)]
        require_dtype(_NAME, "weight", weight, _WEIGHT_DTYPES)
        check_operand_dtypes(_NAME, others)
    n = len(operands) // OPERANDS
    return (x,) * n if n > 1 else x


def check_operand_dtypes(op, kinds, scale=(ms.float32,)):
    """Types of weight_scale, bias, down, up and scale of one linear; ``scale``: those of the last one."""
    float32, pair = (ms.float32,), (ms.float32, ms.bfloat16)
    for kind, (name, allowed) in zip(kinds, (("weight_scale", float32), ("bias", float32), ("down", pair), ("up", pair),
                                             ("scale", scale))):
        require_dtype(op, name, kind, allowed)
    require(kinds[2] == kinds[3], op, "up", kinds[3], f"{kinds[2]} like 'down'")


def _grad_shapes(count, x, slots, *rest):
    outputs = [list(x)]
    for i in range(len(rest) // OPERANDS):
        outputs += [list(rest[OPERANDS * i + 3]), list(rest[OPERANDS * i + 4])]  # rank 0 where there is no adapter
    return tuple(outputs)


def _grad_dtypes(count, x, slots, *rest):
    for i in range(len(rest) // OPERANDS):
        for name, kind in zip(("down", "up"), rest[OPERANDS * i + 3:OPERANDS * i + 5]):
            require(element_type(kind) == ms.float32, _NAME, name, kind, "float32 adapters where gradients are wanted")
    return (x,) * (1 + 2 * (len(rest) // OPERANDS))


def _gradients(x, slots, operands, douts):
    """A gradient for every input, given one dout per linear; those of frozen inputs are zeros."""
    inputs = ()
    for i in range(len(douts)):
        weight, weight_scale, _, down, up, scale = operands[OPERANDS * i : OPERANDS * i + OPERANDS]
        inputs = inputs + (douts[i], weight, weight_scale, down, up, scale)
    gradients = bound.multi_lora_linear_grad(_COUNT[len(douts) - 1], x, slots, *inputs)
    result = (gradients[0], ops.zeros_like(slots))
    for i in range(len(douts)):
        weight, weight_scale, bias, _, _, scale = operands[OPERANDS * i : OPERANDS * i + OPERANDS]
        result = result + (ops.zeros_like(weight), ops.zeros_like(weight_scale), ops.zeros_like(bias),
                           gradients[1 + 2 * i], gradients[2 + 2 * i], ops.zeros_like(scale))
    return result


# MindSpore passes a gradient function its arguments one by one and does not fill a *args, hence one function per
# number of linears. Of each linear: w weight, s weight_scale, b bias, d down, u up, c adapter scale.
def _backward_1(x, slots, w1, s1, b1, d1, u1, c1, out, dout):
    return _gradients(x, slots, (w1, s1, b1, d1, u1, c1), (dout,))


def _backward_2(x, slots, w1, s1, b1, d1, u1, c1, w2, s2, b2, d2, u2, c2, out, dout):
    return _gradients(x, slots, (w1, s1, b1, d1, u1, c1, w2, s2, b2, d2, u2, c2), dout)


def _backward_3(x, slots, w1, s1, b1, d1, u1, c1, w2, s2, b2, d2, u2, c2, w3, s3, b3, d3, u3, c3, out, dout):
    return _gradients(x, slots, (w1, s1, b1, d1, u1, c1, w2, s2, b2, d2, u2, c2, w3, s3, b3, d3, u3, c3), dout)


def _backward_4(x, slots, w1, s1, b1, d1, u1, c1, w2, s2, b2, d2, u2, c2, w3, s3, b3, d3, u3, c3, w4, s4, b4, d4, u4,
                c4, out, dout):
    return _gradients(x, slots, (w1, s1, b1, d1, u1, c1, w2, s2, b2, d2, u2, c2, w3, s3, b3, d3, u3, c3, w4, s4, b4, d4,
                                 u4, c4), dout)


_COUNT = tuple(ms.Tensor([n], ms.int32) for n in range(1, MOST_LINEARS + 1))
_BACKWARD = (_backward_1, _backward_2, _backward_3, _backward_4)


def _forward_operators():
    operators = []
    for i, backward in enumerate(_BACKWARD):
        operator = custom(_NAME, _shapes, _dtypes, bprop=backward)
        # MindSpore keeps one gradient graph for all primitives whose attributes are equal.
        operator.add_prim_attr("linears", i + 1)
        operators.append(operator)
    return tuple(operators)


def _multi_lora_linear(x, slots, *operands):
    return bound.multi_lora_linear_operators[(len(operands) - 1) // OPERANDS](x, slots, *operands)


operation("multi_lora_linear", reference=lambda: multi_lora_linear_reference, cpu=lambda: _multi_lora_linear,
          emulator=lambda: _with_device_source, ascend=lambda: _with_device_source)
operation("base_linear", reference=lambda: multi_lora_linear_reference, cpu=lambda: _multi_lora_linear)
operation("multi_lora_linear_operators", cpu=_forward_operators)
operation("multi_lora_linear_grad", cpu=lambda: custom(_NAME + "_grad", _grad_shapes, _grad_dtypes))
