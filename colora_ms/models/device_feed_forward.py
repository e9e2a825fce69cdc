"""The second half of a layer of the device step: an MLP, or routed experts of which each token has a few.

Launches of routed experts, however many experts and tokens there are: Cast, MatMul (the router, float32), NanToNum,
MoeGatingTopKSoftmax, with normalised shares SumExt and Div, Cast, MoeInitRoutingV2, Cast, GroupedMatmulV4, Swiglu,
GroupedMatmulV4, MoeTokenUnpermute. MoeInitRoutingV2 puts a token's copies beside those of other tokens of the same
expert, so that each expert's weight is read once, and MoeTokenUnpermute adds a token's results times its shares. With a
shared expert MatMul, Sigmoid, Cast, its MLP, Mul and Add.

The router is float32, as the shares are: half types would round logits on which it hangs who computes a token. Shares
are rounded to the compute type where they are multiplied, as transformers rounds them.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

import mindspore as ms
from mindspore import Tensor, nn, ops

from colora_ms.kernels import ascend_builtin
from colora_ms.kernels.operands import FORMATS
from colora_ms.kernels.rehearsal_checks import MOST_AXIS, MOST_CHOSEN, MOST_GROUPS
from colora_ms.models.device_weights import FLOATS, PackedLinear, Watch, constant, device_tensor, plain

#: What stands for router logits that are infinite: finite, and beyond all others.
_FAR = 1e30


class DeviceMlp(nn.Cell):
    """``down(silu(gate) * up)``; gate and up are one product.

    Args:
        name: of its Parameters; mlp: :class:`colora_ms.models.feed_forward.Mlp`; dtype: the compute type.
    """

    def __init__(self, name: str, mlp: nn.Cell, dtype: Any) -> None:
        super().__init__()
        self.gate_up = PackedLinear(f"{name}.gate_up", (mlp.gate_linear, mlp.up_linear), dtype)
        self.down = PackedLinear(f"{name}.down_proj", (mlp.down_linear,), dtype)

    @property
    def linears(self) -> list[PackedLinear]:
        """Its linears."""
        return [self.gate_up, self.down]

    def construct(self, h: Tensor, slots: tuple) -> Tensor:
        """h: (tokens, hidden); slots: as of :class:`PackedLinear` -> (tokens, hidden)."""
        return self.down(ascend_builtin.swiglu(self.gate_up(h, slots)), slots)


class DeviceExperts(nn.Cell):
    """Routed experts, and the one that every token has, where there is one; see the head of this module.

    Args:
        name: of its Parameters; mlp: :class:`colora_ms.models.feed_forward.RoutedMlp` for which
            :func:`why_not_experts` has no reason; dtype: the compute type.

    Attributes:
        router: (experts, hidden) float32. gate_up: (experts, hidden, 2 * width), down: (experts, width, hidden).
        shared_gate: (1, hidden) float32, and shared, a :class:`DeviceMlp`; where ``has_shared``.
    """

    def __init__(self, name: str, mlp: nn.Cell, dtype: Any) -> None:
        super().__init__()
        self._sources, self._dtype = [mlp], dtype  # a list: no child of this Cell
        self.count, self.per_token, self.normalised = mlp.count, mlp.per_token, mlp.normalised
        self.has_shared = mlp.shares
        for part, kind, values in self._values():
            setattr(self, part, constant(values, kind, f"{name}.{part}"))
        if self.has_shared:
            self.shared = DeviceMlp(f"{name}.shared_expert", mlp.shared_expert, dtype)
        self._watch = Watch([plain(cell) for _, cell in routed_cells(mlp)])

    @property
    def linears(self) -> list[PackedLinear]:
        """Its linears that can have adapters."""
        return self.shared.linears if self.has_shared else []

    def construct(self, h: Tensor, slots: tuple) -> Tensor:
        """h: (tokens, hidden); slots: as of :class:`PackedLinear` -> (tokens, hidden)."""
        wide = h.astype(ms.float32)
        shares, experts = self.route(wide)
        rows, places, sizes = ascend_builtin.by_expert(h, experts, self.count)
        y = ascend_builtin.from_experts(self.grouped(rows, sizes.astype(ms.int64)), places, shares.astype(h.dtype))
        if self.has_shared:
            share = ops.sigmoid(ascend_builtin.linear(wide, self.shared_gate)).astype(h.dtype)
            y = ascend_builtin.add(y, ascend_builtin.scaled_rows(self.shared(h, slots), share))
        return y

    def route(self, wide: Tensor) -> tuple:
        """wide: (tokens, hidden) float32 -> shares (tokens, per_token) float32, and whose they are, int32.

        A row that an adapter has spoiled has logits that are no numbers. What MoeGatingTopKSoftmax takes for their
        experts is not told, and MoeInitRoutingV2 counts it, in a group that others may have; so such a row is sent
        somewhere, and its experts' results are no numbers because it has none.
        """
        logits = ops.nan_to_num(ascend_builtin.linear(wide, self.router), 0.0, _FAR, -_FAR)
        shares, experts = ascend_builtin.top_experts(logits, self.per_token)
        if self.normalised:
            shares = shares / shares.sum(-1, keepdims=True)
        return shares, experts

    def grouped(self, rows: Tensor, sizes: Tensor) -> Tensor:
        """rows: (tokens * per_token, hidden), an expert's beside each other; sizes: (experts,) int64, how many each
        has -> what the experts make of them."""
        inner = ascend_builtin.swiglu(ascend_builtin.grouped_linear(rows, self.gate_up, sizes, True))
        return ascend_builtin.grouped_linear(inner, self.down, sizes, True)

    def refresh(self, trained: bool) -> None:
        """As :meth:`PackedLinear.refresh`; the shared expert's linears are the decoder's to refresh."""
        if self._watch.changed(trained):
            for part, kind, values in self._values():
                parameter = getattr(self, part)
                parameter.set_data(device_tensor(values, kind, parameter.name))

    def _values(self) -> Iterator[tuple[str, Any, np.ndarray]]:
        """(part, dtype, values) of the weights that stand here."""
        mlp = self._sources[0]
        yield "router", ms.float32, _weight(mlp.gate)
        yield "gate_up", self._dtype, np.stack([np.concatenate((_weight(one.gate_linear), _weight(one.up_linear))).T
                                                for one in mlp.experts])
        yield "down", self._dtype, np.stack([_weight(one.down_linear).T for one in mlp.experts])
        if mlp.shares:
            yield "shared_gate", ms.float32, _weight(mlp.shared_expert_gate)


def device_feed_forward(name: str, mlp: nn.Cell, dtype: Any) -> nn.Cell:
    """The second half of a layer; name: of the layer, in the names of Parameters."""
    return (DeviceExperts if is_sparse(mlp) else DeviceMlp)(name, mlp, dtype)


def is_sparse(mlp: nn.Cell) -> bool:
    """Whether the second half of a layer is routed experts."""
    return hasattr(mlp, "experts")


def routed_cells(mlp: nn.Cell) -> Iterator[tuple[str, nn.Cell]]:
    """(name, Cell) of the linears of routed experts that are no MLP's: router, experts, gate of the shared expert."""
    yield "gate", mlp.gate
    for i, expert in enumerate(mlp.experts):
        for part in expert.parts_names:
            yield f"experts.{i}.{part}", getattr(expert, part)
    if mlp.shares:
        yield "shared_expert_gate", mlp.shared_expert_gate


def why_not_experts(mlp: nn.Cell) -> str:
    """Why routed experts cannot be computed by :class:`DeviceExperts`, "" if they can."""
    if mlp.count > MOST_GROUPS or mlp.per_token > MOST_CHOSEN:
        return (f"{mlp.count} experts, {mlp.per_token} a token; the device's grouped products take {MOST_GROUPS}, "
                f"{MOST_CHOSEN} a token")
    for name, cell in routed_cells(mlp):
        leaf = plain(cell)
        if cell is not leaf or not cell.fusible:
            return (f"{name} is a {type(cell).__name__}; the device step has adapters on attention and the shared "
                    "expert, not on routed experts or what chooses them")
        kept = FORMATS[leaf.operands()[0][0]][0]
        if kept not in FLOATS:
            return (f"{name} is kept as {kept}; the device's grouped products take {' or '.join(FLOATS)}: load the "
                    'model with weight_format="bfloat16"')
        if leaf.has_bias:
            return f"{name} has a bias; the device's grouped products have none"
        if max(leaf.in_features, 2 * leaf.out_features) > MOST_AXIS:
            return (f"{name} has {leaf.in_features} inputs and {leaf.out_features} outputs; the device's grouped "
                    f"products take axes up to {MOST_AXIS}, gate and up together")
    return ""


def _weight(cell: nn.Cell) -> np.ndarray:
    """(out, in) float32."""
    return plain(cell).base_values()["weight"]
