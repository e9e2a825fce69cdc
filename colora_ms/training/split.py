"""Training of an adapter on a decoder that is split over the workers of a job; see ``colora_ms.distributed``.

    decoder, handle = shard_decoder(config, weights, team, adapters={"a": folder}, trainable=True)
    stepper = Stepper(decoder, OptimizerConfig(), optimizer=functools.partial(SplitAdamW, team=team))
    loss, norm = stepper(batches, step, steps)      # every worker: the same batches, the same numbers
    save_whole(handle, "adapter", team)
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Optional

import numpy as np

from mindspore import Parameter, Tensor, ops

from colora_ms.distributed.cells import Sum
from colora_ms.distributed.loading import shard_decoder
from colora_ms.distributed.shares import COLUMN, ROW, split_axis
from colora_ms.distributed.workers import Workers
from colora_ms.errors import ConfigError
from colora_ms.models.checkpoint import Checkpoint
from colora_ms.models.decoder import Decoder
from colora_ms.training.config import OptimizerConfig
from colora_ms.training.optimizer import AdamW, half_square

if TYPE_CHECKING:
    from colora_ms.adapters.handle import Adapters

#: The name of the adapter that is trained.
ADAPTER = "default"


class SplitAdamW(AdamW):
    """``AdamW`` on one worker's share of the parameters.

    A factor of a linear that every worker has whole (column: down, row: up) gets a part of its gradient on each: the
    parts are summed. The others are different factors on each worker: of these the squares are summed, for the norm.
    Both in one message, so that no two sums can meet in another order on another worker. Embedding and head are not
    split, and neither are the gradients of adapters on them.

    Args:
        parameters, config: as for ``AdamW``.
        team: the workers over which the model is split.
    """

    def __init__(self, parameters: Iterable[Parameter], config: OptimizerConfig, team: Workers) -> None:
        super().__init__(parameters, config)
        kinds = [_kind(item.name) for item in self.trained]
        self.parts = tuple(i for i, kind in enumerate(kinds) if kind == "part")
        self.split = tuple(i for i, kind in enumerate(kinds) if kind == "split")
        self.shapes = tuple(item.shape for item in self.trained)
        self.sizes = tuple(item.size for item in self.trained)
        self.sum = Sum(team)

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


def split_model(checkpoint: Checkpoint, weight_format: str, team: Workers,
                begin: Callable[[Decoder], Adapters]) -> tuple[Decoder, Adapters]:
    """This worker's share of a model and of the adapter that ``begin`` puts into a whole one.

    The adapter is begun on a decoder of the whole model's shapes whose weights are zeros that nobody reads, so that its
    first values are those of one process, and cut from there.

    Raises:
        ConfigError, AdapterError: what cannot be split.
    """
    if checkpoint.quantized is not None or checkpoint.low_rank:
        raise ConfigError(f"{checkpoint.path} has linears that are integers or factors, which cannot be split over "
                          "workers; leave distributed.tensor_parallel out, or train on the float model")
    zeros = {name: np.zeros(shape, np.float32) for name, shape in checkpoint.config.parameter_shapes().items()}
    for array in zeros.values():
        array.flags.writeable = False  # so that it is not copied: pages that nobody reads take no memory
    whole = begin(Decoder(checkpoint.config, zeros))
    with tempfile.TemporaryDirectory(prefix="colora-whole-") as folder:
        whole.save(Path(folder) / "adapter", ADAPTER)
        del whole, zeros
        decoder, handle = shard_decoder(checkpoint.config, checkpoint.stored, team, weight_format,
                                        adapters={ADAPTER: Path(folder) / "adapter"}, trainable=True)
    assert handle is not None
    return decoder, handle


def whole_tensors(tensors: Mapping[str, np.ndarray], team: Workers) -> dict[str, np.ndarray]:
    """The tensors of one process's checkpoint from those of all workers' shares; all workers make this call.

    Args:
        tensors: {name: array} of stacked factors ``….lora_A`` (slots, r, in), their moments and so on.
    """
    parts = team.gather(dict(tensors))
    return {name: value if _stacked_axis(name) is None
            else np.concatenate([part[name] for part in parts], _stacked_axis(name)) for name, value in tensors.items()}


def own_tensors(tensors: Mapping[str, np.ndarray], team: Workers) -> dict[str, np.ndarray]:
    """This worker's share of a checkpoint's tensors: the inverse of :func:`whole_tensors`."""
    own = {}
    for name, value in tensors.items():
        axis = _stacked_axis(name)
        own[name] = value if axis is None else np.ascontiguousarray(np.split(value, team.world, axis)[team.rank])
    return own


def _stacked_axis(name: str) -> Optional[int]:
    """The axis along which a stacked factor, or what is kept of it, is split; None: it is whole on every worker."""
    axis = split_axis(f"{name}.weight")
    return None if axis is None or not name.endswith(("lora_A", "lora_B")) else axis + 1


def _kind(name: str) -> str:
    """"part", "split", or "whole" for what every worker has with its whole gradient; name: ``<path>.lora_A`` ..."""
    path, _, field = name.rpartition(".")
    linear = path.rpartition(".")[2]
    if linear not in COLUMN + ROW or field not in ("lora_A", "lora_B"):
        return "whole"
    return "part" if (field == "lora_A") == (linear in COLUMN) else "split"
