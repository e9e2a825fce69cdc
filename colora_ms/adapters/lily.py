"""Lily on a model's Cells: ``LilyLinear``, ``StaticLilyLinear`` and ``LilyDense`` (Zhong et al., arXiv 2407.09946).

Orientation as everywhere: down (r, in), up (out, r). The down factor of a block of layers and the experts of all layers
are one Parameter each, which several Cells hold: one optimizer state, and gradients that add up. Mixing the experts and
then multiplying, as in the paper, equals multiplying each expert by its weighted part of the hidden row:
``sum_e p_e B_e h = [B_1 ... B_E] (p (x) h)``, so that the second half is a ``lora_expand`` of rank experts * r.
"""

from typing import Any

import numpy as np

import mindspore as ms
from mindspore import Parameter, Tensor, nn, ops
from mindspore.ops import constexpr

from colora_ms.adapters.cells import AdapterCell, LateActivation
from colora_ms.adapters.outside import leaf
from colora_ms.adapters.registry import Site
from colora_ms.adapters.slots import add_in_float32, get, put, stacked
from colora_ms.errors import AdapterError
from colora_ms.kernels import (
    ABSENT,
    lora_expand,
    lora_expand_reference,
    lora_shrink,
    lora_shrink_reference,
    multi_lora_linear,
)
from colora_ms.kernels.operands import linear_of
from colora_ms.models.rows import slots_of

#: Why a row of several sequences is refused.
PACKED = ("this adapter's routers pool over the tokens of a row (router_pool \"sequence\" or \"batch\"), so that "
          "packed examples would see each other; set data.packing to false, or train with router_pool \"token\" or "
          "\"static\"")


def pools_rows(net: nn.Cell) -> bool:
    """Whether Cells of a decoder pool over the tokens of a row, which must then hold a single sequence."""
    return any(isinstance(cell, LilyLinear) and cell.pooled for _, cell in net.cells_and_names())


@constexpr
def _refuse_packed():
    raise AdapterError(PACKED)


def length_mask(lengths: Tensor, x: Tensor) -> Tensor:
    """(rows, tokens) float32: 1 for the real tokens of x (rows, tokens, ...), which stand on the left.

    Args:
        lengths: (rows,) int32, or ``ABSENT``: all tokens are real.
    """
    rows, tokens = x.shape[:2]
    if lengths.ndim == 0:
        return ops.ones((rows, tokens), ms.float32)
    index = ops.arange(tokens).astype(ms.int32).reshape((1, -1))
    return (index < lengths.reshape((-1, 1))).astype(ms.float32)


def wrap_lily(cell: nn.Cell, path: str, site: Site) -> nn.Cell:
    """The Lily Cell for a base Cell (``Method.wrap``); see :class:`colora_ms.adapters.registry.Site`."""
    face = leaf(cell)
    if face.takes_rows:
        kind = StaticLilyLinear if site.target.pool == "static" else LilyLinear
    else:
        kind = face.adapted(LilyDense)
    return kind(cell, path, *face.sizes(), site)


class LilyCell(AdapterCell):
    """What the Lily Cells share: the Parameters, and the handle's face.

    Args:
        base_layer: the linear Cell; path: its name.
        in_features, out_features: its sizes.
        site: :class:`colora_ms.adapters.registry.Site` with a LilyTarget and the model's ``shared`` dict.

    Attributes:
        down: (slots, r, in) float32, shared by a block of layers; up: (slots, out, experts, r), shared by all layers;
        router: (slots, experts, r), or (slots, experts) for static weights; scale: (slots,), frozen.
        owned: the fields that are stored under this Cell's name.
    """

    kind = "linear"
    has_bias = False
    _kept_scale = None

    def __init__(self, base_layer: nn.Cell, path: str, in_features: int, out_features: int, site: Site) -> None:
        super().__init__(base_layer, path)
        target = site.target
        self.in_features, self.out_features = in_features, out_features
        self.target, self.max_rank, self.experts = target, site.max_rank, target.experts
        self.pool, self.form = target.pool, target.form

        def shared(owner, name, shape):
            key = (owner, name)
            if key not in site.shared:
                site.shared[key] = stacked(f"{owner}.{name}", shape, site.trainable)
            return site.shared[key]

        n, r = site.slots, site.max_rank
        self.down = shared(target.down_owner, "lily_A", (n, r, in_features))
        self.up = shared(target.up_owner, "lily_B", (n, out_features, self.experts, r))
        shape = (n, self.experts) if self.pool == "static" else (n, self.experts, r)
        self.router = stacked(f"{path}.lily_router", shape, site.trainable)
        self.scale = stacked(f"{path}.lily_scale", (n,), False)
        self.owned = (("down",) if target.down_owner == path else ()) + (("up",) if target.up_owner == path else ()) \
            + ("router",)

    def problems_with(self, target: Any) -> list[str]:
        """As :class:`AdapterCell` says."""
        mine = self.target
        found = []
        for name, own, other in (("experts", mine.experts, target.experts), ("router_pool", mine.pool, target.pool),
                                 ("router_form", mine.form, target.form),
                                 ("A owned by", mine.down_owner, target.down_owner),
                                 ("B owned by", mine.up_owner, target.up_owner)):
            if own != other:
                found.append(f"{self.path} was prepared for {name} {own}, the adapter has {other}")
        return found

    def write(self, slot: int, values: dict[str, np.ndarray], scaling: float) -> None:
        """As :class:`AdapterCell` says."""
        for name in self.owned:
            value = values.get(name, np.float32(0))
            if name == "up" and name in values:
                value = value.reshape(self.out_features, self.experts, -1)
            put(getattr(self, name), slot, value)
        put(self.scale, slot, np.float32(scaling if "router" in values else 0))

    def read(self, slot: int, shapes: dict[str, tuple[int, ...]]) -> dict[str, np.ndarray]:
        """As :class:`AdapterCell` says."""
        values = {}
        for name, shape in shapes.items():
            if name == "up":
                inner = (shape[0], self.experts, shape[1] // self.experts)
                values[name] = get(self.up, slot, inner).reshape(shape)
            else:
                values[name] = get(getattr(self, name), slot, shape)
        return values

    def clear(self, slot: int) -> None:
        """As :class:`AdapterCell` says."""
        for name in self.owned:
            put(getattr(self, name), slot, np.float32(0))
        put(self.scale, slot, np.float32(0))

    def parameters_of(self, slot: int) -> list[Parameter]:
        """As :class:`AdapterCell` says."""
        return [self.down, self.up, self.router]

    def static_weights(self, slot: int) -> np.ndarray:
        """The experts' fixed weights of one slot, (experts,) float64 (static only)."""
        logits = get(self.router, slot).astype(np.float64)
        weights = np.exp(logits - logits.max())
        return weights / weights.sum()

    def mixed_up(self, slot: int) -> np.ndarray:
        """The up factor of one slot, (out, r) float32: the experts in the router's fixed proportions (static only)."""
        return np.einsum("e,oer->or", self.static_weights(slot), get(self.up, slot)).astype(np.float32)

    def merge(self, slot: int) -> None:
        """As :class:`AdapterCell` says."""
        weight = leaf(self.base_layer).leaf_parameters()["weight"]
        self.keep([weight])
        add_in_float32(weight, get(self.scale, slot) * (self.mixed_up(slot) @ get(self.down, slot)))
        # The slot's own rows must not get the same change twice.
        self._kept_scale = (slot, get(self.scale, slot))
        put(self.scale, slot, np.float32(0))

    def unmerge(self) -> None:
        """As :class:`AdapterCell` says."""
        super().unmerge()
        if self._kept_scale is not None:
            put(self.scale, *self._kept_scale)
        self._kept_scale = None

    def extend_repr(self) -> str:
        """What ``repr`` adds to the name of the class."""
        return (f"max_rank={self.max_rank}, experts={self.experts}, block={self.target.block}, pool={self.pool}, "
                f"form={self.form}")


class LilyRouted(LilyCell):
    """A Lily Cell that computes the experts' weights for each input."""

    fusible = False
    #: Whether the weights are summed up in ``counts``, for :func:`colora_ms.adapters.lily_usage.expert_use`.
    counting = False

    def __init__(self, base_layer: nn.Cell, path: str, in_features: int, out_features: int, site: Site) -> None:
        super().__init__(base_layer, path, in_features, out_features, site)
        # The kernels have no gradient; whoever trains takes the built-in operators, in evaluation too.
        self.fast = not site.trainable
        self.pooled = self.pool in ("sequence", "batch")
        self.one = Tensor(np.ones(site.slots, np.float32))

    def shrink(self, x: Tensor, slots: Tensor, matrices: Tensor) -> Tensor:
        """x[row] @ matrices[slot].T, zeros where the slot is -1."""
        if self.fast:
            return lora_shrink(x, slots, matrices, self.one)
        return lora_shrink_reference(x, slots, matrices, self.one)

    def weights(self, hidden: Tensor, rows: tuple) -> Tensor:
        """The experts' weights: hidden (rows, tokens, r) -> (rows, tokens, experts), or (rows, 1, experts) if
        pooled."""
        slots, lengths = rows
        if self.pool == "static":
            return ops.expand_dims(ops.gather(ops.softmax(self.router, -1), ops.maximum(slots, 0), 0), 1)
        logits = self.shrink(hidden, slots, self.router)
        if not self.pooled:
            return ops.softmax(logits, -1)
        if lengths.ndim == 2:
            _refuse_packed()
        counted = ops.expand_dims(length_mask(lengths, hidden), -1)
        tokens = counted.sum(axis=1)  # (rows, 1)
        values = ops.softmax(logits, -1) if self.form == "code" else logits
        # where, not a product: what a padding token holds, NaN included, must not reach the sum.
        total = ops.where(counted > 0, values, ops.zeros_like(values)).sum(axis=1)  # (rows, experts)
        if self.pool == "batch":
            # Rows of the same adapter pool together; rows without one stand aside.
            same = ops.equal(slots.reshape((-1, 1)), slots.reshape((1, -1))).astype(ms.float32)
            total, tokens = ops.matmul(same, total), ops.matmul(same, tokens)
        if self.form == "code":
            mixed = total / ops.maximum(tokens, Tensor(1.0, ms.float32))
        else:
            mixed = ops.softmax(total, -1)
        return ops.expand_dims(mixed, 1)

    def count(self, weights: Tensor, hidden: Tensor, rows: tuple) -> Tensor:
        """Add the weights of all real tokens of rows with an adapter to ``counts``, and who has the largest."""
        slots, lengths = rows
        counted = length_mask(lengths, hidden) * (slots >= 0).astype(ms.float32).reshape((-1, 1))
        weights = ops.broadcast_to(weights, hidden.shape[:2] + (self.experts,)).reshape((-1, self.experts))
        first = ops.one_hot(ops.argmax(weights, 1), self.experts, 1.0, 0.0)
        counted = counted.reshape((1, -1))
        new = ops.concat((ops.matmul(counted, weights), ops.matmul(counted, first.astype(ms.float32))))
        return ops.assign_add(self.counts, new)

    def low_rank(self, x: Tensor, rows: tuple, y: Tensor) -> Tensor:
        """y plus the adapter's part: x (rows, tokens, in), y (rows, tokens, out)."""
        slots = slots_of(rows)
        hidden = self.shrink(x, slots, self.down)
        weights = self.weights(hidden, rows)
        if self.counting:
            weights = ops.depend(weights, self.count(weights, hidden, rows))
        weights = weights * ops.gather(self.scale, ops.maximum(slots, 0), 0).reshape((-1, 1, 1))
        columns = self.experts * self.max_rank
        v = (ops.expand_dims(weights, -1) * ops.expand_dims(hidden, 2)).reshape(hidden.shape[:2] + (columns,))
        up = self.up.reshape((self.up.shape[0], self.out_features, columns))
        if self.fast:
            return lora_expand(v, slots, up, y)
        return lora_expand_reference(v, slots, up, y)


class LilyLinear(LilyRouted):
    """A decoder's linear with a Lily adapter for each slot, routed by the input."""

    def construct(self, x: Tensor, rows: tuple) -> Tensor:
        """x: (rows, tokens, in) or (rows, in) float32 -> y: (..., out) float32."""
        y = self.base_layer(x, rows)
        if x.ndim == 3:
            return self.low_rank(x, rows, y)
        return self.low_rank(ops.expand_dims(x, 1), rows, ops.expand_dims(y, 1)).reshape(y.shape)


class StaticLilyLinear(LilyCell):
    """A decoder's linear with a Lily adapter for each slot whose experts have the same weights for every input.

    Such an adapter is a LoRA whose up factor is the mixture, and runs as one.
    """

    fusible = True

    def operands(self) -> tuple:
        """The linear that :func:`colora_ms.kernels.multi_lora_linear` takes."""
        weights = ops.softmax(self.router, -1)
        up = (self.up * weights.reshape((-1, 1, self.experts, 1))).sum(axis=2)
        return linear_of(self.base_layer.base(), self.down, up, self.scale)

    def construct(self, x: Tensor, rows: tuple) -> Tensor:
        """x: (rows, tokens, in) or (rows, in) float32 -> y: (..., out) float32."""
        return multi_lora_linear(x, slots_of(rows), self.operands())


class LilyDense(LateActivation, LilyRouted):
    """A linear Cell of another model (``nn.Dense``, ``mint.nn.Linear``) with a Lily adapter for each slot.

    All rows use the adapter of the shared scalar ``active_slot``. Such a Cell knows no lengths: "sequence" and "batch"
    pool over everything that one call gets, padding included.
    """

    def __init__(self, base_layer: nn.Cell, path: str, in_features: int, out_features: int, site: Site) -> None:
        super().__init__(base_layer, path, in_features, out_features, site)
        self.fast = False
        self.active_slot = site.active_slot
        self.take_activation()

    def construct(self, x: Tensor) -> Tensor:
        """x: (..., in), any float dtype -> (..., out) of the base's dtype."""
        return self.adapt(x, self.base_layer(x))

    def adapt(self, x: Tensor, y: Tensor) -> Tensor:
        """What becomes of the base's result y (..., out) for x (..., in); of y's dtype."""
        flat = x.reshape((1, -1, self.in_features)).astype(ms.float32)
        rows = (self.active_slot.reshape((1,)), ABSENT)
        total = self.low_rank(flat, rows, y.reshape((1, -1, self.out_features)).astype(ms.float32))
        y = ops.where(self.active_slot >= 0, total.reshape(y.shape).astype(y.dtype), y)
        return self.activate(y) if self.late_activation else y
