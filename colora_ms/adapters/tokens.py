"""``trainable_token_indices``: rows of the embedding, and of the head, that an adapter replaces by trained ones.

Each slot has its own ids and rows; a row of the batch sees those of its slot, and the base's to the last bit without
one. PEFT stores the rows themselves (``token_adapter.trainable_tokens_delta``), not their difference to the base.
"""

from typing import Iterable, Optional

import numpy as np

import mindspore as ms
from mindspore import Parameter, Tensor, nn, ops

from colora_ms.adapters.cells import AdapterCell
from colora_ms.adapters.outside import leaf
from colora_ms.adapters.slots import get, put, rows_where, stacked, to_float32
from colora_ms.kernels import lora_shrink, lora_shrink_reference
from colora_ms.models.rows import slots_of


class TokenRows(AdapterCell):
    """What the Cells on an embedding and on a head share: for each slot its ids and rows.

    Args:
        base_layer: the decoder's Cell, or the adapter Cell around it.
        path: its name in the model; the rows are called ``<path>.token_rows``.
        slots: adapters that it can hold; count: ids that one may replace, at most.
        size: (vocabulary, hidden size).
        trainable: whether the rows require gradients.
        source: the Cell on the module that this one is tied to, whose rows it uses too, or None.

    Attributes:
        rows: (slots, count, hidden) float32; counts: (slots,) int32, how many of them are used.
    """

    role = "tokens"
    kind = "tokens"

    def __init__(self, base_layer: nn.Cell, path: str, slots: int, count: int, size: tuple[int, int],
                 trainable: bool = True, source: Optional['TokenRows'] = None) -> None:
        super().__init__(base_layer, path)
        self.slots, self.count, (self.vocabulary, self.hidden_size) = slots, count, size
        self.tied_to = source.path if source is not None else ""
        shape = (slots, count, size[1])
        self.rows = source.rows if source is not None else stacked(f"{path}.token_rows", shape, trainable)
        self.counts = stacked(f"{path}.token_counts", (slots,), False, np.int32)
        self.trained = trainable

    @property
    def inner(self) -> nn.Cell:
        """The base module itself, inside the other adapter Cells."""
        base = self.base_layer
        while isinstance(base, AdapterCell):
            base = base.base_layer
        return base

    def problems_with(self, ids: Iterable[int]) -> list[str]:
        """Why an adapter with these ids cannot live in this Cell, as a list of sentences."""
        return [f"{self.path} has room for {self.count} trained token rows, the adapter has {len(ids)}"] \
            if len(ids) > self.count else []

    def write(self, slot: int, values: dict[str, np.ndarray], scaling: float) -> None:
        """values: {"rows": (n, hidden) float32, "ids": n ids}, or {} to clear the slot."""
        ids = np.asarray(values.get("ids", ()), np.int32)
        put(self.rows, slot, values.get("rows", np.float32(0)))
        put(self.counts, slot, len(ids))
        self.place(slot, ids)

    def place(self, slot: int, ids: np.ndarray) -> None:
        """Note which ids (n,) int32 a slot's rows belong to."""
        raise NotImplementedError

    def read(self, slot: int, shapes: dict[str, tuple[int, ...]]) -> dict[str, np.ndarray]:
        """As :class:`AdapterCell` says."""
        return {name: get(self.rows, slot, shape) for name, shape in shapes.items()}

    def clear(self, slot: int) -> None:
        """As :class:`AdapterCell` says."""
        self.write(slot, {}, 0.0)

    def parameters_of(self, slot: int) -> list[Parameter]:
        """As :class:`AdapterCell` says."""
        return [self.rows] if get(self.counts, slot) > 0 else []

    def merge(self, slot: int) -> None:
        """As :class:`AdapterCell` says."""
        ids = self.ids_of(slot)
        if len(ids):
            weight = leaf(self.inner).leaf_parameters()["weight"]
            self.keep([weight])
            merged = to_float32(weight)
            merged[ids] = get(self.rows, slot, (len(ids), self.hidden_size))
            weight.set_data(Tensor(merged).astype(weight.dtype))


class TokenEmbedding(TokenRows):
    """A decoder's embedding with other rows for some ids of each slot; arguments as for :class:`TokenRows`.

    Attributes:
        index: (slots, vocabulary) int32, the number of an id's row in its slot, -1 for the base's row.
    """

    def __init__(self, base_layer: nn.Cell, path: str, slots: int, count: int, size: tuple[int, int],
                 trainable: bool = True, source: Optional['TokenRows'] = None) -> None:
        super().__init__(base_layer, path, slots, count, size, trainable, source)
        self.index = stacked(f"{path}.token_index", (slots, size[0]), False, np.int32)
        for slot in range(slots):
            self.place(slot, np.zeros(0, np.int32))

    def place(self, slot: int, ids: np.ndarray) -> None:
        """As :class:`AdapterCell` says."""
        whole = np.full(self.vocabulary, -1, np.int32)
        whole[ids] = np.arange(len(ids), dtype=np.int32)
        put(self.index, slot, whole)

    def ids_of(self, slot: int) -> np.ndarray:
        """The ids (n,) that a slot replaces, in the order of its rows."""
        index = get(self.index, slot, (self.vocabulary,))
        ids = np.flatnonzero(index >= 0)
        return ids[np.argsort(index[ids])]

    def construct(self, ids: Tensor, rows: tuple) -> Tensor:
        """ids: (rows, tokens) int32 -> (rows, tokens, hidden) float32."""
        y, slots = self.base_layer(ids, rows), slots_of(rows)
        slot = ops.maximum(slots, 0).reshape((-1, 1))
        place = (slot * self.vocabulary + ids).reshape((-1,))
        number = ops.gather(self.index.reshape((-1,)), place, 0).reshape(ids.shape)
        own = ops.logical_and(number >= 0, slots.reshape((-1, 1)) >= 0)
        place = (slot * self.count + ops.maximum(number, 0)).reshape((-1,))
        values = ops.gather(self.rows.reshape((-1, self.hidden_size)), place, 0).reshape(y.shape)
        own = ops.expand_dims(own, 2)
        # Zeros in place of a foreign slot's rows: where() alone would let their NaN into the gradient.
        return ops.where(own, ops.where(own, values, ops.zeros_like(values)), y)


class TokenHead(TokenRows):
    """A decoder's output head with other rows for some ids of each slot; arguments as for :class:`TokenRows`.

    Attributes:
        ids: (slots, count) int32; where a slot has fewer, its first id again.
        choice: (slots, count) int32, which row stands at each place of ``ids``: its own number, or 0.
    """

    def __init__(self, base_layer: nn.Cell, path: str, slots: int, count: int, size: tuple[int, int],
                 trainable: bool = True, source: Optional['TokenRows'] = None) -> None:
        super().__init__(base_layer, path, slots, count, size, trainable, source)
        self.ids = stacked(f"{path}.token_ids", (slots, count), False, np.int32)
        self.choice = stacked(f"{path}.token_choice", (slots, count), False, np.int32)
        self.one = Tensor(np.ones(slots, np.float32))

    def place(self, slot: int, ids: np.ndarray) -> None:
        """As :class:`AdapterCell` says."""
        count = len(ids)
        filled = np.full(self.count, ids[0] if count else 0, np.int32)
        filled[:count] = ids
        choice = np.zeros(self.count, np.int32)
        choice[:count] = np.arange(count)
        put(self.ids, slot, filled)
        put(self.choice, slot, choice)

    def ids_of(self, slot: int) -> np.ndarray:
        """The ids (n,) that a slot replaces, in the order of its rows."""
        return get(self.ids, slot, (int(get(self.counts, slot)),))

    def construct(self, x: Tensor, rows: tuple) -> Tensor:
        """x: (rows, tokens, hidden) or (rows, hidden) float32 -> (..., vocabulary) float32."""
        y, slots = self.base_layer(x, rows), slots_of(rows)
        slot = ops.maximum(slots, 0)
        count = ops.gather(self.counts, slot, 0)
        owned = ops.logical_and(slots >= 0, count > 0)
        shrink = lora_shrink_reference if self.trained else lora_shrink
        own = shrink(x, slots, self.rows, self.one)  # (..., count): the logits of the slot's rows
        last = own.ndim - 1
        shape = (own.shape[0],) + (1,) * (last - 1) + (self.count,)
        choice = ops.broadcast_to(ops.gather(self.choice, slot, 0).reshape(shape), own.shape)
        column = ops.broadcast_to(ops.gather(self.ids, slot, 0).reshape(shape), own.shape)
        # A place that only fills up writes what the first one writes, and has no gradient of its own.
        number = ops.arange(self.count).astype(ms.int32).reshape((1,) * last + (-1,))
        filler = number >= count.reshape((-1,) + (1,) * last)
        own = ops.where(filler, ops.stop_gradient(ops.gather_elements(own, last, choice)), own)
        return rows_where(owned, ops.tensor_scatter_elements(y, column, own, axis=last), y)
