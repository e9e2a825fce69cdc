"""LoRA over a decomposed linear: the pair goes around the whole chain of factors, from its input to its output."""

from typing import Optional

from mindspore import Tensor, nn

from colora_ms.adapters.dropout import Dropout
from colora_ms.adapters.lora import LoraLinear
from colora_ms.kernels import lora_expand, lora_expand_reference, lora_shrink, lora_shrink_reference
from colora_ms.models.rows import slots_of


class LoraOverLowRank(LoraLinear):
    """:class:`LoraLinear` on a :class:`colora_ms.models.low_rank.LowRankLinear`: ``y = chain(x) + scale * up (down
    x)``.

    The chain is no matrix that the pair could share a kernel call with. Adapters that only serve use the two operators
    of the halves; trainable ones use their reference forms, which have gradients.
    """

    fusible = False

    def __init__(self, base_layer: nn.Cell, path: str, slots: int, max_rank: int, dropout: Optional[Dropout] = None,
                 bias: bool = False, trainable: bool = True) -> None:
        super().__init__(base_layer, path, slots, max_rank, dropout, bias, trainable)
        self.differentiable = trainable

    def operands(self) -> tuple:
        """As :class:`AdapterCell` says."""
        raise NotImplementedError("a decomposed linear is a chain of products; call the Cell itself")

    def product(self, x: Tensor, rows: tuple) -> Tensor:
        """The chain and the low-rank pair; x, rows and the result as in ``construct``."""
        y, slots = self.base_layer(x, rows), slots_of(rows)
        if not self.max_rank:
            return y
        if self.differentiable:
            inputs = self.dropout(x) if self.drops else x
            v = lora_shrink_reference(inputs, slots, self.down, self.scale)
            return lora_expand_reference(v, slots, self.up, y)
        return lora_expand(lora_shrink(x, slots, self.down, self.scale), slots, self.up, y)
