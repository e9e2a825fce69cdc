"""Linear layers whose rows may each use another adapter: one pass over the base weight for all rows."""

from __future__ import annotations

import mindspore as ms
from mindspore import Tensor, ops

from colora_ms.kernels import ascend, bound
from colora_ms.kernels.dequantize import dequantize
from colora_ms.kernels.linear_operator import forward_operators, gradient_operator
from colora_ms.kernels.lora import low_rank_reference
from colora_ms.kernels.operands import INT4_ZERO_ORDERED, INT8_ZERO_ORDERED, PRODUCT, flat_linears
from colora_ms.kernels.registry import operation


def multi_lora_linear(x: Tensor, slots: Tensor, *linears: tuple) -> Tensor | tuple[Tensor, ...]:
    """One to four linear layers on the same input, each row with its own LoRA adapter or none.

    Semantics, for every linear and row r with s = slots[r]:
    ``y[r] = x[r] @ W.T + bias + (scale[s] * (x[r] @ down[s].T)) @ up[s].T``; the last term is skipped where s = -1
    (what an unused adapter holds, NaN included, never reaches a result). Sums are float32; a row's result is
    bit-identical whatever other rows are in the call and however many tokens it has. W may be a product of small
    matrices; x then goes through them one after another, and W is never made.

    Args:
        x: (rows, tokens, in) or (rows, in) float32.
        slots: (rows,) int32, -1 or an adapter number; one slot holds for all tokens of a row. ``ABSENT`` = all -1.
        linears: each made by :func:`colora_ms.kernels.operands.linear_of` from a base and perhaps adapters.
            A base (``base_of``) is
            weight (out, in) float32, bfloat16, float16 or int8, (out, in/2) uint8 = packed int4 (low nibble = even
            column, stored as value + 8), or (out, bytes of a row) uint8 = blocks of a GGUF file;
            weight_scale float32 (out,) or (out, groups), only and always with int8 and int4; (out, groups, 2), factors
            and zero points, with int8_zero and int4_zero, and with their ordered forms, which have order (in,) int32 as
            well, a permutation: column k of the weight meets x[order[k]];
            bias (out,) float32 or ``ABSENT``;
            or a product (``product_of``) inner (r, in), core (r', r) or ``ABSENT``, outer (out, r'), each float32 or
            bfloat16, and bias.
            Adapters are down (slots, rank, in) and up (slots, out, rank), both float32 or both bfloat16; scale (slots,)
            float32.

    Returns:
        (rows, tokens, out) or (rows, out) float32; a tuple of these when more than one linear is given.

    Raises:
        KernelError: a shape or dtype is wrong (while the graph is compiled).
        RuntimeError: a slot number is below -1 or not below the number of slots; nothing is written then.

    Gradients: x, down and up. The base and the adapter scale are taken to be frozen and get zeros: to train those use
    :func:`multi_lora_linear_reference`. bfloat16 adapters have no gradients: KernelError.

    Source: LoRA, arXiv 2106.09685, eq. 3; rows of many adapters in one product: Punica, arXiv 2310.18547; int4 and int8
    as LR-QAT exports them, arXiv 2406.06385.
    """
    return bound.multi_lora_linear(x, slots, *linears)


def _with_device_source(x, slots, *linears):
    """:func:`multi_lora_linear` with the low-rank part by the Ascend C operator, forward only."""
    outputs = ()
    for base, adapter in linears:
        y = bound.base_linear(x, slots, (base, ()))
        if len(adapter) > 0 and slots.ndim > 0:
            y = y + ascend.low_rank(x, slots, *adapter)
        outputs = outputs + (y,)  # type: ignore[assignment]
    if len(outputs) == 1:
        return outputs[0]
    return outputs


def _with_device_source_or_gradient(x, slots, *linears):
    """Flat tokens of a step: the device's own operator. Whole rows, as training has them: built-in products, which
    run on the Cube and have gradients; our operator has none."""
    if x.ndim == 3:
        return multi_lora_linear_reference(x, slots, *linears)
    return _with_device_source(x, slots, *linears)


def multi_lora_linear_reference(x: Tensor, slots: Tensor, *linears: tuple) -> Tensor | tuple[Tensor, ...]:
    """:func:`multi_lora_linear` in built-in operators; differentiable in everything, any device."""
    outputs = ()
    for base, adapter in linears:
        y = base_reference(x, base)
        if len(adapter) > 0 and slots.ndim > 0:
            y = y + low_rank_reference(x, slots, *adapter)
        outputs = outputs + (y,)  # type: ignore[assignment]
    if len(outputs) == 1:
        return outputs[0]
    return outputs


def base_reference(x: Tensor, base: tuple) -> Tensor:
    """The base alone, in built-in operators: x (..., in) -> (..., out) float32."""
    form, tensors, bias = base
    y = x.reshape((-1, x.shape[-1]))  # (tokens, in)
    if form == INT4_ZERO_ORDERED or form == INT8_ZERO_ORDERED:
        y = ops.gather(y, tensors[2], 1)
        y = ops.matmul(y, ops.transpose(dequantize(form, tensors[0], tensors[1]), (1, 0)))  # (tokens, out)
    elif form < PRODUCT:
        y = ops.matmul(y, ops.transpose(dequantize(form, *tensors), (1, 0)))  # (tokens, out)
    else:
        for factor in tensors:
            y = ops.matmul(y, ops.transpose(factor.astype(ms.float32), (1, 0)))  # (tokens, rows of the factor)
    y = y.reshape(x.shape[:-1] + (y.shape[-1],))  # (..., out)
    if len(bias) > 0:
        y = y + bias[0]
    return y


def _multi_lora_linear(x, slots, *linears):
    flat = flat_linears(linears)
    return bound.multi_lora_linear_operators[len(linears) - 1][len(flat)](x, slots, *flat)


operation("multi_lora_linear", reference=lambda: multi_lora_linear_reference, cpu=lambda: _multi_lora_linear,
          emulator=lambda: _with_device_source, rehearsal=lambda: _with_device_source_or_gradient,
          ascend=lambda: _with_device_source_or_gradient)
operation("base_linear", reference=lambda: multi_lora_linear_reference, cpu=lambda: _multi_lora_linear)
operation("multi_lora_linear_operators", cpu=forward_operators)
operation("multi_lora_linear_grad", cpu=gradient_operator)
