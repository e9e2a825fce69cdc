"""The gated activations of feed-forward blocks (SwiGLU and GEGLU, arXiv 2002.05202)."""

from __future__ import annotations

import mindspore as ms
from mindspore import Tensor, ops

from colora_ms.kernels import bound
from colora_ms.kernels.aot import custom
from colora_ms.kernels.registry import operation
from colora_ms.kernels.shapes import element_type, require_dtype, require_shape


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """SiLU of the gate times ``up``, element by element.

    Semantics: ``y = gate / (1 + exp(-gate)) * up`` (arXiv 2002.05202, eq. 6 with beta = 1).

    Args:
        gate: any shape, float32.
        up: gate's shape, float32.

    Returns:
        gate's shape, float32.

    Raises:
        KernelError: the shapes differ, or a dtype is not float32.

    Gradients: gate and up.
    """
    return bound.swiglu(gate, up)


def swiglu_reference(gate: Tensor, up: Tensor) -> Tensor:
    """:func:`swiglu` in built-in operators; differentiable, any device."""
    return gate * ops.sigmoid(gate) * up


def geglu(gate: Tensor, up: Tensor) -> Tensor:
    """GELU by tanh (arXiv 1606.08415) of the gate times ``up``, element by element, in built-in operators.

    Args and result as of :func:`swiglu`; differentiable, any device.
    """
    inner = 0.7978845608028654 * (gate + 0.044715 * gate * gate * gate)
    return gate * ops.sigmoid(2 * inner) * up


def soft_cap(x: Tensor, cap: float) -> Tensor:
    """``cap * tanh(x / cap)``, cap > 0, in built-in operators; differentiable, any device. x's shape and dtype.

    By the sigmoid: ``ops.tanh`` of MindSpore's CPU is wrong by up to 1e-4.
    """
    return cap * (2 * ops.sigmoid(x * (2 / cap)) - 1)


def _shapes(gate, up):
    require_shape("swiglu", "up", up, gate)
    return gate


def _dtypes(gate, up):
    require_dtype("swiglu", "gate", element_type(gate), (ms.float32,))
    require_dtype("swiglu", "up", element_type(up), (ms.float32,))
    return ms.float32


def _bprop(gate, up, out, dout):
    return bound.swiglu_grad(gate, up, dout)


operation("swiglu", reference=lambda: swiglu_reference, cpu=lambda: custom("swiglu", _shapes, _dtypes, _bprop))
operation("swiglu_grad", cpu=lambda: custom("swiglu_grad", lambda gate, up, dy: (gate, gate),
                                            lambda *dtypes: (ms.float32, ms.float32)))
