"""LR-QAT: quantisation-aware training through a low-rank correction on the integer grid (arXiv 2406.06385, eq. 8).

    W^ = s * clip(round(phi + (alpha / r) * up @ down), low, high)        y = x @ W^.T + bias

phi = phi(W0 / s0) is frozen and stored in 8 bits; s starts at s0 and is learned, as are up (zeros) and down. One unit
of ``up @ down`` is one step of the grid. After training only integers and s are left: a plain quantised linear.

The forward hands the integers to the same kernel that runs the exported model (:func:`multi_lora_linear` with int4 or
int8 weights), so that training and inference agree to the last bit. Nothing of a weight's size is kept for the
backward: integers and mask are computed again from phi, up and down.
"""

from __future__ import annotations

import functools
from typing import Any, Optional

import numpy as np

import mindspore as ms
from mindspore import Parameter, Tensor, nn, ops

from colora_ms.kernels import ABSENT, bind, multi_lora_linear
from colora_ms.kernels.operands import base_of, linear_of
from colora_ms.models.activation_quant import ActivationQuantizer
from colora_ms.models.formats import StoredWeight
from colora_ms.models.rows import slots_of
from colora_ms.quantization.config import LrQatConfig
from colora_ms.quantization.grids import SMALLEST_SCALE, Grid, downcast, round_to_grid, search_range


class QuantizedMatmul(nn.Cell):
    """``x @ W^.T + bias`` with the straight-through gradients of LR-QAT.

    With Z = phi + scaling * up @ down, G = dL/dW^ and m = 1 where round(Z) lies on the grid:

        d_up = scaling * (s G m) @ down.T    d_down = scaling * up.T @ (s G m)    d_s = sum over a row of G * W_int
        d_phi = s G m   (full-rank form only)

    d_s is not LSQ's gradient: Z does not contain s.

    Args:
        grid: :class:`colora_ms.quantization.grids.Grid`.
        out_features, in_features: the weight's shape.
        how: the downcast of phi: "float", "fixed" or "int".
        scaling: alpha / r; None in the full-rank form, where phi itself (float32) is trained.
    """

    def __init__(self, grid: Grid, out_features: int, in_features: int, how: str, scaling: Optional[float]) -> None:
        super().__init__(auto_prefix=False)
        bind()
        group = grid.group_of(in_features)
        self.weight_shape = (out_features, in_features)
        self.row_shape = (out_features * in_features // group, group)
        self.levels, self.symmetric = float(grid.levels), grid.symmetric
        self.lowest = float(grid.lowest)
        container = grid.container(in_features)
        self.packed, self.element = container.values > 1, getattr(ms, container.element)
        self.tag = container.tag
        self.how, self.step = how, 2.0 ** (grid.bits - 8)
        self.full_rank, self.scaling = scaling is None, 0.0 if scaling is None else float(scaling)
        self.rint = ops.Rint()
        self.matmul = ops.MatMul()
        self.left = ops.MatMul(transpose_a=True)
        self.right = ops.MatMul(transpose_b=True)
        self.nibbles = Tensor([[1.0], [16.0]], ms.float32)

    def rounded(self, phi: Tensor, low: Tensor, up: Tensor, down: Tensor) -> Tensor:
        """round(Z) as float32 (rows, inputs of one scale)."""
        value = phi.astype(ms.float32).reshape(self.row_shape)
        if self.how == "fixed":
            value = value * self.step
            if not self.symmetric:
                value = value + (low - self.lowest)
        if self.full_rank:
            return self.rint(value)
        change = self.matmul(up, down).reshape(self.row_shape)
        if self.scaling != 1.0:
            change = change * self.scaling
        if self.how == "int":
            return value + self.rint(change)
        return self.rint(value + change)

    def clipped(self, rounded: Tensor, low: Tensor) -> Tensor:
        """The integers as float32."""
        if self.symmetric:
            return ops.minimum(ops.maximum(rounded, self.lowest), self.lowest + self.levels)
        return ops.minimum(ops.maximum(rounded, low), low + self.levels)

    def integers(self, phi: Tensor, low: Tensor, up: Tensor, down: Tensor) -> Tensor:
        """The integers in their container: (out, in / 2) uint8 or (out, in) int8."""
        q = self.clipped(self.rounded(phi, low, up, down), low)
        if not self.packed:
            return q.reshape(self.weight_shape).astype(self.element)
        # Two neighbours make a byte; a product of small integers is exact, and faster than strided slices.
        pairs = self.matmul((q + 8.0).reshape((-1, 2)), self.nibbles)
        return pairs.reshape((self.weight_shape[0], self.weight_shape[1] // 2)).astype(self.element)

    def construct(self, x: Tensor, slots: Tensor, phi: Tensor, low: Tensor, up: Tensor, down: Tensor, scale: Tensor,
                  bias: Tensor) -> Tensor:
        """x: (rows, tokens, in) or (rows, in) float32; slots: (rows,) int32 -> (..., out) float32.

        Args:
            phi: (out, in) int8 or float32; low: (out * groups, 1) float32; up: (out, r); down: (r, in);
            scale: (out, groups) float32; bias: (out,) or ABSENT.
        """
        # Tied to x, or the scheduler may build the integers of all layers before it runs the first one.
        weight = self.integers(ops.depend(phi, x), low, ops.depend(up, x), down)
        return multi_lora_linear(x, slots,
                                 linear_of(base_of(self.tag, weight, ops.maximum(scale, SMALLEST_SCALE), bias)))

    def bprop(self, x: Tensor, slots: Tensor, phi: Tensor, low: Tensor, up: Tensor, down: Tensor, scale: Tensor,
              bias: Tensor, out: Tensor, dout: Tensor) -> tuple:
        """Gradients of x, up, down, scale (and phi in the full-rank form); zeros for the rest."""
        # Tied to dout, or what the forward computed would be kept in place of being computed again.
        z = self.rounded(ops.depend(phi, dout), low, ops.depend(up, dout), down)
        q = self.clipped(z, low)
        s = ops.maximum(scale, SMALLEST_SCALE).reshape((-1, 1))
        flat, dy = x.reshape((-1, x.shape[-1])), dout.reshape((-1, dout.shape[-1]))
        dx = self.matmul(dy, (q * s).reshape(self.weight_shape)).reshape(x.shape)
        g = self.left(dy, flat).reshape(self.row_shape)
        d_scale = (g * q).sum(1).reshape(scale.shape)
        inside = (g * s * (z == q).astype(ms.float32)).reshape(self.weight_shape)
        d_phi, d_up, d_down = ops.zeros_like(phi), ops.zeros_like(up), ops.zeros_like(down)
        if self.full_rank:
            d_phi = inside
        else:
            d_up = self.right(inside, down) * self.scaling
            d_down = self.left(up, inside) * self.scaling
        # The layer below waits for these: else the temporaries of several layers would be alive together.
        dx = ops.depend(dx, (d_scale, d_phi) if self.full_rank else (d_scale, d_up, d_down))
        return (dx, ops.zeros_like(slots), d_phi, ops.zeros_like(low), d_up, d_down, d_scale, ops.zeros_like(bias))


@functools.lru_cache(maxsize=None)
def shared_matmul(*settings: Any) -> QuantizedMatmul:
    """One :class:`QuantizedMatmul` for all linears of a shape: it holds no Parameters; parsed once, not 200 times."""
    return QuantizedMatmul(*settings)


class LrQatLinear(nn.Cell):
    """A decoder's linear in quantisation-aware training.

    Args:
        base: :class:`colora_ms.models.layers.Linear` with a float weight; only its bias is kept.
        path: its name in the model; Parameters are called ``<path>.phi``, ``.low``, ``.lrqat_up``, ``.lrqat_down`` and
            ``.learned_scale``.
        weight: (out, in) float32 array, the pretrained weight.
        config: :class:`colora_ms.quantization.config.LrQatConfig`.
        random: numpy Generator for the start of ``down``.

    Attributes:
        phi: (out, in) int8 or float32, frozen (trained where ``config.method`` is "full").
        up: (out, r) zeros; down: (r, in) uniform on +-1/sqrt(in) (Kaiming); scale: (out, groups) float32.
    """

    fusible = False

    def __init__(self, base: nn.Cell, path: str, weight: np.ndarray, config: LrQatConfig,
                 random: np.random.Generator) -> None:
        super().__init__(auto_prefix=False)
        bind()
        self.path, self.config, self.grid = path, config, config.grid
        self.out_features, self.in_features = base.out_features, base.in_features
        self.bias, self.has_bias = base.bias, base.has_bias
        rows = self.grid.rows(np.ascontiguousarray(weight, np.float32), path)
        scale, low = search_range(rows, self.grid, config.range_norm, config.range_candidates)
        how = "float" if config.method == "full" else config.downcast
        phi = downcast(rows, scale, low, self.grid, how).reshape(weight.shape)
        trains = config.method
        self.phi = Parameter(Tensor(phi), name=f"{path}.phi", requires_grad=trains == "full")
        self.low = Parameter(Tensor(low[:, None].astype(np.float32)), name=f"{path}.low", requires_grad=False)
        self.scale = Parameter(Tensor(scale.reshape(self.out_features, -1)), name=f"{path}.learned_scale",
                               requires_grad=config.learn_scale and trains != "rtn")
        self.low_rank = trains == "lrqat"
        if self.low_rank:
            bound = np.float32(1 / np.sqrt(self.in_features))
            down = random.uniform(-bound, bound, (config.r, self.in_features)).astype(np.float32)
            self.down = Parameter(Tensor(down), name=f"{path}.lrqat_down")
            self.up = Parameter(Tensor(np.zeros((self.out_features, config.r), np.float32)), name=f"{path}.lrqat_up")
        else:
            self.down = self.up = ABSENT
        self.matmul = shared_matmul(self.grid, self.out_features, self.in_features, how,
                                    config.scaling if self.low_rank else None)
        inputs, outputs = config.activation_bits(path)
        self.quantize_input = ActivationQuantizer(inputs) if inputs else None
        self.quantize_output = ActivationQuantizer(outputs) if outputs else None

    def construct(self, x: Tensor, rows: tuple) -> Tensor:
        """x: (rows, tokens, in) or (rows, in) -> y: (..., out) float32."""
        if self.quantize_input is not None:
            x = self.quantize_input(x)
        y = self.matmul(x, slots_of(rows), self.phi, self.low, self.up, self.down, self.scale, self.bias)
        return y if self.quantize_output is None else self.quantize_output(y)

    def trained(self) -> dict[str, Parameter]:
        """{field: Parameter} of what is trained or would be, in the order of the files."""
        found = {"scale": self.scale}
        if self.low_rank:
            found.update(up=self.up, down=self.down)
        elif self.config.method == "full":
            found["phi"] = self.phi
        return found

    def exported_scale(self) -> np.ndarray:
        """The scales as the forward uses them, (out, groups) float32 array."""
        return np.maximum(self.scale.asnumpy(), SMALLEST_SCALE)

    def extend_repr(self) -> str:
        """What ``repr`` adds to the name of the class."""
        return (f"in_features={self.in_features}, out_features={self.out_features}, bits={self.grid.bits}, "
                f"method={self.config.method}")


def round_to_nearest(weight: np.ndarray, config: LrQatConfig, name: str = "the weight") -> StoredWeight:
    """The baseline: a weight (out, in) float32 as integers with a scale (out, groups), no training."""
    rows = config.grid.rows(np.ascontiguousarray(weight, np.float32), name)
    scale, low = search_range(rows, config.grid, config.range_norm, config.range_candidates)
    q = round_to_grid(rows, scale, low, config.grid).reshape(weight.shape)
    return config.grid.container(q.shape[1]).of_integers(q, scale.reshape(weight.shape[0], -1))
