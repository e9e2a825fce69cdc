"""The three parameterised Cells of a decoder: ``Linear``, ``Embedding`` and ``RMSNorm``.

Each takes the rows' adapter slots as an argument, so that an adapter Cell can stand in its place, and each keeps its
weight in a format of :mod:`colora_ms.models.formats`, which it carries as ``format``.
"""

import mindspore as ms
from mindspore import Tensor, nn

from colora_ms.kernels import ABSENT, bind, embedding, multi_lora_linear, rms_norm, rms_norm_residual
from colora_ms.kernels.operands import base_of, linear_of
from colora_ms.models.formats import FLOAT32


class Linear(nn.Cell):
    """``y = x @ weight.T + bias``.

    Args:
        weight: Parameter of the format's dtype and stored shape for (out, in).
        weight_scale: Parameter (out,) or (out, in / group) float32 for formats with a scale, else None.
        bias: Parameter (out,) float32 or None.
        in_features, out_features: the sizes of x's and y's last axis.
        weight_format: the :class:`colora_ms.models.formats.WeightFormat` of the weight.
    """

    #: True where ``operands()`` tells all that the Cell computes, so that several can share one kernel call.
    fusible = True

    def __init__(self, weight, in_features, out_features, weight_scale=None, bias=None, weight_format=FLOAT32):
        super().__init__()
        bind()
        weight_format.check(weight, weight_scale)
        self.format = weight_format
        self.tag = weight_format.tag
        self.in_features = in_features
        self.out_features = out_features
        self.weight = weight
        self.weight_scale = ABSENT if weight_scale is None else weight_scale
        self.bias = ABSENT if bias is None else bias
        self.has_bias = bias is not None

    def base(self):
        """What the Cell multiplies with, see :mod:`colora_ms.kernels.operands`."""
        return base_of(self.tag, self.weight, self.weight_scale, self.bias)

    def operands(self):
        """The linear that :func:`colora_ms.kernels.multi_lora_linear` takes (no adapter here)."""
        return linear_of(self.base())

    def construct(self, x, slots):
        """x: (rows, tokens, in) or (rows, in); slots: (rows,) int32 -> y: (..., out) float32."""
        return multi_lora_linear(x, slots, self.operands())

    def extend_repr(self):
        return f"in_features={self.in_features}, out_features={self.out_features}, format={self.format.name}"


class Embedding(nn.Cell):
    """Rows of ``weight`` (vocab, hidden) picked by token ids; the same formats as :class:`Linear`."""

    #: True where weight and scale are all that the Cell computes with.
    fusible = True

    def __init__(self, weight, hidden_size, weight_scale=None, weight_format=FLOAT32):
        super().__init__()
        bind()
        weight_format.check(weight, weight_scale)
        self.format = weight_format
        self.tag = weight_format.tag
        self.hidden_size = hidden_size
        self.weight = weight
        self.weight_scale = ABSENT if weight_scale is None else weight_scale

    def base(self):
        """The table as a linear's base, see :mod:`colora_ms.kernels.operands`."""
        return base_of(self.tag, self.weight, self.weight_scale)

    def construct(self, ids, slots):
        """ids: (rows, tokens) int32; slots: (rows,) int32 (for adapters) -> (rows, tokens, hidden) float32."""
        return embedding(ids, self.weight, self.weight_scale)


class RMSNorm(nn.Cell):
    """``weight * x / sqrt(mean(x^2) + eps)`` over the last axis, in float32."""

    #: True where weight and eps are all that the Cell computes with.
    fusible = True

    def __init__(self, weight, eps):
        super().__init__()
        bind()
        self.weight = weight
        self.eps = Tensor(eps, ms.float32)

    def construct(self, x, slots):
        """x: (..., hidden) float32 -> the same shape."""
        return rms_norm(x, self.weight, self.eps)

    def add(self, x, residual, slots):
        """The norm of ``x + residual``, and that sum; both of x's shape."""
        return rms_norm_residual(x, residual, self.weight, self.eps)

