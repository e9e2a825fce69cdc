"""Dropout on the inputs of adapters, whose masks follow from a seed: a resumed training draws what an unbroken one
does."""

import hashlib

import numpy as np

import mindspore as ms
from mindspore import Parameter, Tensor, nn, ops
from mindspore.common.generator import default_generator
from mindspore.communication import GlobalComm, get_rank
from mindspore.graph.api import _run_in_jit

from colora_ms.kernels import bind, dropout, dropout_constants


class Dropout(nn.Cell):
    """Zeroes elements at random in training and scales the others by 1 / (1 - rate); nothing in evaluation.

    The mask is a function of the seed, the path, the worker's rank, the number of calls in training and the element's
    place (see :func:`colora_ms.kernels.dropout.dropout`). The calls are counted in ``stream``, which is saved and
    restored with the training's state.

    Recomputation (``cell.recompute()``) meets the same mask again: a graph keeps the key of the mask. In PyNative mode
    the calls are counted by MindSpore's own generator (``mindspore.get_rng_state``), which recomputation sets back; of
    a recomputed Cell that is called several times before the gradient, MindSpore keeps the state of the last call
    alone.

    Args:
        rate: probability of dropping an element, in [0, 1).
        seed: whole number.
        path: name of the place in the model; other places have other masks.

    Attributes:
        stream: (2,) int32, frozen: hash of seed and path, plus the number of calls in training. Equal on all workers,
            whose communication must be initialised before the Cell is made for their masks to differ.
    """

    def __init__(self, rate: float, seed: int, path: str) -> None:
        super().__init__(auto_prefix=False)
        bind()
        self.rate = rate
        self.stream = Parameter(_words(f"{seed} {path}"), name=f"{path}.lora_dropout", requires_grad=False)
        self.worker = _words(f"worker {get_rank() if GlobalComm.INITED else 0}")
        self.least, self.scale = dropout_constants(rate)
        self.one, self.step = Tensor(np.ones(2, np.int32)), Tensor(1, ms.int64)
        # The key is not recomputed: it would be the next one.
        self.count, self.mix = ops.AssignAdd().recompute(False), ops.BitwiseXor().recompute(False)

    def construct(self, x: Tensor) -> Tensor:
        """x: (..., columns), any float dtype -> the same shape and dtype."""
        if not self.training:
            return x
        if _run_in_jit():  # @jit.cond: True
            place = self.count(self.stream, self.one)
        else:
            place = self.stream + default_generator._step(self.step)[1].astype(ms.int32)
        return dropout(x, self.mix(place, self.worker), self.least, self.scale)

    def extend_repr(self) -> str:
        """What ``repr`` adds to the name of the class."""
        return f"rate={self.rate}"


def dropout_streams(net: nn.Cell) -> list[Parameter]:
    """[Parameter]: what the masks of all :class:`Dropout` Cells in a model depend on beside the model itself."""
    return [cell.stream for _, cell in net.cells_and_names() if isinstance(cell, Dropout)]


def _words(text):
    """(2,) int32 Tensor: a hash of a text."""
    return Tensor(np.frombuffer(hashlib.blake2b(text.encode(), digest_size=8).digest(), np.int32).copy())
