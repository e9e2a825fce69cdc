"""LoRA on the decoder's Cells: ``LoraLinear`` and ``LoraEmbedding`` (Hu et al., arXiv 2106.09685).

Several adapters live in one Cell, one slot each; every row of a batch says by its slot which one it uses. Orientation:
down (r, in), up (out, r), ``y = W x + scale * up (down x)``. A rank below the widest is padded with zeros, which
changes nothing.
"""

from typing import Any, Optional

import numpy as np

from mindspore import Tensor, nn, ops

from colora_ms.adapters.cells import LowRankCell
from colora_ms.adapters.dropout import Dropout
from colora_ms.adapters.matching import Module, Target
from colora_ms.adapters.slots import get, owned_slots, rows_where
from colora_ms.kernels import ABSENT, lora_expand_reference, lora_shrink_reference, multi_lora_linear
from colora_ms.kernels.operands import linear_of
from colora_ms.models.rows import slots_of


class LoraLinear(LowRankCell):
    """A decoder's linear with a low-rank pair, and if asked biases, for each slot.

    Args:
        base_layer: :class:`colora_ms.models.layers.Linear` in any weight format, or
            :class:`colora_ms.models.low_rank.LowRankLinear`; it is not changed.
        path: its name in the model; the new Parameters are called ``<path>.lora_A`` (down), ``<path>.lora_B`` (up),
            ``<path>.lora_scale`` and ``<path>.lora_bias``.
        slots: adapters that it can hold.
        max_rank: largest rank; 0 for a bias alone.
        dropout: :class:`colora_ms.adapters.dropout.Dropout` for the inputs of the low-rank branch, or None.
        bias: whether a slot may have its own bias.
        trainable: whether the new Parameters require gradients.
        up_bias: whether a slot may have a bias on the result of ``up`` (``lora_bias``).
        dtype: of the pair, float32 or ``mindspore.bfloat16`` (half the memory to read, for adapters that only serve).

    Attributes:
        down: (slots, max_rank, in); up: (slots, out, max_rank); scale: (slots,) float32, frozen.
    """

    kind = "linear"

    def __init__(self, base_layer: nn.Cell, path: str, slots: int, max_rank: int, dropout: Optional[Dropout] = None,
                 bias: bool = False, trainable: bool = True, up_bias: bool = False, dtype: Any = np.float32) -> None:
        super().__init__(base_layer, path)
        self.in_features, self.out_features = base_layer.in_features, base_layer.out_features
        self.max_rank = max_rank
        if max_rank:
            self.make_pair(("lora_A", "lora_B"), (slots, max_rank, self.in_features),
                           (slots, self.out_features, max_rank), trainable, dtype)
        else:
            self.down, self.up, self.scale = ABSENT, ABSENT, ABSENT
        self.has_bias = bias
        if bias:
            self.make_bias(slots, self.out_features, trainable)
        self.has_up_bias = up_bias
        if up_bias:
            self.make_up_bias(slots, self.out_features, trainable)
        self.dropout = dropout

    @property
    def fusible(self) -> bool:
        """Whether ``operands()`` tells all that the Cell computes (no dropout now, no bias of a slot)."""
        return not (self.has_bias or self.has_up_bias or self.drops)

    @property
    def drops(self) -> bool:
        """Whether inputs of the low-rank branch are dropped: with dropout, in training."""
        return self.dropout is not None and self.training

    def operands(self) -> tuple:
        """The linear that :func:`colora_ms.kernels.multi_lora_linear` takes."""
        return linear_of(self.base_layer.base(), self.down, self.up, self.scale)

    def construct(self, x: Tensor, rows: tuple) -> Tensor:
        """x: (rows, tokens, in) or (rows, in) float32 -> y: (..., out) float32."""
        y, slots = self.product(x, rows), slots_of(rows)
        if self.has_up_bias:
            slot = ops.maximum(slots, 0)
            change = ops.gather(self.up_bias, slot, 0) * ops.gather(self.scale, slot, 0).reshape((-1, 1))
            if y.ndim == 3:
                change = ops.expand_dims(change, 1)
            y = rows_where(slots >= 0, y + change, y)
        if self.has_bias:
            own = owned_slots(slots, self.bias_owned)
            change = ops.gather(self.bias, ops.maximum(own, 0), 0) - self.base_layer.bias
            if y.ndim == 3:
                change = ops.expand_dims(change, 1)
            y = rows_where(own >= 0, y + change, y)
        return y

    def product(self, x: Tensor, rows: tuple) -> Tensor:
        """The base linear and the low-rank pair; x, rows and the result as in :meth:`construct`."""
        slots = slots_of(rows)
        if self.drops:
            v = lora_shrink_reference(self.dropout(x), slots, self.down, self.scale)
            return lora_expand_reference(v, slots, self.up, self.base_layer(x, rows))
        return multi_lora_linear(x, slots, self.operands())

    def extend_repr(self) -> str:
        """What ``repr`` adds to the name of the class."""
        return f"max_rank={self.max_rank}, dropout={self.dropout.rate if self.dropout else 0.0}, bias={self.has_bias}"


class LoraEmbedding(LowRankCell):
    """A decoder's embedding with a low-rank pair for each slot: ``y = W[id] + scale * (down[id] @ up.T)``.

    Args:
        base_layer: :class:`colora_ms.models.layers.Embedding` in any weight format.
        path, slots, max_rank, trainable: as for :class:`LoraLinear`; the Parameters are called
            ``<path>.lora_embedding_A`` and ``<path>.lora_embedding_B``. Dropout does not apply to token ids.

    Attributes:
        down: (slots, vocab, max_rank) float32: a row a token; up: (slots, hidden, max_rank) float32.
    """

    kind = "embedding"

    def __init__(self, base_layer: nn.Cell, path: str, slots: int, max_rank: int, trainable: bool = True) -> None:
        super().__init__(base_layer, path)
        vocab = base_layer.weight.shape[0]
        self.max_rank = max_rank
        self.vocab = vocab
        self.make_pair(("lora_embedding_A", "lora_embedding_B"), (slots, vocab, max_rank),
                       (slots, base_layer.hidden_size, max_rank), trainable)

    def construct(self, ids: Tensor, rows: tuple) -> Tensor:
        """ids: (rows, tokens) int32 -> (rows, tokens, hidden) float32."""
        y, slots = self.base_layer(ids, rows), slots_of(rows)
        used = slots >= 0
        slot = ops.maximum(slots, 0)
        index = ids + (slot * self.vocab).reshape((-1, 1))
        table = self.down.reshape((-1, self.max_rank))
        v = ops.gather(table, index.reshape((-1,)), 0).reshape(ids.shape + (self.max_rank,))
        v = v * ops.gather(self.scale, slot, 0).reshape((-1, 1, 1))
        up = ops.gather(self.up, slot, 0)
        # Zeros in place of a foreign slot's values: where() alone would let its NaN into the gradient.
        v = rows_where(used, v, ops.zeros_like(v))
        up = rows_where(used, up, ops.zeros_like(up))
        return rows_where(used, y + ops.bmm(v, ops.transpose(up, (0, 2, 1))), y)

    def change(self, slot: int) -> np.ndarray:
        """What a slot adds to the base weight, (vocab, hidden) float32."""
        return get(self.scale, slot) * (get(self.down, slot) @ get(self.up, slot).T)



def initial_values(config: Any, target: Target, module: Module, random: np.random.Generator) -> dict[str, np.ndarray]:
    """The values that a new adapter starts from.

    Args:
        config: LoraConfig; target: :class:`colora_ms.adapters.matching.Target`; module: its Module.
        random: numpy Generator.

    Returns:
        {"down": array, "up": array} float32; down is (r, in), for an embedding (vocab, r); up is (out, r).
    """
    r, inner, out = target.r, module.in_features, module.out_features
    if target.kind == "embedding":
        # The other way round, as in PEFT: down zero, up normal.
        up = random.standard_normal((out, r), np.float32)
        if config.init_lora_weights is False:
            return {"down": random.standard_normal((inner, r), np.float32), "up": up}
        return {"down": np.zeros((inner, r), np.float32), "up": up}
    if config.init_lora_weights == "gaussian":
        down = random.standard_normal((r, inner), np.float32) / np.float32(r)
        return {"down": down, "up": np.zeros((out, r), np.float32)}
    # Kaiming-uniform with a = sqrt(5) is the uniform distribution on +-1/sqrt(in).
    down = random.uniform(-1, 1, (r, inner)).astype(np.float32) / np.float32(np.sqrt(inner))
    if config.init_lora_weights is False:
        return {"down": down, "up": random.uniform(-1, 1, (out, r)).astype(np.float32) / np.float32(np.sqrt(r))}
    return {"down": down, "up": np.zeros((out, r), np.float32)}
