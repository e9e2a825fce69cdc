"""The loop: exact resuming, checkpoints, evaluation, log and picture, errors; on a tiny model."""

import dataclasses
import json
import os
import signal
import sys

import numpy as np
import pytest

import mindspore as ms

sys.path.insert(0, os.path.dirname(__file__))
from colora_ms.errors import CheckpointError, ConfigError  # noqa: E402
from colora_ms.training import checkpoint as checkpoints  # noqa: E402
from colora_ms.training.config import TrainingConfig  # noqa: E402
from colora_ms.training.encoding import EncodedSet  # noqa: E402
from colora_ms.training.report import RunLog, draw_loss_curve, read_log, smooth  # noqa: E402
from colora_ms.training.trainer import Callback, Trainer, TrainingError  # noqa: E402
from training_stand_in import TinyDecoder, counting_items, values_of  # noqa: E402

ms.set_context(mode=ms.GRAPH_MODE)


def encoded(count, seed=0):
    return EncodedSet(counting_items(count, seed), [], 0, 64)


def config_of(folder, steps=6, optimizer=None, **loop):
    return TrainingConfig(
        output=str(folder), data={"train": "unused", "validation": "unused", "batch_size": 3,
                                  "buckets": [12]},
        optimizer={"learning_rate": 0.05, **(optimizer or {})},
        loop={"steps": steps, "progress": False, "seed": 5, **loop})


def trainer_of(folder, net=None, validation=False, callbacks=(), config=None, **settings):
    net = net or TinyDecoder()

    def save_adapter(path):
        os.makedirs(path, exist_ok=True)
        np.savez(os.path.join(path, "adapter.npz"), **{item.name: item.asnumpy()
                                                       for item in net.trainable_params()})
    trainer = Trainer(net, encoded(20), config or config_of(folder, **settings), save_adapter,
                      encoded(7, 9) if validation else None, callbacks)
    trainer.net = net
    return trainer


class StopAfter(Callback):
    def __init__(self, step, number=signal.SIGINT):
        self.step, self.number = step, number

    def on_step(self, trainer, record):
        if record["step"] == self.step:
            os.kill(os.getpid(), self.number)


# -- resuming --------------------------------------------------------------------------------------


@pytest.mark.parametrize("optimizer, number, dropout", [
    ({}, signal.SIGINT, 0.0), ({"accumulation_steps": 2, "weight_decay": 0.01}, signal.SIGTERM, 0.1)])
def test_resumed_run_equals_an_uninterrupted_one_to_the_last_bit(tmp_path, optimizer, number, dropout):
    whole = trainer_of(tmp_path / "a", net=TinyDecoder(dropout=dropout), optimizer=optimizer)
    expected = whole.train()
    assert expected.steps == 6 and len(expected.losses) == 6

    first = trainer_of(tmp_path / "b", net=TinyDecoder(dropout=dropout), optimizer=optimizer,
                       callbacks=[StopAfter(3, number)])
    handler = signal.getsignal(number)
    with pytest.raises(KeyboardInterrupt, match="after update 3"):
        first.train()
    assert signal.getsignal(number) == handler
    # Another process would start from other values; only the checkpoint may matter.
    second = trainer_of(tmp_path / "b", net=TinyDecoder(dropout=dropout), optimizer=optimizer)
    for item in second.net.trainable_params():
        item.set_data(ms.Tensor(np.full(item.shape, 0.123, np.float32)))
    for item in second.stepper.streams:
        item.set_data(ms.Tensor(np.array([1, 2], np.int32)))
    assert len(second.stepper.streams) == bool(dropout)
    result = second.train(resume=True)
    assert result.losses == expected.losses[3:]
    assert result.steps == 6
    for name, value in values_of(whole.net).items():
        np.testing.assert_array_equal(values_of(second.net)[name], value)
    rows = [(row["step"], row["loss"]) for row in read_log(tmp_path / "b" / "log.jsonl")]
    assert rows == list(zip(range(1, 7), expected.losses))
    for mine, theirs in zip((*whole.stepper.optimizer.mean, *whole.stepper.optimizer.square),
                            (*second.stepper.optimizer.mean, *second.stepper.optimizer.square)):
        np.testing.assert_array_equal(mine.asnumpy(), theirs.asnumpy())


def test_resume_from_an_older_checkpoint_repeats_the_log_from_there(tmp_path):
    trainer = trainer_of(tmp_path, save_every=2, keep_checkpoints=9)
    losses = trainer.train().losses
    assert [step for step, _ in checkpoints.list_checkpoints(tmp_path)] == [2, 4, 6]
    again = trainer_of(tmp_path, save_every=2, keep_checkpoints=9)
    result = again.train(resume=tmp_path / "checkpoint-000002")
    assert result.losses == losses[2:]
    assert [row["step"] for row in read_log(tmp_path / "log.jsonl")] == [1, 2, 3, 4, 5, 6]


def test_resuming_a_finished_run_does_nothing_and_an_absent_one_begins(tmp_path):
    done = trainer_of(tmp_path)
    assert done.train(resume=True).steps == 6
    before = values_of(done.net)
    again = trainer_of(tmp_path)
    assert again.train(resume=True).losses == []
    for name, value in before.items():
        np.testing.assert_array_equal(values_of(again.net)[name], value)


def test_a_folder_with_a_run_is_not_overwritten(tmp_path):
    trainer_of(tmp_path, steps=2).train()
    before = sorted(item.name for item in tmp_path.iterdir())
    with pytest.raises(CheckpointError, match="holds a run of 2 updates.*--resume"):
        trainer_of(tmp_path, steps=2).train()
    assert sorted(item.name for item in tmp_path.iterdir()) == before


def test_resume_refuses_other_settings_data_and_model(tmp_path):
    trainer_of(tmp_path, steps=2).train()
    for change, word in [({"optimizer": {"learning_rate": 0.1}}, "optimizer.learning_rate was 0.05"),
                         ({"steps": 4}, "steps was 2, is 4")]:
        with pytest.raises(CheckpointError, match=word):
            trainer_of(tmp_path, **{"steps": 2, **change}).train(resume=True)
    other = trainer_of(tmp_path, steps=2)
    other.loader = type(other.loader)(counting_items(19, 3), 3, 5, [12])
    with pytest.raises(CheckpointError, match="other training data"):
        other.train(resume=True)
    net = TinyDecoder()
    net.down = ms.Parameter(ms.Tensor(np.zeros((1, 6, 8), np.float32)), name="layer.lora_A")
    with pytest.raises(CheckpointError, match=r"layer.lora_A has shape \(1, 4, 8\)"):
        trainer_of(tmp_path, net=net, steps=2).train(resume=True)


# -- checkpoints -----------------------------------------------------------------------------------


def test_damaged_checkpoints_are_named_with_an_older_one(tmp_path):
    trainer_of(tmp_path, steps=3, save_every=1, keep_checkpoints=2).train()
    names = [path.name for _, path in checkpoints.list_checkpoints(tmp_path)]
    assert names == ["checkpoint-000002", "checkpoint-000003"]
    newest = tmp_path / "checkpoint-000003"
    blob = (newest / "state.safetensors").read_bytes()
    for damaged in (blob[:-7], blob[:-1] + bytes([blob[-1] ^ 1]), b""):
        (newest / "state.safetensors").write_bytes(damaged)
        with pytest.raises(CheckpointError, match="damaged.*resume from .*checkpoint-000002"):
            trainer_of(tmp_path, steps=3).train(resume=True)
    (newest / "state.json").write_text("{}")
    with pytest.raises(CheckpointError, match="not a checkpoint of this version"):
        checkpoints.read_checkpoint(newest)
    (newest / "state.safetensors").unlink()
    with pytest.raises(CheckpointError, match="cannot be read"):
        checkpoints.read_checkpoint(newest)
    with pytest.raises(CheckpointError, match="no checkpoint below"):
        checkpoints.read_checkpoint(tmp_path / "absent")


def test_an_interrupted_write_leaves_the_old_folder(tmp_path):
    target = tmp_path / "adapter"
    with checkpoints.atomic_folder(target) as folder:
        (folder / "x").write_text("old")
    with pytest.raises(RuntimeError, match="in between"):
        with checkpoints.atomic_folder(target) as folder:
            (folder / "x").write_text("new")
            raise RuntimeError("in between")
    assert (target / "x").read_text() == "old"
    with checkpoints.atomic_folder(target) as folder:
        (folder / "y").write_text("new")
    assert [item.name for item in target.iterdir()] == ["y"]
    with pytest.raises(CheckpointError, match="cannot write.*No space"):
        with checkpoints.atomic_folder(target):
            raise OSError(28, "No space left on device")
    assert [item.name for item in tmp_path.iterdir()] == ["adapter"]


def test_random_generators_are_restored(tmp_path):
    import random
    trainer = trainer_of(tmp_path)
    random.seed(3)
    np.random.seed(4)
    random.gauss(0, 1)
    np.random.normal()
    checkpoints.write_checkpoint(tmp_path, 1, checkpoints.tensors_of(trainer.stepper.optimizer), {})
    want = random.random(), random.gauss(0, 1), np.random.normal(), np.random.rand()
    _, tensors = checkpoints.read_checkpoint(tmp_path)
    checkpoints.restore(trainer.stepper.optimizer, tensors)
    assert (random.random(), random.gauss(0, 1), np.random.normal(), np.random.rand()) == want


@pytest.mark.skipif(os.geteuid() == 0 and not os.path.exists("/proc"), reason="needs /proc or no root")
def test_an_unwritable_folder_is_refused_before_anything_begins(tmp_path):
    (tmp_path / "file").write_text("")
    for folder in (tmp_path / "file", tmp_path / "file" / "below", "/proc/colora"):
        with pytest.raises(CheckpointError, match="cannot be written"):
            trainer_of(folder)


# -- evaluation, log, picture ----------------------------------------------------------------------


def test_evaluation_keeps_the_best_adapter(tmp_path):
    seen = []

    class Watch(Callback):
        def on_evaluation(self, trainer, record):
            seen.append((record["step"], record["loss"], trainer.net.up.asnumpy().copy()))

        def on_end(self, trainer, result):
            seen.append(result)
    trainer = trainer_of(tmp_path, validation=True, callbacks=[Watch()], steps=9, evaluate_every=2,
                         optimizer={"learning_rate": 0.9, "warmup_ratio": 0.0,
                                    "schedule": "constant"})
    result = trainer.train()
    assert seen.pop() is result
    assert [step for step, _, _ in seen] == [2, 4, 6, 8, 9]
    best = min(seen, key=lambda item: item[1])
    assert (result.best_step, result.best_loss) == best[:2]
    assert result.adapter == tmp_path / "best"
    np.testing.assert_array_equal(np.load(tmp_path / "best" / "adapter.npz")["layer.lora_B"], best[2])
    np.testing.assert_array_equal(np.load(tmp_path / "adapter" / "adapter.npz")["layer.lora_B"],
                                  trainer.net.up.asnumpy())
    rows = read_log(tmp_path / "log.jsonl")
    assert [row["loss"] for row in rows if row["kind"] == "evaluation"] == \
        [loss for _, loss, _ in seen] == [loss for _, loss in result.validation]
    assert (tmp_path / "loss.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert TrainingConfig.from_yaml(tmp_path / "recipe.yaml") == trainer.config


def test_training_learns(tmp_path):
    losses = trainer_of(tmp_path, steps=60, log_every=7).train().losses
    assert np.mean(losses[-5:]) < 0.8 * np.mean(losses[:5])
    steps = [row["step"] for row in read_log(tmp_path / "log.jsonl")]
    assert steps == [7, 14, 21, 28, 35, 42, 49, 56, 60]


def test_epochs_become_steps(tmp_path):
    config = config_of(tmp_path)
    config = dataclasses.replace(config, loop={"epochs": 1.5, "progress": False})
    trainer = trainer_of(tmp_path, config=config)
    assert trainer.steps == int(np.ceil(1.5 * trainer.loader.batches_per_epoch)) == 11


def test_dropout_is_off_in_evaluation_and_on_in_training(tmp_path):
    net = TinyDecoder(dropout=0.5)
    trainer = trainer_of(tmp_path, net=net, validation=True)
    batches = list(trainer.validation.epoch_batches())
    first = trainer.evaluation.run(batches, trainer.stepper)
    plain = trainer_of(tmp_path / "x", net=TinyDecoder(), validation=True)
    assert first == plain.evaluation.run(batches, plain.stepper)
    before = values_of(net)
    batch = [trainer.loader.next()]
    dropped = trainer.stepper(batch, 1, 9)[0]
    assert dropped != plain.stepper(batch, 1, 9)[0]
    for name in ("layer.lora_A", "layer.lora_B"):
        net.parameters_dict()[name].set_data(ms.Tensor(before[name]))
    assert trainer.evaluation.run(batches, trainer.stepper) == first


def test_log_and_curve_survive_broken_lines(tmp_path):
    path = tmp_path / "log.jsonl"
    log = RunLog(path)
    for step in range(1, 5):
        log.add("step", step, loss=1.0 / step)
    log.close()
    with open(path, "a") as handle:
        handle.write('{"kind": "step", "step": 5, "lo\n[]\n"x"\n')
    assert [row["step"] for row in read_log(path)] == [1, 2, 3, 4]
    RunLog(path, keep_until=2).close()
    assert [row["step"] for row in read_log(path)] == [1, 2]
    assert not draw_loss_curve(_written(tmp_path / "empty", ""), tmp_path / "x.png")
    with pytest.raises(CheckpointError, match="cannot read the log"):
        draw_loss_curve(tmp_path / "absent", tmp_path / "x.png")
    with pytest.raises(CheckpointError, match="cannot write"):
        draw_loss_curve(path, tmp_path / "no" / "x.png")
    assert smooth([4.0, 2.0, 0.0, 2.0], 2) == [4.0, 3.0, 1.0, 1.0]


def _written(path, text):
    path.write_text(text)
    return path


# -- errors ----------------------------------------------------------------------------------------


def test_a_loss_that_is_not_finite_names_the_update_and_keeps_the_parameters(tmp_path):
    class Poison(Callback):
        def on_step(self, trainer, record):
            if record["step"] == 2:
                self.values = values_of(trainer.net)
                trainer.net.embed.set_data(ms.Tensor(np.full(trainer.net.embed.shape, np.nan,
                                                             np.float32)))
    poison = Poison()
    trainer = trainer_of(tmp_path, callbacks=[poison], save_every=1)
    with pytest.raises(TrainingError, match="loss is nan at update 3.*lower optimizer.learning_rate"
                       ".*checkpoint-000002"):
        trainer.train()
    for name in ("layer.lora_A", "layer.lora_B"):
        np.testing.assert_array_equal(values_of(trainer.net)[name], poison.values[name])
    net = TinyDecoder()
    net.up.set_data(ms.Tensor(np.full(net.up.shape, np.inf, np.float32)))
    with pytest.raises(TrainingError, match="at update 1.*non-finite values"):
        trainer_of(tmp_path / "b", net=net).train()


def test_memory_errors_say_what_to_lower(tmp_path):
    trainer = trainer_of(tmp_path)
    for error in (MemoryError(), RuntimeError("Malloc for kernel output failed, Memory isn't enough")):
        def fail(*arguments, error=error):
            raise error
        trainer.stepper = fail
        with pytest.raises(TrainingError, match="memory ran out at update 1.*3 x 12 tokens.*lower"):
            trainer._update([trainer.loader.next()])

    def other(*arguments):
        raise RuntimeError("a bug")
    trainer.stepper = other
    with pytest.raises(RuntimeError, match="a bug"):
        trainer._update([trainer.loader.next()])


def test_examples_longer_than_the_context_are_refused(tmp_path):
    net = TinyDecoder()
    net.max_positions = 5
    with pytest.raises(ConfigError, match="the model's context is 5"):
        trainer_of(tmp_path, net=net)


def test_nothing_to_train_is_refused(tmp_path):
    net = TinyDecoder()
    for item in net.get_parameters():
        item.requires_grad = False
    with pytest.raises(ConfigError, match="nothing to train"):
        trainer_of(tmp_path, net=net)


def test_checkpoint_json_is_readable(tmp_path):
    trainer_of(tmp_path, steps=2).train()
    values = json.loads((tmp_path / "checkpoint-000002" / "state.json").read_text())
    assert values["step"] == 2 and values["data"]["position"] == 2
    assert values["recipe"]["optimizer"]["learning_rate"] == 0.05
