"""``modules_to_save``: modules that an adapter replaces by trained copies of its own.

Rows without such an adapter use the base module, so that mixed batches stay right.
"""

import numpy as np

from mindspore import Parameter, Tensor, nn

from colora_ms.adapters.cells import SavedBase
from colora_ms.adapters.slots import owned_slots, rows_where, stacked
from colora_ms.kernels import multi_lora_linear_reference
from colora_ms.models.layers import Embedding, Linear, RMSNorm


class TrainableLinear(Linear):
    """A linear whose weight and bias have gradients: the fast operator takes the weight to be frozen."""

    def construct(self, x, slots):
        return multi_lora_linear_reference(x, slots, self.operands())


class SavedModule(SavedBase):
    """One of the decoder's Cells with a float32 copy of its weights for each slot.

    Args:
        base_layer: a decoder's Linear, Embedding or RMSNorm, or the LoRA Cell around it.
        path: its name in the model; the copies are called ``<path>.saved_<slot>.weight`` (and ``.bias``).
        slots: adapters that it can hold.
        shapes: {"weight": shape, "bias": shape}: what is copied.
        trainable: whether the copies require gradients.
        source: the Cell on the module that this one is tied to, whose copies it uses too, or None.
    """

    fusible = False

    def __init__(self, base_layer, path, slots, shapes, trainable=True, source=None):
        super().__init__(base_layer, path)
        self.tied_to = source.path if source is not None else ""
        self.owned = stacked(f"{path}.saved_owned", (slots,), False, np.int32)
        copies = []
        for slot in range(slots):
            values = source.values_of(slot) if source is not None else {
                name: Parameter(Tensor(np.zeros(shape, np.float32)), name=f"{path}.saved_{slot}.{name}",
                                requires_grad=trainable) for name, shape in shapes.items()}
            copies.append(_copy_of(self.inner, values, trainable))
        self.copies = nn.CellList(copies, auto_prefix=False)

    def construct(self, x, slots):
        """x and slots as the base Cell takes them."""
        own = owned_slots(slots, self.owned)
        y = self.base_layer(x, slots)
        for slot, copy in enumerate(self.copies):
            y = rows_where(own == slot, copy(x, slots), y)
        return y

    def add(self, x, residual, slots):
        """The norm of x + residual, and that sum (norms only)."""
        own = owned_slots(slots, self.owned)
        y, total = self.base_layer.add(x, residual, slots)
        for slot, copy in enumerate(self.copies):
            y = rows_where(own == slot, copy(total, slots), y)
        return y, total


def _copy_of(cell, values, trainable):
    """A float32 Cell like ``cell`` on the given Parameters."""
    if isinstance(cell, Linear):
        kind = TrainableLinear if trainable else Linear
        return kind(values["weight"], cell.in_features, cell.out_features, bias=values.get("bias"))
    if isinstance(cell, Embedding):
        return Embedding(values["weight"], cell.hidden_size)
    copy = RMSNorm(values["weight"], 0.0)
    copy.eps = cell.eps
    return copy
