"""The training loop: evaluation, best adapter, checkpoints, exact resuming.

``Trainer`` works on a model of one's own; :func:`colora_ms.training.run.train` does everything from a recipe.

A run's folder holds

    adapter/             the adapter after the last update (PEFT's format)
    best/                the adapter with the lowest validation loss, if there is validation data
    checkpoint-000120/   see ``checkpoint``
    log.jsonl            one line for the data, one an update and an evaluation
    loss.png             the loss curve
    recipe.yaml          the settings
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import math
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mindspore import nn

from colora_ms import runtime
from colora_ms.adapters.lily import PACKED, pools_rows
from colora_ms.distributed import workers
from colora_ms.distributed.workers import Workers
from colora_ms.errors import CheckpointError, ColoraError, ConfigError
from colora_ms.training import checkpoint as checkpoints
from colora_ms.training.data import BatchLoader
from colora_ms.training.optimizer import AdamW, learning_rate
from colora_ms.training.packing import packed_shape
from colora_ms.training.progress import Progress, StopSignals, pair_text
from colora_ms.training.report import RunLog, draw_loss_curve
from colora_ms.training.split import SplitAdamW, own_tensors, whole_tensors
from colora_ms.training.step import EvaluationStep, Stepper

if TYPE_CHECKING:
    from colora_ms.models.decoder import Decoder
    from colora_ms.training.batching import Batch
    from colora_ms.training.config import TrainingConfig
    from colora_ms.training.encoding import EncodedSet


class TrainingError(ColoraError, RuntimeError):
    """Training cannot go on: the loss is not finite, or memory ran out."""


@dataclasses.dataclass(frozen=True)
class TrainingResult:
    """What ``Trainer.train`` returns.

    Attributes:
        steps: updates made in all, resumed ones included.
        losses: training loss of the updates made by this call, in order.
        validation: ``[(step, loss)]`` of the evaluations made by this call.
        best_step, best_loss: the best evaluation of the whole run, or ``None``.
        adapter: folder of the adapter to use: ``best`` if there was an evaluation, else ``adapter``.
        seconds: time in this call; tokens: real tokens fed in it.
    """

    steps: int
    losses: list[float]
    validation: list[tuple[int, float]]
    best_step: int | None
    best_loss: float | None
    adapter: Path
    seconds: float
    tokens: int


class Callback:
    """Base of callbacks; every method may be left as it is."""

    def on_step(self, trainer: Trainer, record: dict) -> None:
        """After an update; ``record`` is its line of the log."""

    def on_evaluation(self, trainer: Trainer, record: dict) -> None:
        """After an evaluation on the validation data."""

    def on_end(self, trainer: Trainer, result: TrainingResult) -> None:
        """After the last update, with the ``TrainingResult``."""


class Trainer:
    """Trains the parameters of a model that require gradients.

    Args:
        decoder: the model with its adapter injected.
        data: ``EncodedSet`` to train on.
        config: ``TrainingConfig``.
        save_adapter: ``function(folder)`` that writes the adapter.
        validation: ``EncodedSet``, or ``None``.
        callbacks: list of ``Callback``.
        slot: adapter slot of the training rows.
        team: the processes that have other rows; of several, they have to be started (``workers.start``) and share the
            output folder.
        split: the workers over which the model is split. Only the first one of all writes files; of a split model
            ``save_adapter`` is called on all workers.
        loss_cell: a loss in place of ``CausalLossCell(decoder)``.
        loader: a kind of ``BatchLoader``, for data of another kind than single examples.
        data_report: what the data is and what of it was left out, JSON values for a record ``data`` of the log.

    Raises:
        CheckpointError: the output folder cannot be written.
        ConfigError: nothing to train, an example longer than the model's context, or packing with an
            adapter that pools over rows.
    """

    def __init__(self, decoder: Decoder, data: EncodedSet, config: TrainingConfig, save_adapter: Callable[[Path], Any],
                 validation: EncodedSet | None = None, callbacks: Iterable[Callback] = (), slot: int = 0,
                 team: Workers = Workers(), split: Workers = Workers(), loss_cell: nn.Cell | None = None,
                 loader: type[BatchLoader] = BatchLoader, data_report: dict | None = None) -> None:
        self.folder = Path(config.output)
        self.team, self.split, self.first = team, split, team.first and split.first
        if self.first:
            checkpoints.check_writable(self.folder)
        runtime.configure()
        self.config, self.save_adapter = config, save_adapter
        self.callbacks = list(callbacks)
        self.data_report = data_report
        context = getattr(decoder, "max_positions", None)
        longest = max(len(item) for item in data.items) - 1
        if context is not None and longest > context:
            raise ConfigError(f"an example has {longest} tokens, the model's context is {context}; "
                              f"set data.max_length to at most {context}")
        if config.data.packing and pools_rows(decoder):
            raise ConfigError(PACKED)
        self._loader_kind = loader
        self.loader = self._loader(data)
        self.validation: BatchLoader | None = None
        if validation is not None:
            self.validation = self._loader(validation, shuffle=False)
        optimizer = functools.partial(SplitAdamW, team=split) if split.world > 1 else AdamW
        self.stepper = Stepper(decoder, config.optimizer, slot, team, loss_cell, optimizer)
        self.evaluation = EvaluationStep(self.stepper.loss_cell)
        self.steps: int
        self.end: tuple[int, int] | None = None
        if config.loop.epochs is None:
            self.steps = config.loop.steps or 0
        else:
            self.steps, self.end = self.loader.updates(config.loop.epochs, config.optimizer.accumulation_steps)
        self.step = 0
        self.best_step: int | None = None
        self.best_loss: float | None = None
        self.seconds_before = 0.0
        self.stopped_by = ""  # who asked to stop after this update: a signal, or a callback that sets it

    def _loader(self, data: EncodedSet, shuffle: bool = True) -> BatchLoader:
        options = self.config.data
        rows, buckets = options.batch_size, options.buckets
        if not shuffle:
            # The training shapes, so that evaluation compiles none of its own if they fit.
            longest = max(len(item) for item in data.items) - 1
            rows = self.loader.rows
            buckets = sorted({*self.loader.buckets, max(longest, self.loader.buckets[-1])})
        elif options.packing and buckets is None:
            rows, length = packed_shape(data.items, rows, options.bucket_multiple)
            buckets = [length]
        return self._loader_kind(data, rows, self.config.loop.seed, buckets, options.max_buckets,
                                 options.bucket_multiple, options.packing, self.team.rank, self.team.world,
                                 shuffle)

    # -- the loop ------------------------------------------------------------------------------

    def train(self, resume: bool | str | Path = False) -> TrainingResult:
        """Run until ``steps`` updates are made.

        Args:
            resume: ``True`` continues from the newest checkpoint of the output folder, or begins
                if there is none; a path continues from that checkpoint.

        Returns:
            TrainingResult.

        Raises:
            CheckpointError: the folder holds a run and ``resume`` is false; a damaged or foreign
                checkpoint; a file that cannot be written.
            TrainingError: the loss is not finite, or memory ran out.
            KeyboardInterrupt: after Ctrl-C (or SIGTERM); a checkpoint has been written.
        """
        self._begin(resume)
        self._check_equal_start()
        log = None
        if self.first:
            log = RunLog(self.folder / "log.jsonl", self.step)
            if self.data_report is not None and self.step == 0:
                log.add("data", 0, **self.data_report)
        losses, validation, tokens = [], [], 0
        started = time.perf_counter()
        saved = self.step if self.step else None
        progress = Progress(self.steps, self.step, self.config.loop.progress and self.first)
        try:
            with StopSignals(self):
                while self.step < self.steps:
                    batches = self.loader.window(self.config.optimizer.accumulation_steps, self.end)
                    began = time.perf_counter()
                    loss, norm = self._update(batches)
                    seconds = time.perf_counter() - began
                    fed = self.stepper.tokens
                    self.step += 1
                    losses.append(loss)
                    tokens += fed
                    record = {"loss": loss, "norm": norm, "seconds": round(seconds, 4),
                              "rate": learning_rate(self.config.optimizer, self.step, self.steps),
                              "tokens": fed, "epoch": self.loader.epoch, **self.stepper.figures}
                    progress.show(record)
                    if log and (self.step % self.config.loop.log_every == 0
                                or self.step == self.steps):
                        log.add("step", self.step, **record)
                    self._call("on_step", {"step": self.step, **record})
                    if self._due(self.config.loop.evaluate_every) and self.validation is not None:
                        validation.append((self.step, self._evaluate(self.validation, log, progress)))
                    # Several processes stop after the same update, or some would wait for ever.
                    stop = self.stopped_by if self.alone else self.asked or self.stepper.stop_asked
                    if self._due(self.config.loop.save_every) or stop:
                        self._save(started)
                        saved = self.step
                    if stop:
                        self._wait()  # msrun kills the others when the first one leaves
                        raise KeyboardInterrupt(f"stopped after update {self.step} "
                                                f"({self.stopped_by or 'by another worker'}); "
                                                "continue with --resume")
        finally:
            progress.close()
            if log:
                log.close()
        seconds = time.perf_counter() - started
        if saved != self.step:
            self._save(started)
        if self.saves:
            self.save_adapter(self.folder / "adapter")
        if self.first:
            unit = "answer token" if self.config.train == "sft" else "pair"
            draw_loss_curve(self.folder / "log.jsonl", self.folder / "loss.png", f"loss per {unit} (nats)")
        result = TrainingResult(self.step, losses, validation, self.best_step, self.best_loss,
                                self.folder / ("adapter" if self.best_step is None else "best"),
                                seconds, tokens)
        self._call("on_end", result)
        return result

    def _due(self, every: int | None) -> bool:
        """Whether something that happens every so many updates, and after the last, is due now."""
        return self.step == self.steps or (every is not None and self.step % every == 0)

    def _call(self, method: str, value: Any) -> None:
        for callback in self.callbacks:
            getattr(callback, method)(self, value)

    def _update(self, batches: list[Batch]) -> tuple[float, float]:
        step = self.step + 1
        try:
            # Only several processes have to agree on stopping.
            self.asked = not self.alone and any(self.split.gather(bool(self.stopped_by)))
            asked = {"stop": self.asked} if self.team.world > 1 else {}
            loss, norm = self.stepper(batches, step, self.steps, **asked)
        except (MemoryError, RuntimeError) as error:
            if isinstance(error, ColoraError) or not _is_out_of_memory(error):
                raise
            shape = max((batch.ids.shape for batch in batches), key=lambda s: s[0] * s[1])
            raise TrainingError(
                f"memory ran out at update {step}, with a batch of {shape[0]} x {shape[1]} tokens; "
                "lower data.batch_size (and raise optimizer.accumulation_steps to make up for it), "
                "data.max_length, or the adapter's rank") from error
        if not (math.isfinite(loss) and math.isfinite(norm)):
            what = f"loss is {loss}" if not math.isfinite(loss) else f"gradient's norm is {norm}"
            found = checkpoints.list_checkpoints(self.folder)
            last = f" The last checkpoint is {found[-1][1]}." if found else ""
            advice = ("the base model or the adapter it started from holds non-finite values, or "
                      "its weight_format is too coarse") if step == 1 else \
                ("try a lower optimizer.learning_rate (now "
                 f"{self.config.optimizer.learning_rate:g}), a longer warmup_ratio, or "
                 "max_grad_norm: 1.0")
            raise TrainingError(f"the {what} at update {step}; the parameters were left as they "
                                f"were before it: {advice}.{last}")
        return loss, norm

    def _evaluate(self, validation: BatchLoader, log: RunLog | None, progress: Progress) -> float:
        """Validation loss; keeps the adapter if it is the best so far."""
        began = time.perf_counter()
        loss = self.evaluation.run(validation.epoch_batches(), self.stepper, self.team.world)
        if self.best_loss is None or loss < self.best_loss:
            self.best_step, self.best_loss = self.step, loss
            if self.saves:
                self.save_adapter(self.folder / "best")
        record = {"loss": loss, "best_step": self.best_step,
                  "seconds": round(time.perf_counter() - began, 4), **self.evaluation.figures}
        if log:
            log.add("evaluation", self.step, **record)
        progress.say(f"update {self.step}: validation loss {loss:.4f}" + pair_text(record)
                     + (" (best)" if self.best_step == self.step else ""))
        self._call("on_evaluation", {"step": self.step, **record})
        return loss

    # -- several processes ---------------------------------------------------------------------

    @property
    def alone(self) -> bool:
        """Whether this is the only process."""
        return self.team.world == self.split.world == 1

    @property
    def saves(self) -> bool:
        """Whether this process takes part in writing: of a split model each has a share of what is written."""
        return self.first or self.split.world > 1

    def _check_equal_start(self) -> None:
        """Sums of gradients mean nothing unless all processes start from the same values and data."""
        if self.team.world == 1:
            return
        digest = hashlib.sha256()
        for parameter in self.stepper.optimizer.trained:
            digest.update(parameter.name.encode() + parameter.asnumpy().tobytes())
        mine = {"parameters": digest.hexdigest()[:16], "data": self.loader.state(),
                "update": self.step, "steps": self.steps}
        others = self.team.gather(mine)
        problems = [f"{key} is {other[key]} on worker {rank}, {others[0][key]} on worker 0"
                    for rank, other in enumerate(others) for key in mine
                    if other[key] != others[0][key]]
        if problems:
            raise TrainingError("the workers do not start from the same state: "
                                + "; ".join(problems) + "; give all of them the same recipe, model "
                                "files and output folder")

    def _wait(self) -> None:
        if not self.alone:
            workers.current().wait()

    # -- checkpoints ---------------------------------------------------------------------------

    def _begin(self, resume: bool | str | Path) -> None:
        found = checkpoints.list_checkpoints(self.folder)
        if not resume:
            if found:
                raise CheckpointError(f"{self.folder} holds a run of {found[-1][0]} updates "
                                      "already; continue it with resume (--resume), or choose "
                                      "another output folder")
            if self.first:
                self._write_recipe()
            return
        source = self.folder if resume is True else Path(resume)
        if resume is True and not found:
            if self.first:
                self._write_recipe()
            return
        values, tensors = checkpoints.read_checkpoint(source)
        changed = checkpoints.changes(values.get("recipe", {}), self._recipe())
        if changed:
            raise CheckpointError("the run cannot continue exactly, because the recipe has "
                                  "changed: " + "; ".join(changed))
        self.loader.restore(values["data"])
        if self.split.world > 1:
            tensors = own_tensors(tensors, self.split)
        checkpoints.restore(self.stepper.optimizer, tensors, streams=self.stepper.streams)
        self.step = values["step"]
        self.best_step, self.best_loss = values.get("best_step"), values.get("best_loss")
        self.seconds_before = values.get("seconds", 0.0)

    def _save(self, started: float) -> None:
        if not self.saves:
            return
        state = {"data": self.loader.state(), "recipe": self._recipe(),
                 "best_step": self.best_step, "best_loss": self.best_loss,
                 "seconds": self.seconds_before + time.perf_counter() - started}
        tensors = checkpoints.tensors_of(self.stepper.optimizer, self.stepper.streams)
        if self.split.world > 1:
            tensors = whole_tensors(tensors, self.split)
        if self.first:
            checkpoints.write_checkpoint(self.folder, self.step, tensors, state, self.config.loop.keep_checkpoints)

    def _recipe(self) -> dict:
        """What must be equal for a resumed run to continue exactly."""
        values = self.config.to_dict()
        exact = {key: values[key] for key in ("model", "weight_format", "adapter", "optimizer")}
        if self.config.train != "sft":  # checkpoints of plain training say nothing of it
            exact["train"], exact["dpo"] = values["train"], values["dpo"]
        exact["steps"], exact["seed"] = self.steps, self.config.loop.seed
        exact["world"] = self.team.world
        if self.split.world > 1:
            exact["tensor_parallel"] = self.split.world
        return json.loads(json.dumps(exact, default=str))

    def _write_recipe(self) -> None:
        import yaml
        with checkpoints.writing(self.folder / "recipe.yaml") as temporary:
            temporary.write_text(yaml.safe_dump(json.loads(json.dumps(self.config.to_dict(),
                                                                      default=str)),
                                                sort_keys=False), encoding="utf-8")


def _is_out_of_memory(error: BaseException) -> bool:
    text = str(error).lower()
    return isinstance(error, MemoryError) or any(
        words in text for words in ("out of memory", "malloc", "bad_alloc", "alloc memory",
                                    "allocate memory", "memory isn't enough", "memory not enough"))
