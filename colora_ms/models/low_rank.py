"""``LowRankLinear``: a linear whose weight is a product of small factors, in the place of :class:`layers.Linear`."""

import numpy as np

import mindspore as ms
from mindspore import Parameter, Tensor, nn

from colora_ms.kernels import ABSENT, bind, multi_lora_linear
from colora_ms.kernels.operands import linear_of, product_of

#: Last parts of the names of a LowRankLinear's factors, in memory and on disk.
INNER, CORE, OUTER = "inner.weight", "core.weight", "outer.weight"


class LowRankLinear(nn.Cell):
    """``y = outer (core (inner x)) + bias``, from right to left, so that the full matrix is never made.

    Args:
        inner: Parameter (r, in) float32 or bfloat16.
        outer: Parameter (out, r) of the same dtype.
        core: Parameter (r, r) of the same dtype, or None in the form with two factors.
        bias: Parameter (out,) float32 or None.

    Source: arXiv 2405.06626: W ~ U1 core U2; here outer = U1 and inner = U2.
    """

    #: As of :class:`colora_ms.models.layers.Linear`.
    fusible = True

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

    def base(self):
        """What the Cell multiplies with, see :mod:`colora_ms.kernels.operands`."""
        return product_of(self.inner, self.outer, self.core, self.bias)

    def operands(self):
        """The linear that :func:`colora_ms.kernels.multi_lora_linear` takes (no adapter here)."""
        return linear_of(self.base())

    def construct(self, x, slots):
        """x: (rows, tokens, in) or (rows, in) float32; slots: (rows,) int32 -> y: (..., out) float32."""
        return multi_lora_linear(x, slots, self.operands())

    def factor_parameters(self):
        """{last part of the name: Parameter} of the factors."""
        core = {CORE: self.core} if self.factors == 3 else {}
        return {INNER: self.inner, **core, OUTER: self.outer}

    def product(self):
        """The weight that the factors stand for, (out, in) float32."""
        values = [parameter.astype(ms.float32).asnumpy() for parameter in self.factor_parameters().values()]
        return np.linalg.multi_dot(values[::-1]) if len(values) == 3 else values[1] @ values[0]

    def extend_repr(self):
        return (f"in_features={self.in_features}, out_features={self.out_features}, rank={self.rank}, "
                f"factors={self.factors}, dtype={self.inner.dtype}")


def low_rank_linear(path, values, weight_format, bias=None):
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


def replace_linears(net, cells):
    """Put Cells in the places of a decoder's linears; all parameters keep their names.

    Args:
        net: :class:`colora_ms.models.decoder.Decoder`; cells: {module name: Cell}.
    """
    named = [(parameter, parameter.name) for cell in (net, *cells.values()) for parameter in cell.get_parameters()]
    for path, cell in cells.items():
        parent, _, last = path.rpartition(".")
        setattr(_cell(net, parent), last, cell)
    for parameter, name in named:
        if parameter.name != name:
            parameter.name = name


def _cell(net, path):
    for part in path.split("."):
        net = net._cells[part]  # pylint: disable=protected-access
    return net
