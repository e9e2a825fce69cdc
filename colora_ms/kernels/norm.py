"""Root-mean-square normalization (arXiv 1910.07467), alone and fused with the residual addition before it."""

from __future__ import annotations

import mindspore as ms
from mindspore import Tensor, ops

from colora_ms.kernels import bound
from colora_ms.kernels.aot import ABSENT, custom
from colora_ms.kernels.registry import operation
from colora_ms.kernels.shapes import element_type, require, require_dtype, require_shape


def rms_norm(x: Tensor, weight: Tensor, eps: Tensor) -> Tensor:
    """Root-mean-square norm over the last axis.

    Semantics: ``y = weight * x / sqrt(mean(x^2) + eps)``, in float32; no mean is subtracted (arXiv 1910.07467, eq. 4).

    Args:
        x: (..., hidden) float32.
        weight: (hidden,) float32 or bfloat16.
        eps: float32 of one element (rank 0 or shape (1,)), finite and >= 0.

    Returns:
        (..., hidden) float32.

    Raises:
        KernelError: a shape or dtype is wrong.
        RuntimeError: eps is negative or not finite.

    Gradients: x and weight; eps has none.
    """
    return bound.rms_norm(x, weight, eps)


def rms_norm_residual(x: Tensor, residual: Tensor, weight: Tensor, eps: Tensor) -> tuple[Tensor, Tensor]:
    """The norm of ``x + residual``, and that sum.

    Args:
        x: (..., hidden) float32.
        residual: the shape of x, float32.
        weight: (hidden,) float32 or bfloat16.
        eps: float32 of one element.

    Returns:
        ``(y, total)``: ``total = x + residual`` and ``y = rms_norm(total, weight, eps)``, both of x's shape, float32.

    Raises:
        KernelError: a shape or dtype is wrong.
        RuntimeError: eps is negative or not finite.

    Gradients: x, residual and weight.
    """
    return bound.rms_norm_residual(x, residual, weight, eps)


def rms_norm_reference(x: Tensor, weight: Tensor, eps: Tensor) -> Tensor:
    """:func:`rms_norm` in built-in operators; differentiable, any device."""
    x = x.astype(ms.float32)
    inverse = ops.rsqrt(ops.mean(ops.square(x), -1, True) + eps.reshape(()))
    return x * inverse * weight.astype(ms.float32)


def rms_norm_residual_reference(x: Tensor, residual: Tensor, weight: Tensor, eps: Tensor) -> tuple[Tensor, Tensor]:
    """:func:`rms_norm_residual` in built-in operators; differentiable, any device."""
    total = x + residual
    return rms_norm_reference(total, weight, eps), total


# -- the CPU operators ------------------------------------------------------------------------------------------------

def _check(name, x, weight, eps):
    require(len(x) >= 1, name, "x", x, "(..., hidden)")
    require_shape(name, "weight", weight, x[-1:])
    require(list(eps) in ([], [1]), name, "eps", eps, "one element")


def _norm_shapes(x, weight, eps):
    _check("rms_norm", x, weight, eps)
    return x, x[:-1]


def _residual_shapes(x, residual, weight, eps):
    _check("rms_norm_residual", x, weight, eps)
    require_shape("rms_norm_residual", "residual", residual, x)
    return x, x, x[:-1]


def _norm_dtypes(*dtypes):
    names = ("x", "weight", "eps") if len(dtypes) == 3 else ("x", "residual", "weight", "eps")
    name = "rms_norm" if len(dtypes) == 3 else "rms_norm_residual"
    for argument, dtype in zip(names, dtypes):
        allowed = (ms.float32, ms.bfloat16) if argument == "weight" else (ms.float32,)
        require_dtype(name, argument, element_type(dtype), allowed)
    return (ms.float32,) * (len(dtypes) - 1)


def _norm_bprop(x, weight, eps, out, dout):
    dx = bound.rms_norm_grad(x, weight, out[1], dout[0], ABSENT)
    dweight = bound.rms_norm_weight_grad(x, weight, out[1], dout[0])
    return dx, dweight.astype(weight.dtype), ops.zeros_like(eps)


def _residual_bprop(x, residual, weight, eps, out, dout):
    dtotal = bound.rms_norm_grad(out[1], weight, out[2], dout[0], dout[1])
    dweight = bound.rms_norm_weight_grad(out[1], weight, out[2], dout[0])
    return dtotal, dtotal, dweight.astype(weight.dtype), ops.zeros_like(eps)


# The last output of both, the inverse root mean square of each row, is what the backward pass needs.
def _rms_norm(x, weight, eps):
    return bound.rms_norm_operator(x, weight, eps)[0]


def _rms_norm_residual(x, residual, weight, eps):
    y, total, _ = bound.rms_norm_residual_operator(x, residual, weight, eps)
    return y, total


operation("rms_norm", reference=lambda: rms_norm_reference, cpu=lambda: _rms_norm)
operation("rms_norm_residual", reference=lambda: rms_norm_residual_reference, cpu=lambda: _rms_norm_residual)
operation("rms_norm_operator", cpu=lambda: custom("rms_norm", _norm_shapes, _norm_dtypes, _norm_bprop))
operation("rms_norm_residual_operator",
          cpu=lambda: custom("rms_norm_residual", _residual_shapes, _norm_dtypes, _residual_bprop))
operation("rms_norm_grad", cpu=lambda: custom("rms_norm_grad", lambda x, weight, inverse, dy, more: x,
                                              lambda *dtypes: ms.float32))
operation("rms_norm_weight_grad", cpu=lambda: custom("rms_norm_weight_grad", lambda x, weight, inverse, dy: weight,
                                                     lambda *dtypes: ms.float32))
