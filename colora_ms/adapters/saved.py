"""``modules_to_save``: modules that an adapter replaces by trained copies of its own.

Rows without such an adapter use the base module, so that mixed batches stay right.
"""

from typing import Optional

import numpy as np

from mindspore import Parameter, Tensor, nn

from colora_ms.adapters.cells import SavedBase
from colora_ms.adapters.slots import owned_slots, rows_where, stacked
from colora_ms.models.rows import slots_of


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

    def __init__(self, base_layer: nn.Cell, path: str, slots: int, shapes: dict[str, tuple[int, ...]],
                 trainable: bool = True, source: Optional['SavedModule'] = None) -> None:
        super().__init__(base_layer, path)
        self.tied_to = source.path if source is not None else ""
        self.owned = stacked(f"{path}.saved_owned", (slots,), False, np.int32)
        copies = []
        for slot in range(slots):
            values = source.values_of(slot) if source is not None else {
                name: Parameter(Tensor(np.zeros(shape, np.float32)), name=f"{path}.saved_{slot}.{name}",
                                requires_grad=trainable) for name, shape in shapes.items()}
            copies.append(self.inner.float_copy(values, trainable))
        self.copies = nn.CellList(copies, auto_prefix=False)

    def construct(self, x: Tensor, rows: tuple) -> Tensor:
        """x and rows as the base Cell takes them."""
        own = owned_slots(slots_of(rows), self.owned)
        y = self.base_layer(x, rows)
        for slot, copy in enumerate(self.copies):
            y = rows_where(own == slot, copy(x, rows), y)
        return y

    def add(self, x: Tensor, residual: Tensor, rows: tuple) -> tuple:
        """The norm of x + residual, and that sum (norms only)."""
        own = owned_slots(slots_of(rows), self.owned)
        y, total = self.base_layer.add(x, residual, rows)
        for slot, copy in enumerate(self.copies):
            y = rows_where(own == slot, copy(total, rows), y)
        return y, total
