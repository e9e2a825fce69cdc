"""Loss, gradients and update as static graphs.

    loss = sum over answer tokens of -log p(token | tokens before it) / number of answer tokens

Gradients are those of the sum and are divided by the count at the update, so that accumulated
batches, or the summed gradients of several processes, equal one large batch (up to the order of
additions).

A loss is a Cell ``construct(ids, labels, lengths, slots) -> (loss_sum, count)``, or ``(loss_sum,
count, sums)`` with sums (n,) float32 of further figures, whose names are its attribute ``figures``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

import mindspore as ms
from mindspore import Parameter, ParameterTuple, Tensor, nn, ops

from colora_ms import runtime
from colora_ms.adapters.dropout import dropout_streams
from colora_ms.distributed.cells import Sum, sum_at
from colora_ms.distributed.workers import Workers
from colora_ms.errors import ConfigError
from colora_ms.kernels import bind, linear_cross_entropy, token_losses_of_logits
from colora_ms.models.head import capped, logit_cap, plain_head
from colora_ms.training.encoding import IGNORE
from colora_ms.training.optimizer import AdamW

if TYPE_CHECKING:
    from colora_ms.models.decoder import Decoder
    from colora_ms.training.batching import Batch
    from colora_ms.training.config import OptimizerConfig


class CausalLossCell(nn.Cell):
    """The loss of a decoder on the answer tokens.

    Args:
        decoder: has ``hidden(ids, lengths, slots) -> (rows, tokens, hidden)`` and ``lm_head``, a
            linear Cell with ``weight`` (vocabulary, hidden). With packing it is given lengths of
            (rows, segments), and no segment may see another.
    """

    def __init__(self, decoder: Decoder) -> None:
        super().__init__(auto_prefix=False)
        bind()
        self.decoder = decoder
        self.fused, self.cap = plain_head(decoder), logit_cap(decoder)

    def construct(self, ids: Tensor, labels: Tensor, lengths: Tensor, slots: Tensor) -> tuple[Tensor, Tensor]:
        """Sum of the losses, and number of the labels that count.

        Args:
            ids: (rows, tokens) int32, padded on the right.
            labels: (rows, tokens) int32, what each position should predict; -100 does not count.
            lengths: (rows,) int32; (rows, segments) of a packed batch, see ``Decoder.hidden``.
            slots: (rows,) int32, the adapter of each row.

        Returns:
            (loss_sum, count): 0-d float32 both.
        """
        hidden = self.decoder.hidden(ids, lengths, slots)
        labels = labels.reshape((-1,))
        if self.fused:
            loss, count = linear_cross_entropy(hidden.reshape((-1, hidden.shape[-1])),
                                               self.decoder.lm_head.base(), labels)
        else:
            logits = capped(self.decoder.lm_head(hidden, (slots, lengths)), self.cap)
            loss, count = masked_cross_entropy(logits.reshape((-1, logits.shape[-1])), labels)
        return loss, count


def masked_cross_entropy(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Summed cross-entropy of the labels that are not -100, through the whole logits.

    Args:
        logits: (tokens, vocabulary) float32; labels: (tokens,) int32.

    Returns:
        (loss_sum, count): 0-d float32 both.
    """
    return token_losses_of_logits(logits, labels).sum(), (labels != IGNORE).astype(ms.float32).sum()


class TrainStep(nn.Cell):
    """Loss, gradients, clipping and update of one batch in one graph.

    Args:
        loss_cell: see the head of this module.
        optimizer: ``AdamW``; only its parameters are differentiated.
    """

    def __init__(self, loss_cell: nn.Cell, optimizer: AdamW) -> None:
        super().__init__(auto_prefix=False)
        self.loss_cell = loss_cell
        self.optimizer = optimizer
        self.gradient = ops.value_and_grad(loss_cell, None, optimizer.trained, has_aux=True)

    def construct(self, ids: Tensor, labels: Tensor, lengths: Tensor, slots: Tensor,
                  hyper: Tensor) -> tuple[Tensor, ...]:
        """Returns the loss's results and the norm of the gradient of the mean loss, 0-d float32."""
        results, grads = self.gradient(ids, labels, lengths, slots)
        norm = self.optimizer(grads, ops.maximum(results[1], Tensor(1.0, ms.float32)), hyper)
        return results + (norm,)


_add_to = ops.MultitypeFuncGraph("add_to")
_read = ops.MultitypeFuncGraph("read")
_clear = ops.MultitypeFuncGraph("clear")


@_add_to.register("Tensor", "Tensor")
def _add_to_buffer(buffer: Tensor, grad: Tensor) -> Tensor:
    return ops.assign_add(buffer, grad)


@_read.register("Function", "Number", "Number", "Tensor")
def _read_total(reduce: Any, number: int, places: int, buffer: Tensor) -> Tensor:
    return sum_at(reduce, number, places, buffer)


@_clear.register("Tensor")
def _clear_buffer(buffer: Tensor) -> Tensor:
    return ops.assign(buffer, ops.zeros_like(buffer))


class GradientStep(nn.Cell):
    """Adds the gradients of one batch to buffers; ``UpdateStep`` uses them up.

    Args:
        loss_cell, optimizer: as for ``TrainStep``.
    """

    def __init__(self, loss_cell: nn.Cell, optimizer: AdamW) -> None:
        super().__init__(auto_prefix=False)
        self.loss_cell = loss_cell
        self.gradient = ops.value_and_grad(loss_cell, None, optimizer.trained, has_aux=True)
        self.buffers = ParameterTuple([
            Parameter(Tensor(np.zeros(item.shape, np.float32)), name=f"gradient.{item.name}",
                      requires_grad=False) for item in optimizer.trained])
        self.count = Parameter(Tensor(np.zeros((), np.float32)), name="gradient_count",
                               requires_grad=False)
        self.map = ops.HyperMap()

    def construct(self, ids: Tensor, labels: Tensor, lengths: Tensor, slots: Tensor) -> tuple[Tensor, ...]:
        """Returns the loss's results for the batch."""
        results, grads = self.gradient(ids, labels, lengths, slots)
        done = self.map(_add_to, self.buffers, grads)
        loss = ops.depend(results[0], (done, ops.assign_add(self.count, results[1])))
        return (loss,) + results[1:]


class UpdateStep(nn.Cell):
    """Sums the buffers over all processes, updates the parameters, empties the buffers.

    Args:
        gradient_step: the ``GradientStep`` with the buffers.
        optimizer: ``AdamW``.
        team: the processes that have other rows and the same parameters; of several, MindSpore's communication must be
            initialized.
    """

    def __init__(self, gradient_step: GradientStep, optimizer: AdamW, team: Workers) -> None:
        super().__init__(auto_prefix=False)
        self.buffers, self.count = gradient_step.buffers, gradient_step.count
        self.optimizer = optimizer
        self.world = team.world
        self.map = ops.HyperMap()
        if team.world > 1:
            self.sum = Sum(team)

    def construct(self, hyper: Tensor, sums: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Update from the buffers.

        Args:
            hyper: (3,) float32 from ``AdamW.hyper``.
            sums: (n,) float32, numbers to be summed over all processes beside the gradients.

        Returns:
            (count, norm, sums): answer tokens of the update and norm, 0-d float32; (n,) float32.
        """
        grads, count = self.buffers, self.count.value()
        if self.world > 1:
            grads = self.map(ops.partial(_read, self.sum.reduce, self.sum.number, self.sum.places), grads)
            sums = self.sum(ops.concat((sums, count.reshape((1,)))))
            count, sums = sums[-1], sums[:-1]
        norm = self.optimizer(grads, ops.maximum(count, Tensor(1.0, ms.float32)), hyper)
        # The buffers are emptied only after the optimizer has read them.
        buffers = ops.depend(self.buffers, norm)
        norm = ops.depend(norm, self.map(_clear, buffers))
        norm = ops.depend(norm, ops.assign(self.count, ops.zeros_like(self.count)))
        return count, norm, sums


class EvaluationStep(nn.Cell):
    """The loss of a batch without gradients, and without dropout.

    Args:
        loss_cell: see the head of this module.

    Attributes:
        figures: ``{name: mean}`` of the loss's further figures in the last :meth:`run`.
    """

    def __init__(self, loss_cell: nn.Cell) -> None:
        super().__init__(auto_prefix=False)
        self.loss_cell = loss_cell
        self.figures: dict[str, float] = {}

    def construct(self, ids: Tensor, labels: Tensor, lengths: Tensor, slots: Tensor) -> tuple[Tensor, ...]:
        """Returns the loss's results."""
        return self.loss_cell(ids, labels, lengths, slots)

    def run(self, batches: Iterable[Batch], stepper: Stepper, world: int = 1) -> float:
        """Mean loss over all that counts in ``batches`` (answer tokens, pairs), on all processes."""
        sums: Any = 0.0
        self.loss_cell.set_train(False)
        try:
            for batch in batches:
                sums = sums + _numbers(runtime.run(self, *stepper.tensors(batch)))
        finally:
            self.loss_cell.set_train(True)
        if world > 1:
            sums = ops.AllReduce(ops.ReduceOp.SUM)(Tensor(sums.astype(np.float32))).asnumpy()
        self.figures = _means(self.loss_cell, sums)
        return float(sums[0]) / max(float(sums[1]), 1.0)


def _numbers(results: Sequence[Tensor]) -> np.ndarray:
    """The results of a loss as one float64 array: its sum, the count, the sums of further figures."""
    return np.concatenate([item.asnumpy().reshape(-1) for item in results]).astype(np.float64)


def _means(loss_cell: nn.Cell, numbers: np.ndarray) -> dict[str, float]:
    """``{name: mean}`` of a loss's further figures; numbers: sums as ``_numbers`` gives them."""
    names = getattr(loss_cell, "figures", ())
    return {name: float(value) / max(float(numbers[1]), 1.0) for name, value in zip(names, numbers[2:])}


class Stepper:
    """One update from one or several batches, whatever the settings; feeds NumPy arrays.

    Args:
        decoder: the model, with the adapter injected (its parameters require gradients).
        config: ``OptimizerConfig``.
        slot: adapter slot that all rows use.
        team: the processes that have other rows, as for ``UpdateStep``.
        loss_cell: in place of ``CausalLossCell(decoder)``.
        optimizer: ``AdamW`` or what makes a subclass of it.

    Raises:
        ConfigError: nothing is trainable.
    """

    def __init__(self, decoder: Decoder, config: OptimizerConfig, slot: int = 0, team: Workers = Workers(),
                 loss_cell: nn.Cell | None = None, optimizer: Callable[..., AdamW] = AdamW) -> None:
        self.loss_cell = CausalLossCell(decoder) if loss_cell is None else loss_cell
        parameters = self.loss_cell.trainable_params()
        self.optimizer = optimizer(parameters, config)
        self.streams = dropout_streams(self.loss_cell)
        stacked = [item.name for item in parameters if is_stacked_with_others(item)]
        if config.weight_decay and stacked:
            raise ConfigError(f"weight_decay would also shrink the other adapters that share a "
                              f"parameter with the trained one (for example {stacked[0]}); train "
                              "with a single slot or without weight_decay")
        self.config, self.slot, self.world = config, slot, team.world
        #: Of the last update, over all processes: real tokens fed, whether one asked to stop, and
        #: {name: mean} of the loss's further figures.
        self.tokens, self.stop_asked = 0, False
        self.figures: dict[str, float] = {}
        self.loss_cell.set_train(True)
        if config.accumulation_steps == 1 and team.world == 1:
            self.whole: TrainStep | None = TrainStep(self.loss_cell, self.optimizer)
            self.part = self.update = None
        else:
            self.whole = None
            self.part = GradientStep(self.loss_cell, self.optimizer)
            self.update = UpdateStep(self.part, self.optimizer, team)

    def __call__(self, batches: Sequence[Batch], step: int, steps: int, stop: bool = False) -> tuple[float, float]:
        """Make one update.

        Args:
            batches: list of ``accumulation_steps`` batches (``Batch``), or fewer at the end of
                an epoch.
            step: number of the update, from 1; ``steps``: number of all.
            stop: whether this process asks all to stop after the update (see ``stop_asked``).

        Returns:
            (loss, norm): mean loss over the answer tokens (or pairs) of all processes, and the norm
            of the gradient before clipping, as float; equal on all processes.
        """
        hyper = self.optimizer.hyper(step, steps)
        sums: Any = 0.0
        norm: Any = 0.0
        for batch in batches:
            tensors = self.tensors(batch)
            if self.whole is not None:
                *results, norm = runtime.run(self.whole, *tensors, hyper)
            else:
                results = runtime.run(self.part, *tensors)
            sums = sums + _numbers(results)
        self.tokens, self.stop_asked = sum(batch.tokens for batch in batches), bool(stop)
        if self.update is not None:
            mine = np.array([self.tokens, self.stop_asked, sums[0], *sums[2:]], np.float32)
            count, norm, everywhere = runtime.run(self.update, hyper, Tensor(mine))
            if self.world > 1:
                everywhere = everywhere.asnumpy()
                self.tokens, self.stop_asked = int(everywhere[0]), bool(everywhere[1])
                sums = np.array([everywhere[2], count.asnumpy(), *everywhere[3:]], np.float64)
        self.figures = _means(self.loss_cell, sums)
        return float(sums[0]) / max(float(sums[1]), 1.0), float(norm.asnumpy())

    def tensors(self, batch: Batch) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The batch as the tensors that the graphs take."""
        slots = np.full(len(batch.lengths), self.slot, np.int32)
        return (Tensor(batch.ids), Tensor(batch.labels), Tensor(batch.parts), Tensor(slots))


def is_stacked_with_others(parameter: Parameter) -> bool:
    """Whether an adapter parameter (``<path>.lora_A``, ``<path>.lily_B`` ...) holds more than one slot."""
    stacked = ".lora_" in parameter.name or ".lily_" in parameter.name
    return stacked and parameter.ndim >= 2 and parameter.shape[0] > 1
