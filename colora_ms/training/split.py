"""Training of an adapter on a decoder that is split over the workers of a job; see ``colora_ms.distributed``.

    decoder, handle = shard_decoder(config, weights, team, adapters={"a": folder}, trainable=True)
    stepper = Stepper(decoder, OptimizerConfig(), optimizer=SplitAdamW)
    loss, norm = stepper(batches, step, steps)      # every worker: the same batches, the same numbers
    save_whole(handle, "adapter", team)
"""

from __future__ import annotations

from collections.abc import Iterable

from mindspore import Parameter, Tensor, ops

from colora_ms.distributed.shares import COLUMN, ROW
from colora_ms.training.config import OptimizerConfig
from colora_ms.training.optimizer import AdamW, half_square


class SplitAdamW(AdamW):
    """``AdamW`` on one worker's share of the parameters.

    A factor of a linear that every worker has whole (column: down, row: up) gets a part of its gradient on each: the
    parts are summed. The others are different factors on each worker: of these the squares are summed, for the norm.
    Both in one message, so that no two sums can meet in another order on another worker. Embedding and head are not
    split, and neither are the gradients of adapters on them.

    Args:
        parameters, config: as for ``AdamW``.
    """

    def __init__(self, parameters: Iterable[Parameter], config: OptimizerConfig) -> None:
        super().__init__(parameters, config)
        kinds = [_kind(item.name) for item in self.trained]
        self.parts = tuple(i for i, kind in enumerate(kinds) if kind == "part")
        self.split = tuple(i for i, kind in enumerate(kinds) if kind == "split")
        self.shapes = tuple(item.shape for item in self.trained)
        self.sizes = tuple(item.size for item in self.trained)
        self.sum = ops.AllReduce(ops.ReduceOp.SUM)

    def whole(self, grads: tuple[Tensor, ...]) -> tuple[tuple[Tensor, ...], Tensor]:
        """See ``AdamW.whole``."""
        if not self.split:
            return grads, half_square(self.map, grads)
        message: tuple = ()
        for i in self.parts:
            message = message + (grads[i].reshape((-1,)),)
        own: tuple = ()
        for i in self.split:
            own = own + (grads[i],)
        message = message + (half_square(self.map, own).reshape((1,)),)
        total = self.sum(ops.concat(message))
        result: tuple = ()
        rest: tuple = ()
        place = 0
        for i in range(len(self.sizes)):
            grad = grads[i]
            if i in self.parts:
                grad = total[place:place + self.sizes[i]].reshape(self.shapes[i])
                place = place + self.sizes[i]
            if i not in self.split:
                rest = rest + (grad,)
            result = result + (grad,)
        return result, half_square(self.map, rest) + total[place]


def _kind(name: str) -> str:
    """"part", "split", or "whole" for what every worker has with its whole gradient; name: ``<path>.lora_A`` ..."""
    path, _, field = name.rpartition(".")
    linear = path.rpartition(".")[2]
    if linear not in COLUMN + ROW or field not in ("lora_A", "lora_B"):
        return "whole"
    return "part" if (field == "lora_A") == (linear in COLUMN) else "split"
