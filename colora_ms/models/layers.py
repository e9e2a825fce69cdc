"""The parameterised Cells of a decoder: ``Linear``, ``Embedding``, ``RMSNorm`` and ``LayerNorm``.

Each takes ``rows``, what the decoder knows of the rows of its batch (see :mod:`colora_ms.models.rows`), so that an
adapter Cell can stand in its place, and keeps its weight in a format of :mod:`colora_ms.models.formats`, which it
carries as ``format``.
"""

from typing import Optional

import mindspore as ms
from mindspore import Parameter, Tensor, nn, ops

from colora_ms.kernels import (
    ABSENT,
    bind,
    embedding,
    multi_lora_linear_reference,
    rms_norm,
    rms_norm_residual,
)
from colora_ms.kernels.operands import base_of
from colora_ms.models.formats import FLOAT32, WeightFormat
from colora_ms.models.leaf import Leaf, LinearLeaf
from colora_ms.models.rows import slots_of


class Linear(LinearLeaf, nn.Cell):
    """``y = x @ weight.T + bias``.

    Args:
        weight: Parameter of the format's dtype and stored shape for (out, in).
        weight_scale: Parameter (out,) or (out, in / group) float32 for formats with a scale, else None.
        bias: Parameter (out,) float32 or None.
        order: Parameter (in,) int32 for formats that are ordered, else None.
        in_features, out_features: the sizes of x's and y's last axis.
        weight_format: the :class:`colora_ms.models.formats.WeightFormat` of the weight.
    """

    def __init__(self, weight: Parameter, in_features: int, out_features: int, weight_scale: Optional[Parameter] = None,
                 bias: Optional[Parameter] = None, weight_format: WeightFormat = FLOAT32,
                 order: Optional[Parameter] = None) -> None:
        super().__init__()
        bind()
        weight_format.check(weight, weight_scale, order)
        self.format = weight_format
        self.tag = weight_format.tag
        self.in_features = in_features
        self.out_features = out_features
        self.weight = weight
        self.weight_scale = ABSENT if weight_scale is None else weight_scale
        self.bias = ABSENT if bias is None else bias
        self.order = ABSENT if order is None else order
        self.has_bias = bias is not None

    def base(self) -> tuple:
        """What the Cell multiplies with, see :mod:`colora_ms.kernels.operands`."""
        return base_of(self.tag, self.weight, self.weight_scale, self.bias, self.order)

    def leaf_parameters(self) -> dict[str, Parameter]:
        """As :class:`colora_ms.models.leaf.Leaf` says."""
        return {"weight": self.weight, "bias": self.bias} if self.has_bias else {"weight": self.weight}

    def float_copy(self, values: dict[str, Parameter], trainable: bool) -> 'Linear':
        """As :class:`colora_ms.models.leaf.Leaf` says."""
        kind = TrainableLinear if trainable else Linear
        return kind(values["weight"], self.in_features, self.out_features, bias=values.get("bias"))

    def extend_repr(self) -> str:
        """What ``repr`` adds to the name of the class."""
        return f"in_features={self.in_features}, out_features={self.out_features}, format={self.format.name}"


class TrainableLinear(Linear):
    """A linear whose weight and bias have gradients: the fast operator takes the weight to be frozen."""

    def construct(self, x: Tensor, rows: tuple) -> Tensor:
        """As the base Cell is called."""
        return multi_lora_linear_reference(x, slots_of(rows), self.operands())


class Embedding(Leaf, nn.Cell):
    """Rows of ``weight`` (vocab, hidden) picked by token ids; the same formats as :class:`Linear`."""

    kind = "embedding"
    #: True where weight and scale are all that the Cell computes with.
    fusible = True

    def __init__(self, weight: Parameter, hidden_size: int, weight_scale: Optional[Parameter] = None,
                 weight_format: WeightFormat = FLOAT32) -> None:
        super().__init__()
        bind()
        weight_format.check(weight, weight_scale)
        self.format = weight_format
        self.tag = weight_format.tag
        self.hidden_size = hidden_size
        self.weight = weight
        self.weight_scale = ABSENT if weight_scale is None else weight_scale

    def base(self) -> tuple:
        """The table as a linear's base, see :mod:`colora_ms.kernels.operands`."""
        return base_of(self.tag, self.weight, self.weight_scale)

    def construct(self, ids: Tensor, rows: tuple) -> Tensor:
        """ids: (rows, tokens) int32; rows: for adapters -> (rows, tokens, hidden) float32."""
        return embedding(ids, self.base())

    def sizes(self) -> tuple[int, int]:
        """As :class:`colora_ms.models.leaf.Leaf` says."""
        return self.weight.shape[0], self.hidden_size

    def leaf_parameters(self) -> dict[str, Parameter]:
        """As :class:`colora_ms.models.leaf.Leaf` says."""
        return {"weight": self.weight}

    def float_copy(self, values: dict[str, Parameter], trainable: bool) -> 'Embedding':
        """As :class:`colora_ms.models.leaf.Leaf` says."""
        return Embedding(values["weight"], self.hidden_size)


class RMSNorm(Leaf, nn.Cell):
    """``weight * x / sqrt(mean(x^2) + eps)`` over the last axis, in float32.

    Args:
        weight: Parameter (hidden,); eps: positive. raised: 1 + weight stands in weight's place (Gemma).
    """

    kind = "norm"
    plain = False
    #: True where weight and eps are all that the Cell computes with.
    fusible = True

    def __init__(self, weight: Parameter, eps: float, raised: bool = False) -> None:
        super().__init__()
        bind()
        self.weight = weight
        self.eps = Tensor(eps, ms.float32)
        self.raised = raised

    def factors(self) -> Tensor:
        """What the normed numbers are multiplied by."""
        if self.raised:
            return self.weight + 1.0
        return self.weight

    def construct(self, x: Tensor, rows: tuple) -> Tensor:
        """x: (..., hidden) float32 -> the same shape."""
        return rms_norm(x, self.factors(), self.eps)

    def add(self, x: Tensor, residual: Tensor, rows: tuple) -> tuple:
        """The norm of ``x + residual``, and that sum; both of x's shape."""
        return rms_norm_residual(x, residual, self.factors(), self.eps)

    def sizes(self) -> tuple[int, int]:
        """As :class:`colora_ms.models.leaf.Leaf` says."""
        return 0, 0

    def leaf_parameters(self) -> dict[str, Parameter]:
        """As :class:`colora_ms.models.leaf.Leaf` says."""
        return {"weight": self.weight}

    def float_copy(self, values: dict[str, Parameter], trainable: bool) -> 'RMSNorm':
        """As :class:`colora_ms.models.leaf.Leaf` says."""
        copy = type(self)(values["weight"], 0.0, self.raised)
        copy.eps = self.eps
        return copy


class LayerNorm(RMSNorm):
    """``weight * (x - mean) / sqrt(variance + eps)`` over the last axis, without a bias, in built-in operators."""

    def construct(self, x: Tensor, rows: tuple) -> Tensor:
        """As of :class:`RMSNorm`."""
        apart = x - ops.mean(x, -1, True)
        return apart * ops.rsqrt(ops.mean(apart * apart, -1, True) + self.eps) * self.factors()

    def add(self, x: Tensor, residual: Tensor, rows: tuple) -> tuple:
        """As of :class:`RMSNorm`."""
        total = x + residual
        return self.construct(total, rows), total
