"""MindSpore ``.ckpt`` files whose parameters carry Hugging Face names.

The only reader that needs MindSpore (imported on use); it reads the whole file at once, because
the format has no index.
"""

from __future__ import annotations

import os

import numpy as np

from colora_ms.errors import CheckpointError
from colora_ms.files import PathLike

# What MindSpore's optimizers and training loops save beside the weights.
STATE_PREFIXES = ("adam_m.", "adam_v.", "moment1.", "moment2.", "moments.", "accum.", "exp_avg.",
                  "exp_avg_sq.", "max_exp_avg_sq.")
STATE_NAMES = ("global_step", "learning_rate", "beta1_power", "beta2_power", "epoch_num",
               "step_num", "loss_scale", "scale_sense", "current_iterator_step",
               "last_overflow_iterator_step", "state_step", "weight_decay")


class MindSporeFile:
    """The parameters of a ``.ckpt``.

    Attributes:
        shapes: ``{name: shape}`` without optimizer state.
        skipped: names of optimizer state that were left out.

    Raises:
        CheckpointError: MindSpore cannot read the file.
    """

    def __init__(self, path: PathLike) -> None:
        path = os.fspath(path)
        if not os.path.isfile(path) or os.path.getsize(path) == 0:
            raise CheckpointError(f"{path} is missing or empty")
        import mindspore
        try:
            values = mindspore.load_checkpoint(path)
        except Exception as error:  # MindSpore raises many kinds for damaged files
            reason = " ".join(str(error).split())[:200]
            raise CheckpointError(f"{path} is not a usable MindSpore checkpoint: {reason}") from None
        self._values, self.skipped = {}, []
        for name, value in values.items():
            if name in STATE_NAMES or name.startswith(STATE_PREFIXES):
                self.skipped.append(name)
            else:
                self._values[name] = value
        self.shapes = {name: tuple(value.shape) for name, value in self._values.items()}

    def read(self, name: str) -> np.ndarray:
        """The tensor, float32."""
        import mindspore
        return np.ascontiguousarray(self._values[name].astype(mindspore.float32).asnumpy())
