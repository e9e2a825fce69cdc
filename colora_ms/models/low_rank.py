"""``LowRankLinear``: a linear whose weight is a product of small factors, in the place of :class:`layers.Linear`."""

from typing import Optional

from mindspore import Parameter, nn

from colora_ms.kernels import ABSENT, bind
from colora_ms.kernels.operands import product_of
from colora_ms.models.formats import AUTO, BFLOAT16, FLOAT32, StoredFactors, WeightFormat
from colora_ms.models.leaf import LinearLeaf
from colora_ms.models.low_rank_folder import CORE, INNER, OUTER
from colora_ms.models.mapped import parameter_of


class LowRankLinear(LinearLeaf, nn.Cell):
    """``y = outer (core (inner x)) + bias``, from right to left, so that the full matrix is never made.

    Args:
        inner: Parameter (r, in) float32 or bfloat16.
        outer: Parameter (out, r) of the same dtype.
        core: Parameter (r, r) of the same dtype, or None in the form with two factors.
        bias: Parameter (out,) float32 or None.
        factor_format: the format of the factors.

    Source: arXiv 2405.06626: W ~ U1 core U2; here outer = U1 and inner = U2.
    """

    plain, whole, decomposed = False, False, True
    fixed = ("is decomposed into factors, whose product has too low a rank for it; use the adapter unmerged, or "
             "recompose(model) before you load it")

    def __init__(self, inner: Parameter, outer: Parameter, core: Optional[Parameter] = None,
                 bias: Optional[Parameter] = None, factor_format: WeightFormat = FLOAT32) -> None:
        super().__init__(auto_prefix=False)
        bind()
        for factor in (inner, outer, *(() if core is None else (core,))):
            factor_format.check(factor, None)
        self.format = factor_format
        self.rank, self.in_features = inner.shape
        self.out_features = outer.shape[0]
        self.inner = inner
        self.outer = outer
        self.core = ABSENT if core is None else core
        self.factors = 2 if core is None else 3
        self.bias = ABSENT if bias is None else bias
        self.has_bias = bias is not None

    def base(self) -> tuple:
        """What the Cell multiplies with, see :mod:`colora_ms.kernels.operands`."""
        return product_of(self.inner, self.outer, self.core, self.bias)

    def leaf_parameters(self) -> dict[str, Parameter]:
        """As :class:`colora_ms.models.leaf.Leaf` says."""
        return {"bias": self.bias} if self.has_bias else {}

    def factor_parameters(self) -> dict[str, Parameter]:
        """{last part of the name: Parameter} of the factors."""
        core = {CORE: self.core} if self.factors == 3 else {}
        return {INNER: self.inner, **core, OUTER: self.outer}

    def stored(self) -> StoredFactors:
        """The arrays of the factors."""
        return StoredFactors(self.format.stored(self.inner), self.format.stored(self.outer),
                             self.format.stored(self.core) if self.factors == 3 else None)

    def extend_repr(self) -> str:
        """What ``repr`` adds to the name of the class."""
        return (f"in_features={self.in_features}, out_features={self.out_features}, rank={self.rank}, "
                f"factors={self.factors}, format={self.format.name}")


def factor_format(weight_format: str) -> WeightFormat:
    """The format of factors in a model of a weight format: float32 in float32 and "auto", bfloat16 in all others.

    Factors are small, and integers would cost accuracy where next to nothing is left to save.
    """
    return FLOAT32 if weight_format in (FLOAT32.name, AUTO) else BFLOAT16


def low_rank_linear(path: str, factors: StoredFactors, weight_format: str,
                    bias: Optional[Parameter] = None) -> LowRankLinear:
    """A LowRankLinear of stored factors.

    Args:
        path: the module's name; the Parameters are called ``<path>.inner.weight`` and so on.
        factors: as they are stored.
        weight_format: the model's; see :func:`factor_format`.
        bias: the Parameter that the module has, or None.
    """
    wanted = factor_format(weight_format)
    if weight_format == AUTO and factors.inner.format is BFLOAT16:
        wanted = BFLOAT16
    made = {name: parameter_of(wanted.pack(one.values()).tensors()[0], f"{path}.{name}")
            for name, one in ((INNER, factors.inner), (CORE, factors.core), (OUTER, factors.outer)) if one is not None}
    return LowRankLinear(made[INNER], made[OUTER], made.get(CORE), bias, wanted)
