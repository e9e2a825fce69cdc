"""``Leaf``: what adapters, merging and the writers of files ask of a Cell that has weights of its own.

A new linear Cell mixes it in and says where it differs; nobody asks for its class. Cells of other libraries, which know
nothing of it, get the same face from :class:`colora_ms.adapters.outside.Outside`.
"""

from __future__ import annotations

from typing import Optional

import numpy as np

import mindspore as ms
from mindspore import Parameter, Tensor, nn

from colora_ms.kernels import multi_lora_linear
from colora_ms.kernels.operands import linear_of
from colora_ms.models.formats import WeightFormat, logical_shape, weight_values
from colora_ms.models.rows import slots_of


class Leaf:
    """The face of a Cell with weights.

    A linear of the decoder is a :class:`LinearLeaf`; LoRA's pair goes into the same kernel call.

    Attributes:
        kind: "linear", "embedding" or "norm".
        takes_rows: whether it is called as the decoder's Cells are, with (x, rows), see :mod:`colora_ms.models.rows`.
        plain: whether it is one weight (out, in), which can be split, given a length for each row, enlarged or copied.
        whole: whether ``modules_to_save`` may copy it.
        decomposed: whether it is factors in the place of a weight.
        transposed: whether the weight is stored (in, out).
        refusal: why no adapter can be put on it, or "".
        fixed: why its weight cannot be changed (by a merge), as the end of a sentence that begins with its name, or "".
        format: of a weight that may be other than floats; None: all that it stores are floats.
        heads: last parts of the names of output heads of this class, beside the usual ones.
    """

    kind = "linear"
    takes_rows = True
    plain = True
    whole = True
    decomposed = False
    transposed = False
    refusal = ""
    fixed = ""
    heads: tuple[str, ...] = ()
    format: Optional[WeightFormat] = None

    def sizes(self) -> tuple[int, int]:
        """(in_features, out_features) of a linear, (vocabulary, hidden size) of an embedding, (0, 0) of a norm."""
        raise NotImplementedError

    def leaf_parameters(self) -> dict[str, Parameter]:
        """{name on disk: Parameter} of what the Cell stores: "weight", and "bias" where it has one."""
        raise NotImplementedError

    def leaf_shapes(self) -> dict[str, tuple[int, ...]]:
        """{name on disk: shape} of their values, whatever a weight is packed into."""
        found = {name: tuple(parameter.shape) for name, parameter in self.leaf_parameters().items()}
        if self.format is not None and "weight" in found:
            found["weight"] = logical_shape(self)
        return found

    def base_values(self) -> dict[str, np.ndarray]:
        """{name on disk: float32 array}; integer weights are multiplied out."""
        return {name: weight_values(self) if self.format is not None and name == "weight"
                else parameter.astype(ms.float32).asnumpy() for name, parameter in self.leaf_parameters().items()}

    def float_copy(self, values: dict[str, Parameter], trainable: bool) -> nn.Cell:
        """A Cell like this one on float32 Parameters ({name on disk: Parameter}); only where ``whole``.

        Args:
            trainable: whether the Parameters are to have gradients.
        """
        raise NotImplementedError


class LinearLeaf(Leaf):
    """A linear of the decoder that is all told by its ``base()``; it can share a kernel call, an adapter's pair, too.

    A Cell mixes it in and has ``in_features``, ``out_features``, ``bias``, ``has_bias`` and ``base()``.
    """

    #: True where ``operands()`` tells all that the Cell computes, so that several can share one kernel call.
    fusible = True

    def base(self) -> tuple:
        """What the Cell multiplies with, see :mod:`colora_ms.kernels.operands`."""
        raise NotImplementedError

    def operands(self) -> tuple:
        """The linear that :func:`colora_ms.kernels.multi_lora_linear` takes (no adapter here)."""
        return linear_of(self.base())

    def construct(self, x: Tensor, rows: tuple) -> Tensor:
        """x: (rows, tokens, in) or (rows, in) float32; rows: (slots, lengths) -> y: (..., out) float32."""
        return multi_lora_linear(x, slots_of(rows), self.operands())

    def sizes(self) -> tuple[int, int]:
        """As :class:`Leaf` says."""
        return self.in_features, self.out_features
