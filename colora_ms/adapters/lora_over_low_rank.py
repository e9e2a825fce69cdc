"""LoRA over a decomposed linear: the pair goes around the whole chain of factors, from its input to its output."""

from mindspore import ops

from colora_ms.adapters.lora import LoraLinear
from colora_ms.adapters.slots import owned_slots, rows_where
from colora_ms.kernels import lora_expand, lora_expand_reference, lora_shrink, lora_shrink_reference


class LoraOverLowRank(LoraLinear):
    """:class:`LoraLinear` on a :class:`colora_ms.models.low_rank.LowRankLinear`: ``y = chain(x) + scale * up (down x)``.

    The chain is no matrix that the pair could share a kernel call with. Adapters that only serve use the two operators
    of the halves; trainable ones use their reference forms, which have gradients.
    """

    fusible = False

    def __init__(self, base_layer, path, slots, max_rank, dropout=0.0, bias=False, trainable=True):
        super().__init__(base_layer, path, slots, max_rank, dropout, bias, trainable)
        self.differentiable = trainable

    def operands(self):
        raise NotImplementedError("a decomposed linear is a chain of three products; call the Cell itself")

    def construct(self, x, slots):
        """x: (rows, tokens, in) or (rows, in) float32; slots: (rows,) int32 -> y: (..., out) float32."""
        y = self.base_layer(x, slots)
        if self.max_rank:
            if self.differentiable:
                inputs = self.dropout(x) if self.drops else x
                y = lora_expand_reference(lora_shrink_reference(inputs, slots, self.down, self.scale), slots, self.up, y)
            else:
                y = lora_expand(lora_shrink(x, slots, self.down, self.scale), slots, self.up, y)
        if self.has_bias:
            own = owned_slots(slots, self.bias_owned)
            change = ops.gather(self.bias, ops.maximum(own, 0), 0) - self.base_layer.bias
            if y.ndim == 3:
                change = ops.expand_dims(change, 1)
            y = rows_where(own >= 0, y + change, y)
        return y
