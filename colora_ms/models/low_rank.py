"""``LowRankLinear``: a linear whose weight is a product of small factors, in the place of :class:`layers.Linear`."""

from typing import Optional

import numpy as np

import mindspore as ms
from mindspore import Parameter, Tensor, nn

from colora_ms.kernels import ABSENT, bind, multi_lora_linear
from colora_ms.models.leaf import Leaf
from colora_ms.models.rows import slots_of

#: Last parts of the names of a LowRankLinear's factors, in memory and on disk.
INNER, CORE, OUTER = "inner.weight", "core.weight", "outer.weight"


class LowRankLinear(Leaf, nn.Cell):
    """``y = outer (core (inner x)) + bias``, from right to left, so that the full matrix is never made.

    Args:
        inner: Parameter (r, in) float32 or bfloat16.
        outer: Parameter (out, r) of the same dtype.
        core: Parameter (r, r) of the same dtype, or None in the form with two factors.
        bias: Parameter (out,) float32 or None.

    Source: arXiv 2405.06626: W ~ U1 core U2; here outer = U1 and inner = U2.
    """

    plain, whole, decomposed = False, False, True
    fixed = ("is decomposed into factors, whose product has too low a rank for it; use the adapter unmerged, or "
             "recompose(model) before you load it")
    #: It is no single linear that could share a kernel call with others, but can be a part of a fused layer.
    fusible, fusible_in_layer = False, True

    def __init__(self, inner, outer, core=None, bias=None):
        super().__init__(auto_prefix=False)
        bind()
        self.rank, self.in_features = inner.shape
        self.out_features = outer.shape[0]
        self.inner = inner
        self.outer = outer
        self.core = ABSENT if core is None else core
        self.factors = 2 if core is None else 3
        self.bias = ABSENT if bias is None else bias
        self.has_bias = bias is not None

    def construct(self, x: Tensor, rows: tuple) -> Tensor:
        """x: (rows, tokens, in) or (rows, in) float32 -> y: (..., out) float32."""
        slots = slots_of(rows)
        x = multi_lora_linear(x, slots, self.inner, ABSENT, ABSENT, ABSENT, ABSENT, ABSENT)
        if self.factors == 3:
            x = multi_lora_linear(x, slots, self.core, ABSENT, ABSENT, ABSENT, ABSENT, ABSENT)
        return multi_lora_linear(x, slots, self.outer, ABSENT, self.bias, ABSENT, ABSENT, ABSENT)

    def operands(self) -> tuple:
        """The six tensors of a product in :func:`colora_ms.kernels.decoder_layers`; the numbers are those of
        ``construct``."""
        return (ABSENT, ABSENT, self.bias, self.inner, self.outer, self.core)

    def sizes(self) -> tuple[int, int]:
        """As :class:`colora_ms.models.leaf.Leaf` says."""
        return self.in_features, self.out_features

    def leaf_parameters(self) -> dict[str, Parameter]:
        """As :class:`colora_ms.models.leaf.Leaf` says."""
        return {"bias": self.bias} if self.has_bias else {}

    def factor_parameters(self) -> dict[str, Parameter]:
        """{last part of the name: Parameter} of the factors."""
        core = {CORE: self.core} if self.factors == 3 else {}
        return {INNER: self.inner, **core, OUTER: self.outer}

    def product(self) -> np.ndarray:
        """The weight that the factors stand for, (out, in) float32."""
        values = [parameter.astype(ms.float32).asnumpy() for parameter in self.factor_parameters().values()]
        return np.linalg.multi_dot(values[::-1]) if len(values) == 3 else values[1] @ values[0]

    def extend_repr(self) -> str:
        """What ``repr`` adds to the name of the class."""
        return (f"in_features={self.in_features}, out_features={self.out_features}, rank={self.rank}, "
                f"factors={self.factors}, dtype={self.inner.dtype}")


def low_rank_linear(path: str, values: dict[str, np.ndarray], weight_format: str,
                    bias: Optional[Parameter] = None) -> LowRankLinear:
    """A LowRankLinear from arrays.

    Args:
        path: the module's name; the Parameters are called ``<path>.inner.weight`` and so on.
        values: {"inner.weight", "core.weight" (three factors only), "outer.weight": float32 array}.
        weight_format: the model's; factors are float32 with "float32", and bfloat16 with all others: factors are small,
            and integers would cost accuracy where next to nothing is left to save.
        bias: the Parameter that the module had, or None.
    """
    dtype = ms.float32 if weight_format == "float32" else ms.bfloat16
    made = {name: Parameter(Tensor(np.ascontiguousarray(value, np.float32)).astype(dtype), name=f"{path}.{name}",
                            requires_grad=False) for name, value in values.items()}
    return LowRankLinear(made[INNER], made[OUTER], made.get(CORE), bias)
