"""A Lily adapter on the device: shrink, route, and ``lily_mix`` (Zhong et al., arXiv 2407.09946).

Four launches for each adapted linear: LoraShrink of the input, LoraShrink of that by the router, Softmax, LilyMix. The
experts of a linear that is packed with others have zeros at the others' outputs, so that the packed product's result
is added to as it lies.
"""

from __future__ import annotations

from typing import Any, Callable

import numpy as np

import mindspore as ms
from mindspore import Parameter, Tensor, nn, ops

from colora_ms.kernels import ascend
from colora_ms.models.changes import slot_versions

#: How experts may be weighted: by each token. (In a paged step every token is a sequence of its own.)
POOLS = ("token", "sequence")


def is_routed(cell: nn.Cell) -> bool:
    """Whether a Cell of the decoder is a linear with routed experts."""
    return hasattr(cell, "router") and hasattr(cell, "experts")


class LilyPart(nn.Cell):
    """The adapters of one linear, all slots.

    Args:
        name: of its Parameters; cell: the decoder's Cell; dtype: the compute type.
        put_in, put_out: put values on the last axis, of the model's inputs or of this linear's outputs, where the
            packed product has them.
        slot_tensor: float values and name -> Tensor of the compute type; write, read: one slot of a Parameter.
    """

    def __init__(self, name: str, cell: nn.Cell, dtype: Any, put_in: Callable, put_out: Callable,
                 slot_tensor: Callable, write: Callable, read: Callable) -> None:
        super().__init__()
        self._cell, self._values, self._write, self._read = [cell], (put_in, put_out, slot_tensor), write, read
        self.slots = cell.down.shape[0]
        banks = zip(*(self._slot(slot) for slot in range(self.slots)))
        kinds = (("down", dtype), ("up", dtype), ("router", ms.float32), ("scale", ms.float32))
        self.down, self.up, self.router, self.scale = (
            Parameter(slot_tensor(np.stack(one), kind, name), name=f"{name}.lily_{part}", requires_grad=False)
            for one, (part, kind) in zip(banks, kinds))
        self.one = Parameter(Tensor(np.ones(self.slots, np.float32)), name=f"{name}.lily_one", requires_grad=False)
        self._seen = self._state()

    def construct(self, x: Tensor, slots: Tensor, y: Tensor) -> Tensor:
        """x: (tokens, in); slots: (tokens,) int32; y: (tokens, all outputs of the packed product) -> like y."""
        hidden = ascend.lora_shrink(x, slots, self.down, self.one)  # (tokens, rank) float32
        weights = ops.softmax(ascend.lora_shrink(hidden, slots, self.router, self.one), -1)  # (tokens, experts)
        return ascend.lily_mix(hidden, weights, slots, self.up, self.scale, y)

    def refresh(self, trained: bool) -> None:
        """Write the slots again that were written in the decoder; trained: all that has gradients, too."""
        state = self._state()
        everything = trained and self._cell[0].down.requires_grad
        for slot in range(self.slots):
            if everything or state[slot] != self._seen[slot]:
                for parameter, values in zip((self.down, self.up, self.router, self.scale), self._slot(slot)):
                    self._write(parameter, slot, self._values[2](values[None], parameter.dtype, parameter.name))
        self._seen = state

    def _slot(self, slot: int) -> tuple[np.ndarray, ...]:
        """down (rank, in), up (experts, rank, all outputs), router (experts, rank), scale () of one slot, float32."""
        cell, (put_in, put_out, _) = self._cell[0], self._values
        down, up, router, scale = (self._read(getattr(cell, name), slot) for name in ("down", "up", "router", "scale"))
        return put_in(down), put_out(up.transpose(1, 2, 0)), router, scale

    def _state(self) -> list[tuple[int, ...]]:
        cell = self._cell[0]
        versions = np.stack([slot_versions(one) for one in (cell.down, cell.up, cell.router, cell.scale)], 1)
        return [tuple(row) for row in versions.tolist()]
