"""Dynamic quantisation of activations, and the linear that applies it when an exported model runs.

Every token gets its own asymmetric grid from its smallest and largest value (arXiv 2406.06385, dynamic asymmetric
per-token quantisation). Values stay float32; what is modelled is the loss of the rounding.
"""

from __future__ import annotations

from typing import Optional

from mindspore import Tensor, nn, ops

from colora_ms.models.layers import Linear

_SMALLEST_SCALE = 1e-8

#: preset -> (bits of the inputs of a quantised linear, bits of the outputs of k_proj and v_proj).
ACTIVATIONS = {"a8": (8, 8), "a8kv4": (8, 4), "a4": (4, 4)}


def activation_bits(preset: Optional[str], path: str) -> tuple[int, int]:
    """(bits of the input, bits of the output) of the linear called ``path``; 0 = float."""
    if preset is None:
        return 0, 0
    inputs, keys = ACTIVATIONS[preset]
    return inputs, keys if path.rsplit(".", 1)[-1] in ("k_proj", "v_proj") else 0


class ActivationQuantizer(nn.Cell):
    """``s * (clip(round(x / s) + z, 0, 2^b - 1) - z)`` with s and z of each token; straight-through gradient."""

    def __init__(self, bits: int) -> None:
        super().__init__(auto_prefix=False)
        self.bits, self.levels = bits, float(2 ** bits - 1)
        self.rint = ops.Rint()

    def construct(self, x: Tensor) -> Tensor:
        """x: (..., features) float32 -> the same shape; the range always holds 0."""
        low = ops.minimum(ops.ReduceMin(True)(x, -1), 0.0)
        high = ops.maximum(ops.ReduceMax(True)(x, -1), 0.0)
        scale = ops.maximum((high - low) / self.levels, _SMALLEST_SCALE)
        zero = self.rint(-low / scale)
        q = ops.minimum(ops.maximum(self.rint(x / scale) + zero, 0.0), self.levels)
        return (q - zero) * scale

    def bprop(self, x: Tensor, out: Tensor, dout: Tensor) -> tuple[Tensor]:
        """The dynamic range clips nothing, so the gradient passes everywhere."""
        return (dout,)

    def extend_repr(self) -> str:
        """What ``repr`` adds to the name of the class."""
        return f"bits={self.bits}"


class ActivationQuantizedLinear(nn.Cell):
    """A linear with quantised weights whose input, and perhaps output, is rounded too.

    It is not a :class:`colora_ms.models.layers.Linear` on purpose: a LoRA Cell would read the operands past the
    rounding.

    Args:
        linear: :class:`colora_ms.models.layers.Linear`; input_bits, output_bits: 0 for float.
    """

    fusible = False

    def __init__(self, linear: Linear, input_bits: int, output_bits: int) -> None:
        super().__init__(auto_prefix=False)
        self.linear = linear
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.quantize_input = ActivationQuantizer(input_bits) if input_bits else None
        self.quantize_output = ActivationQuantizer(output_bits) if output_bits else None

    def construct(self, x: Tensor, rows: tuple) -> Tensor:
        """x: (rows, tokens, in) or (rows, in) -> y: (..., out) float32."""
        if self.quantize_input is not None:
            x = self.quantize_input(x)
        y = self.linear(x, rows)
        return y if self.quantize_output is None else self.quantize_output(y)
