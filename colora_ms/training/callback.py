"""``AdapterCheckpoint``: a callback of ``mindspore.train.Model`` that saves the adapter and resumes its training.

    keeper = AdapterCheckpoint(adapters, "run", every=50)
    model.train(epochs, dataset, callbacks=[keeper], initial_epoch=keeper.resume(model, dataset))

Every checkpoint is a folder ``run/checkpoint-000050`` as in :mod:`colora_ms.training.checkpoint`, written whole or not
at all, with the adapter in PEFT's format in ``adapter/`` and in ``state.safetensors`` what an exact continuation needs:
all Parameters of the training network that are not frozen weights of the base model (the adapter's, the streams of its
dropout, the optimizer's, loss scale, accumulated gradients) and the states of the random generators.
"""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

import mindspore as ms
import mindspore.dataset as ds
from mindspore import Parameter, nn
from mindspore.train import Callback, Model, RunContext

from colora_ms.errors import CheckpointError, ConfigError
from colora_ms.training import checkpoint as checkpoints

if TYPE_CHECKING:
    from colora_ms.adapters.handle import Adapters

#: The seed of ``mindspore.dataset.config`` that stands for "another order each time".
UNSEEDED = 5489

#: Last parts of the names of frozen Parameters that training changes nevertheless (batch normalisation).
MOVING = ("moving_mean", "moving_variance")


class AdapterCheckpoint(Callback):
    """Saves a training run of ``Model.train`` every few steps, and continues one: state and data are restored to the
    bit.

    The data position is the number of batches taken; the dataset is put there by ``set_init_step``, which reads and
    drops what came before in the pipeline's own order. For the same order as before, set
    ``mindspore.dataset.config.set_seed`` before the dataset is made. The masks of the adapters' dropout go on, too;
    those of ``nn.Dropout`` in the network itself do not, since its CPU operator keeps its random numbers to itself.

    On a CPU the losses after resuming equal those of an unbroken run to the last bit if the script calls
    ``mindspore.device_context.cpu.op_tuning.threads_num(1)`` at its start. With more threads some operators of
    MindSpore choose their partition by the clock in a process's first launches, and ``Log`` (in ``CrossEntropyLoss``)
    rounds differently by partition: the same input gives results that differ in the last place within one process.

    Args:
        adapters: handle of the injected adapters.
        folder: created if needed.
        every: steps (batches) between two checkpoints, at least 1; the last step is always saved.
        keep: newest checkpoints to leave, at least 1.
        name: the adapter to save, by default the active one.

    Raises:
        CheckpointError: the folder cannot be written.
        ConfigError: ``every`` or ``keep`` is not a whole number from 1 on.
    """

    def __init__(self, adapters: Adapters, folder: str | Path, every: int = 100, keep: int = 2,
                 name: str | None = None) -> None:
        super().__init__()
        for key, value in (("every", every), ("keep", keep)):
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ConfigError(f"{key} is {value!r}, expected a whole number from 1 on")
        checkpoints.check_writable(folder)
        self.adapters, self.folder, self.every, self.keep, self.name = adapters, Path(folder), every, keep, name
        self.first = 0  # steps made before this call of Model.train
        self.saved: int | None = None

    def resume(self, model: Model, dataset: ms.dataset.Dataset, path: str | Path | None = None) -> int:
        """Continue from the newest checkpoint of the folder, if there is one.

        Args:
            model: the ``mindspore.train.Model`` that is about to train.
            dataset: its training dataset; it is set to the position after the checkpoint's last batch.
            path: a checkpoint to continue from in place of the newest.

        Returns:
            The epoch to start with, for ``initial_epoch`` of ``Model.train``; 0 if there is no checkpoint.

        Raises:
            CheckpointError: the checkpoint is damaged, does not fit the network, or was made with a dataset of another
                length or seed; nothing is changed.
        """
        if path is None and not checkpoints.list_checkpoints(self.folder):
            return 0
        values, tensors = checkpoints.read_checkpoint(path or self.folder)
        size, seed = dataset.get_dataset_size(), ds.config.get_seed()
        if (values.get("batches"), values.get("seed")) != (size, seed):
            raise CheckpointError(f"the checkpoint was made with {values.get('batches')} batches an epoch and dataset "
                                  f"seed {values.get('seed')}, this run has {size} and {seed}; use the same dataset "
                                  "and call mindspore.dataset.config.set_seed with the same number before it is made")
        checkpoints.restore_parameters(self.state(model.train_network), tensors)
        manager = getattr(model, "_loss_scale_manager", None)
        for key, value in values.get("loss_scale", {}).items():
            setattr(manager, key, value)
        self.first = values["step"]
        dataset.set_init_step(self.first)
        return self.first // size

    def state(self, network: nn.Cell) -> dict[str, Parameter]:
        """{name: Parameter} of all that training changes in a training network, with the adapter's own."""
        frozen = {id(parameter) for parameter, _ in self.adapters.frozen
                  if parameter.name.rsplit(".", 1)[-1] not in MOVING}
        return {parameter.name: parameter for parameter in network.get_parameters() if id(parameter) not in frozen}

    def save(self, network: nn.Cell, step: int, batches: int, loss_scale: nn.Cell | None = None) -> Path:
        """Write the checkpoint after ``step`` batches; ``batches``: how many there are in an epoch. Returns its path.

        A training loop of one's own calls this with the Cell that holds network and optimizer.
        """
        tensors = {name: _array(parameter) for name, parameter in self.state(network).items()}
        state = {"batches": batches, "seed": ds.config.get_seed(), "loss_scale": loss_scale or {}}
        path = checkpoints.write_checkpoint(self.folder, step, tensors, state, self.keep,
                                            lambda place: self.adapters.save(place / "adapter", self.name))
        self.saved = step
        return path

    def on_train_begin(self, run_context: RunContext) -> None:
        """Refuse what cannot be resumed; warn of an order that will differ."""
        if run_context.original_args().dataset_sink_mode:
            raise ConfigError("AdapterCheckpoint cannot see the single batches with dataset_sink_mode=True; use False")
        if ds.config.get_seed() == UNSEEDED:
            warnings.warn("mindspore.dataset.config has no seed: if the dataset is shuffled, a resumed run sees "
                          "another order. Call mindspore.dataset.config.set_seed before you make the dataset.",
                          stacklevel=2)

    def on_train_step_end(self, run_context: RunContext) -> None:
        """Save if it is time."""
        arguments = run_context.original_args()
        step = self.first + arguments.cur_step_num
        if step % self.every == 0:
            self._save(arguments, step)

    def on_train_end(self, run_context: RunContext) -> None:
        """Save the last step."""
        arguments = run_context.original_args()
        step = self.first + arguments.cur_step_num
        if step != self.saved and arguments.cur_step_num:
            self._save(arguments, step)

    def _save(self, arguments: Any, step: int) -> None:
        manager = arguments.loss_scale_mananger  # MindSpore's spelling
        numbers = {key: value for key, value in (vars(manager) if manager else {}).items()
                   if isinstance(value, (int, float))}
        self.save(arguments.train_network, step, arguments.batch_num, numbers)


def _array(parameter: Parameter) -> np.ndarray:
    value = parameter.astype(ms.float32) if parameter.dtype == ms.bfloat16 else parameter
    return np.array(value.asnumpy())  # ascontiguousarray would give a scalar an axis
