"""DoRA: a low-rank adapter whose rows of the weight have trained lengths (Liu et al., arXiv 2402.09353, eq. 5).

    W' = magnitude / ||W + scale up down||_row * (W + scale up down)

The length in the denominator is taken for a constant by gradients (section 4.3 of the paper; PEFT does the same). With
g = magnitude / length that makes every linear ``y = bias + g * (W x + scale up (down x))``: what LoRA computes, times
one factor an output. Where the Cells are not trainable, g is a stored Parameter, and DoRA costs one multiplication;
where they are, the length is computed in the graph without the product W + scale up down itself:

    ||W_i + s u_i D||^2 = ||W_i||^2 + 2 s u_i (D W_i^T) + s^2 u_i (D D^T) u_i^T
"""

from typing import Optional

import numpy as np

import mindspore as ms
from mindspore import Parameter, Tensor, nn, ops

from colora_ms.adapters.dropout import Dropout
from colora_ms.adapters.foreign import LoraDense, chosen, low_rank
from colora_ms.adapters.lora import LoraLinear
from colora_ms.adapters.outside import leaf
from colora_ms.adapters.slots import get, owned_slots, put, rows_where, stacked
from colora_ms.kernels import ABSENT, lora_expand_reference, lora_shrink_reference, multi_lora_linear
from colora_ms.kernels.operands import linear_of, without_bias
from colora_ms.models.rows import slots_of


def row_lengths(weight: np.ndarray, change: Optional[np.ndarray] = None) -> np.ndarray:
    """||W + change|| of every row, in float64: (out,) float32."""
    whole = weight.astype(np.float64) if change is None else weight.astype(np.float64) + change
    return np.sqrt((whole * whole).sum(1)).astype(np.float32)


def factors(magnitude: Tensor, squares: Tensor) -> Tensor:
    """magnitude / sqrt(squares), and 0 where the row has no length."""
    there = squares > 0
    return ops.where(there, magnitude, ops.zeros_like(magnitude)) / ops.sqrt(ops.where(there, squares,
                                                                                       ops.ones_like(squares)))


class Dora:
    """What a DoRA Cell adds to a LoRA Cell's values: ``magnitude`` (slots, out), and who owns one.

    Slots without a magnitude hold plain LoRA adapters, so that both kinds share a batch.
    """

    has_magnitude = True

    def make_magnitude(self, slots: int, out_features: int, trainable: bool) -> None:
        """Create the magnitudes, and either the stored factors g or what their computation in the graph needs."""
        self.magnitude = stacked(f"{self.path}.lora_magnitude_vector", (slots, out_features), trainable)
        self.magnitude_owned = stacked(f"{self.path}.lora_magnitude_owned", (slots,), False, np.int32)
        self.stored = not trainable
        if self.stored:
            self.factor = stacked(f"{self.path}.lora_magnitude_factor", (slots, out_features), False)
        else:
            self.base_squares = stacked(f"{self.path}.lora_base_squares", (out_features,), False)

    def write(self, slot: int, values: dict[str, np.ndarray], scaling: float) -> None:
        """As :class:`AdapterCell` says."""
        super().write(slot, values, scaling)
        owned = "magnitude" in values
        put(self.magnitude, slot, values.get("magnitude", np.float32(0)))
        put(self.magnitude_owned, slot, owned)
        if self.stored:
            put(self.factor, slot, self._factor(slot) if owned else np.float32(0))
        else:
            squares = np.square(leaf(self.base_layer).base_values()["weight"].astype(np.float64)).sum(1)
            self.base_squares.set_data(ms.Tensor(squares.astype(np.float32)))

    def clear(self, slot: int) -> None:
        """As :class:`AdapterCell` says."""
        super().clear(slot)
        put(self.magnitude_owned, slot, 0)

    def parameters_of(self, slot: int) -> list[Parameter]:
        """As :class:`AdapterCell` says."""
        found = super().parameters_of(slot)
        return found + [self.magnitude] if get(self.magnitude_owned, slot) > 0 else found

    def _factor(self, slot):
        """g of a slot, (out,) float32; 0 where the row of the weight has no length."""
        lengths = row_lengths(leaf(self.base_layer).base_values()["weight"], self.change(slot))
        there = lengths > 0
        return np.where(there, get(self.magnitude, slot) / np.where(there, lengths, 1), 0).astype(np.float32)

    def merged_weight(self, slot: int) -> np.ndarray:
        """As :class:`AdapterCell` says."""
        plain = leaf(self.base_layer).base_values()["weight"] + self.change(slot)
        return plain * self._factor(slot)[:, None] if get(self.magnitude_owned, slot) > 0 else plain

    def delta(self, slot: int) -> np.ndarray:
        """As :class:`AdapterCell` says."""
        return self.merged_weight(slot) - leaf(self.base_layer).base_values()["weight"]

    def switches(self, slot: int) -> list[Parameter]:
        """As :class:`AdapterCell` says."""
        return super().switches(slot) + [self.magnitude_owned]


class DoraLinear(Dora, LoraLinear):
    """A decoder's linear with a low-rank pair and a magnitude for each slot; arguments as ``LoraLinear``."""

    fusible = False

    def __init__(self, base_layer: nn.Cell, path: str, slots: int, max_rank: int, dropout: Optional[Dropout] = None,
                 bias: bool = False, trainable: bool = True, up_bias: bool = False) -> None:
        super().__init__(base_layer, path, slots, max_rank, dropout, bias, trainable, up_bias)
        self.make_magnitude(slots, self.out_features, trainable)
        self.base_bias = base_layer.has_bias

    def product(self, x: Tensor, rows: tuple) -> Tensor:
        """x: (rows, tokens, in) or (rows, in) float32 -> (..., out) float32."""
        slots = slots_of(rows)
        own = owned_slots(slots, self.magnitude_owned)
        if self.stored:
            all_factors = self.factor
        else:
            all_factors = self.factors_in_graph()
        g = ops.gather(all_factors, ops.maximum(own, 0), 0)
        # Ones for the rows without a magnitude: where() alone would let what slot 0 holds into the gradient.
        g = rows_where(own >= 0, g, ops.ones_like(g))
        if x.ndim == 3:
            g = ops.expand_dims(g, 1)
        if self.drops:
            # As in PEFT: the base sees x, the factor's correction and the pair see what dropout leaves of it.
            dropped = self.dropout(x)
            y = self.base_layer(x, rows)
            z = multi_lora_linear(dropped, slots, linear_of(without_bias(self.base_layer.base())))
            v = lora_shrink_reference(dropped, slots, self.down, self.scale)
            total = lora_expand_reference(v, slots, self.up, z)
            return rows_where(own >= 0, y - z + g * total, y - z + total)
        y = multi_lora_linear(x, slots, self.operands())
        if not self.base_bias:
            return g * y
        bias = self.base_layer.bias
        return rows_where(own >= 0, g * (y - bias) + bias, y)

    def factors_in_graph(self) -> Tensor:
        """g of all slots, (slots, out), from the values that the factors have now."""
        down, up = ops.stop_gradient(self.down), ops.stop_gradient(self.up)
        slots, rank, inner = down.shape
        base = linear_of(without_bias(self.base_layer.base()))
        w_down = multi_lora_linear(down.reshape((slots * rank, inner)), ABSENT, base).reshape((slots, rank, -1))
        scale = self.scale.reshape((-1, 1))
        cross = (up * ops.transpose(w_down, (0, 2, 1))).sum(-1)
        square = (ops.bmm(up, ops.bmm(down, ops.transpose(down, (0, 2, 1)))) * up).sum(-1)
        squares = self.base_squares + 2 * scale * cross + scale * scale * square
        return factors(self.magnitude, ops.stop_gradient(squares))


class DoraDense(Dora, LoraDense):
    """DoRA on a linear Cell of another model; arguments as ``LoraDense``."""

    def __init__(self, base_layer: nn.Cell, path: str, active_slot: Parameter, slots: int, max_rank: int,
                 dropout: Optional[Dropout] = None, bias: bool = False, trainable: bool = True,
                 up_bias: bool = False) -> None:
        super().__init__(base_layer, path, active_slot, slots, max_rank, dropout, bias, trainable, up_bias)
        self.make_magnitude(slots, base_layer.weight.shape[0], trainable)
        self.base_bias = getattr(base_layer, "bias", None) is not None

    def product(self, x: Tensor, y: Tensor, used: Tensor, slot: Tensor) -> Tensor:
        """See ``LoraDense.product``."""
        owned = ops.logical_and(used, ops.gather(self.magnitude_owned, slot, 0) > 0)
        if self.stored:
            g = ops.gather(self.factor, slot, 0)
        else:
            g = self.factor_in_graph(used, slot)
        g = ops.where(owned, g, ops.ones_like(g))
        inputs = x if self.dropout is None else self.dropout(x)
        low = low_rank(inputs, used, slot, self.down, self.up, self.scale)
        whole = y if self.dropout is None else self.base_layer(inputs).astype(ms.float32)
        if self.base_bias:
            whole = whole - self.base_layer.bias.astype(ms.float32)
        return y + (g - 1.0) * whole + g * low

    def factor_in_graph(self, used: Tensor, slot: Tensor) -> Tensor:
        """g of one slot, (out,)."""
        down, up, scale = chosen(used, slot, ops.stop_gradient(self.down), ops.stop_gradient(self.up), self.scale)
        weight = self.base_layer.weight.astype(ms.float32)
        cross = (up * ops.matmul(weight, ops.transpose(down, (1, 0)))).sum(-1)
        square = (ops.matmul(up, ops.matmul(down, ops.transpose(down, (1, 0)))) * up).sum(-1)
        return factors(ops.gather(self.magnitude, slot, 0),
                       ops.stop_gradient(self.base_squares + 2 * scale * cross + scale * scale * square))
