"""LoRA on Cells of other models: ``nn.Dense``, ``mint.nn.Linear``, embeddings, and anything saved whole.

Such Cells take no slots, so that one adapter holds for the whole batch: all of them read it from one shared scalar
Parameter (int32, -1 = none). Changing that Parameter changes the adapter and compiles nothing.
"""

import copy
from typing import Optional

import numpy as np

import mindspore as ms
from mindspore import Parameter, Tensor, nn, ops

from colora_ms.adapters.cells import LateActivation, LowRankCell, SavedBase
from colora_ms.adapters.dropout import Dropout
from colora_ms.adapters.outside import leaf
from colora_ms.adapters.slots import get, stacked


class LoraDense(LateActivation, LowRankCell):
    """A linear Cell with a low-rank pair, and if asked biases, for each slot.

    The pair is float32 and its product is added in float32, then cast to what the base returns.

    Args:
        base_layer: a linear Cell, that is called with x (..., in).
        path, slots, max_rank, dropout, bias, trainable, up_bias: as for :class:`colora_ms.adapters.lora.LoraLinear`.
        active_slot: the shared scalar Parameter.
    """

    kind = "linear"

    def __init__(self, base_layer: nn.Cell, path: str, active_slot: Parameter, slots: int, max_rank: int,
                 dropout: Optional[Dropout] = None, bias: bool = False, trainable: bool = True,
                 up_bias: bool = False) -> None:
        super().__init__(base_layer, path)
        self.active_slot = active_slot
        self.max_rank = max_rank
        in_features, out_features = leaf(base_layer).sizes()
        if max_rank:
            self.make_pair(("lora_A", "lora_B"), (slots, max_rank, in_features), (slots, out_features, max_rank),
                           trainable)
        self.has_bias = bias
        if bias:
            self.make_bias(slots, out_features, trainable)
        self.has_up_bias = up_bias
        if up_bias:
            self.make_up_bias(slots, out_features, trainable)
        self.dropout = dropout
        self.take_activation()

    def construct(self, x: Tensor) -> Tensor:
        """x: (..., in), any float dtype -> (..., out) of the base's dtype."""
        return self.adapt(x, self.base_layer(x))

    def adapt(self, x: Tensor, y: Tensor) -> Tensor:
        """What becomes of the base's result y (..., out) for x (..., in); of y's dtype."""
        used = self.active_slot >= 0
        slot = ops.maximum(self.active_slot, 0)
        total = y.astype(ms.float32)
        if self.max_rank:
            total = self.product(x, total, used, slot)
        if self.has_up_bias:
            total = total + ops.gather(self.scale, slot, 0) * ops.gather(self.up_bias, slot, 0)
        if self.has_bias:
            change = ops.gather(self.bias, slot, 0) - self.base_layer.bias.astype(ms.float32)
            owned = ops.gather(self.bias_owned, slot, 0) > 0
            total = ops.where(owned, total + change, total)
        y = ops.where(used, total.astype(y.dtype), y)
        return self.activate(y) if self.late_activation else y

    def product(self, x: Tensor, y: Tensor, used: Tensor, slot: Tensor) -> Tensor:
        """The base's result y, in float32, with the low-rank part of x added."""
        inputs = x if self.dropout is None else self.dropout(x)
        return y + low_rank(inputs, used, slot, self.down, self.up, self.scale)


class LoraLookup(LowRankCell):
    """An embedding Cell, called with ids of any shape, with a low-rank pair for each slot; see ``LoraEmbedding``."""

    kind = "embedding"

    def __init__(self, base_layer: nn.Cell, path: str, active_slot: Parameter, slots: int, max_rank: int,
                 trainable: bool = True) -> None:
        super().__init__(base_layer, path)
        self.active_slot = active_slot
        self.max_rank = max_rank
        vocab, hidden = leaf(base_layer).sizes()
        self.make_pair(("lora_embedding_A", "lora_embedding_B"), (slots, vocab, max_rank), (slots, hidden, max_rank),
                       trainable)

    def construct(self, ids: Tensor) -> Tensor:
        """ids: (...) integers -> (..., hidden) of the base's dtype."""
        y = self.base_layer(ids)
        used = self.active_slot >= 0
        slot = ops.maximum(self.active_slot, 0)
        down, up, scale = chosen(used, slot, self.down, self.up, self.scale)
        v = ops.gather(down, ids.reshape((-1,)), 0) * scale
        delta = ops.matmul(v, ops.transpose(up, (1, 0))).reshape(y.shape)
        return ops.where(used, (y.astype(ms.float32) + delta).astype(y.dtype), y)

    def change(self, slot: int) -> np.ndarray:
        """What a slot adds to the base weight, (vocab, hidden) float32."""
        return get(self.scale, slot) * (get(self.down, slot) @ get(self.up, slot).T)


class SavedCell(SavedBase):
    """Any Cell from one tensor to one tensor, with a copy of the whole Cell for each slot (``modules_to_save``)."""

    def __init__(self, base_layer: nn.Cell, path: str, active_slot: Parameter, slots: int,
                 trainable: bool = True) -> None:
        super().__init__(base_layer, path)
        self.active_slot = active_slot
        self.owned = stacked(f"{path}.saved_owned", (slots,), False, np.int32)
        inner = self.inner
        copies = []
        for slot in range(slots):
            twin = copy.deepcopy(inner)
            for name, parameter in leaf(twin).leaf_parameters().items():
                parameter.name = f"{path}.saved_{slot}.{name}"
                parameter.requires_grad = trainable
            copies.append(twin)
        self.copies = nn.CellList(copies, auto_prefix=False)

    def construct(self, x: Tensor) -> Tensor:
        """As the base Cell is called."""
        y = self.base_layer(x)
        used = self.active_slot >= 0
        owned = ops.gather(self.owned, ops.maximum(self.active_slot, 0), 0) > 0
        used = ops.logical_and(used, owned)
        for slot, twin in enumerate(self.copies):
            y = ops.where(ops.logical_and(used, ops.equal(self.active_slot, slot)), twin(x), y)
        return y


def chosen(used: Tensor, slot: Tensor, down: Tensor, up: Tensor, scale: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """One slot of the stacked pair; zeros where no adapter is used, so that what slot 0 holds reaches no gradient."""
    down = ops.gather(down, slot, 0)
    up = ops.gather(up, slot, 0)
    return (ops.where(used, down, ops.zeros_like(down)), ops.where(used, up, ops.zeros_like(up)),
            ops.gather(scale, slot, 0))


def low_rank(x: Tensor, used: Tensor, slot: Tensor, down: Tensor, up: Tensor, scale: Tensor) -> Tensor:
    """scale * up (down x) of one slot, float32; x: (..., in) -> (..., out)."""
    down, up, scale = chosen(used, slot, down, up, scale)
    flat = x.reshape((-1, x.shape[-1])).astype(ms.float32)
    v = ops.matmul(flat, ops.transpose(down, (1, 0))) * scale
    return ops.matmul(v, ops.transpose(up, (1, 0))).reshape(x.shape[:-1] + (up.shape[0],))
