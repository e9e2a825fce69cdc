"""AdapterCheckpoint and adapters inside mindspore.train.Model: callbacks, mixed precision, accumulation, exact
resuming."""

import json
import os
import random as python_random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from colora_ms.errors import CheckpointError, ConfigError
from colora_ms.training.checkpoint import read_checkpoint

PIPELINE = Path(__file__).with_name("model_pipeline.py")


def start(folder, *options):
    """A child process that trains for 3 epochs of 7 steps; it prints one line a step."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "GLOG_v": "3"}
    return subprocess.Popen([sys.executable, str(PIPELINE), str(folder), *options], stdout=subprocess.PIPE, text=True,
                            env=environment)


def losses(lines):
    """{step: the four bytes of the float32 loss in hex} of the printed lines."""
    found = (line.split() for line in lines if line[:1].isdigit() and line.endswith("\n"))
    return {int(step): value for step, value in found}


def tensors(folder):
    """{name: (dtype, shape, bytes)} of a run's newest checkpoint."""
    return {name: (value.dtype, value.shape, value.tobytes()) for name, value in read_checkpoint(folder)[1].items()}


@pytest.mark.parametrize("options", [("accumulate",), pytest.param(("scale",), marks=pytest.mark.slow)],
                         ids=lambda value: value[0])
def test_killed_and_resumed_gives_the_same_losses(mindspore, tmp_path, options):
    """SIGKILL in a random step, twice; losses and final state equal those of an unbroken run to the last bit."""
    with start(tmp_path / "whole", *options) as whole:
        expected = losses(whole.stdout)
    assert whole.returncode == 0 and len(expected) == 21 and len(set(expected.values())) == 21
    seed = python_random.randrange(2 ** 32)
    draw = python_random.Random(seed)
    seen = {}
    for kill in (draw.randint(3, 6), draw.randint(2, 4), None):
        with start(tmp_path / "broken", *options) as child:
            lines = []
            for line in child.stdout:
                lines.append(line)
                if kill is not None and len(lines) == kill + 1:
                    time.sleep(draw.random() * 0.02)  # in a later step, or while a checkpoint is written
                    child.send_signal(signal.SIGKILL)
            child.wait()
        got = losses(lines)
        assert got and (kill is not None or child.returncode == 0)
        assert got == {step: expected[step] for step in got}, f"a resumed step differs (random seed {seed})"
        seen.update(got)
    assert seen.keys() == expected.keys() and min(got) > 1, "the last run did not resume"
    assert tensors(tmp_path / "whole") == tensors(tmp_path / "broken"), f"the final state differs (random seed {seed})"
    ends = [json.loads((tmp_path / name / "checkpoint-000021/adapter/adapter_config.json").read_text())
            for name in ("whole", "broken")]
    assert ends[0] == ends[1]
    assert sorted(p.name for p in (tmp_path / "broken").glob("checkpoint-*")) == \
        ["checkpoint-000020", "checkpoint-000021"]


@pytest.fixture
def pipeline(mindspore):
    sys.path.insert(0, str(PIPELINE.parent))
    try:
        import model_pipeline
    finally:
        sys.path.pop(0)
    return model_pipeline


@pytest.mark.parametrize("level, mode", [("O0", "graph"), ("O1", "graph"), ("O2", "graph"), ("O3", "graph"),
                                         ("O0", "pynative"), pytest.param("O1", "pynative", marks=pytest.mark.slow),
                                         ("O2", "pynative"), pytest.param("O3", "pynative", marks=pytest.mark.slow)])
def test_mixed_precision_levels(pipeline, mindspore, level, mode, tmp_path, monkeypatch):
    """auto_mixed_precision on an injected network: the adapter alone changes and the loss falls."""
    import mindspore as ms

    monkeypatch.chdir(tmp_path)  # MindSpore writes rewritten_network/ below the current folder
    before = ms.get_context("mode")
    ms.set_context(mode=ms.GRAPH_MODE if mode == "graph" else ms.PYNATIVE_MODE)
    try:
        net, handle = pipeline.network()
        frozen = {p.name: p.asnumpy().tobytes() for p in net.get_parameters() if not p.requires_grad}
        mixed = ms.amp.auto_mixed_precision(net, level, ms.float16) if level != "O0" else \
            ms.amp.auto_mixed_precision(net, level)
        optimizer = ms.nn.Adam(handle.trainable_params(), learning_rate=0.05)
        step = ms.nn.TrainOneStepCell(pipeline.with_loss(mixed), optimizer)
        x, labels = (ms.Tensor(value) for value in pipeline.rows(16))
        found = [float(step(x, labels).asnumpy()) for _ in range(10)]
        assert np.isfinite(found).all() and found[-1] < 0.8 * found[0]
        assert all(p.asnumpy().tobytes() == frozen[p.name] for p in net.get_parameters() if p.name in frozen)
        assert {p.name for p in optimizer.parameters} == {p.name for p in handle.trainable_params()}
        assert len(optimizer.moment1) == len(handle.trainable_params())
    finally:
        ms.set_context(mode=before)


@pytest.mark.parametrize("mode", ["graph", "pynative"])
def test_value_and_grad_and_recompute(pipeline, mindspore, mode):
    """ms.value_and_grad sees the adapter's parameters only; recompute changes no gradient."""
    import mindspore as ms

    before = ms.get_context("mode")
    ms.set_context(mode=ms.GRAPH_MODE if mode == "graph" else ms.PYNATIVE_MODE)
    try:
        found, random = [], ms.get_rng_state()
        for recompute in (False, True):
            net, handle = pipeline.network()
            for parameter in handle.trainable_params():
                if parameter.name.endswith("lora_B"):  # zero would hide what dropout does
                    parameter.set_data(ms.Tensor(np.full(parameter.shape, 0.3, np.float32)))
            if recompute:
                net.block.recompute()
            x, labels = (ms.Tensor(value) for value in pipeline.rows(5))
            loss = pipeline.with_loss(net).set_train()
            gradient = ms.value_and_grad(loss, None, net.trainable_params())
            ms.set_rng_state(random)
            steps = [gradient(x, labels) for _ in range(3)]
            assert len(steps[0][1]) == len(handle.trainable_params()) == 5
            found.append([a.asnumpy() for value, grads in steps for a in (value, *grads)])
        assert all(np.array_equal(a, b) for a, b in zip(*found)) and any(np.abs(g).max() > 0 for g in found[0][1:6])
        assert len({float(found[0][step]) for step in (0, 6, 12)}) == 3, "dropout gave the same mask twice"
    finally:
        ms.set_context(mode=before)


def test_with_the_usual_callbacks(pipeline, mindspore, tmp_path, capfd):
    """Model.train with LossMonitor, TimeMonitor, MindSpore's own checkpoints, and a second call that goes on."""
    import mindspore as ms
    from mindspore.train import CheckpointConfig, LossMonitor, ModelCheckpoint, TimeMonitor

    from colora_ms.training.callback import AdapterCheckpoint

    model, handle, _ = pipeline.model()
    names = {p.name for p in handle.trainable_params()}
    keeper = AdapterCheckpoint(handle, tmp_path / "run", every=4)
    own = ModelCheckpoint("all", str(tmp_path / "own"), CheckpointConfig(save_checkpoint_steps=7))
    model.train(1, pipeline.dataset(), callbacks=[LossMonitor(), TimeMonitor(), own, keeper])
    assert "loss is" in capfd.readouterr().out
    assert names <= set(ms.load_checkpoint(str(tmp_path / "own" / "all-1_7.ckpt")))
    assert sorted(p.name for p in (tmp_path / "run").iterdir()) == ["checkpoint-000004", "checkpoint-000007"]
    model, _, keeper = pipeline.model(tmp_path / "run", every=4)
    data = pipeline.dataset()
    assert keeper.resume(model, data) == 1 and data.get_init_step() == 7
    _, saved = read_checkpoint(tmp_path / "run")
    for name, parameter in keeper.state(model.train_network).items():
        assert parameter.asnumpy().tobytes() == saved[name].tobytes(), name
    assert {"moment1.block.up.lora_A", "global_step", "accumulated", "block.norm.moving_mean"} <= saved.keys()
    model.train(2, data, callbacks=[keeper], initial_epoch=1)
    assert (tmp_path / "run" / "checkpoint-000014").is_dir()


def test_refusals(pipeline, mindspore, tmp_path):
    import mindspore.dataset as ds

    model, handle, keeper = pipeline.model(tmp_path / "run", every=1)
    assert keeper.resume(model, pipeline.dataset()) == 0
    keeper.save(model.train_network, 3, 7)
    with pytest.raises(CheckpointError, match="7 batches an epoch"):
        keeper.resume(model, pipeline.dataset().take(2))
    other, _, stranger = pipeline.model(tmp_path / "run", every=1, r=3)
    with pytest.raises(CheckpointError, match="does not fit this model"):
        stranger.resume(other, pipeline.dataset())
    file = tmp_path / "run/checkpoint-000003/state.safetensors"
    file.write_bytes(file.read_bytes()[:-1] + b"\1")
    with pytest.raises(CheckpointError, match="damaged"):
        keeper.resume(model, pipeline.dataset())
    with pytest.raises(ConfigError, match="every is 0"):
        type(keeper)(handle, tmp_path, every=0)
    seed = ds.config.get_seed()
    data = pipeline.dataset().take(1)
    ds.config.set_seed(5489)
    try:
        with pytest.warns(UserWarning, match="has no seed"):
            model.train(1, data, callbacks=[keeper])
    finally:
        ds.config.set_seed(seed)
