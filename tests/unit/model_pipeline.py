"""A training pipeline in MindSpore's own parts around an injected network; run as a script it trains and prints losses.

    python model_pipeline.py FOLDER [accumulate | scale]
"""

import sys

import numpy as np

import mindspore as ms
import mindspore.dataset as ds
from mindspore import nn, ops

from colora_ms.adapters import LoraConfig, inject
from colora_ms.training.callback import AdapterCheckpoint

SIZE, CLASSES, BATCH = 6, 5, 4


class Block(nn.Cell):
    def __init__(self):
        super().__init__()
        self.up = nn.Dense(SIZE, 9, activation="relu")
        self.norm = nn.BatchNorm1d(9)
        self.down = nn.Dense(9, SIZE)

    def construct(self, x):
        return x + self.down(self.norm(self.up(x)))


class Net(nn.Cell):
    def __init__(self):
        super().__init__()
        self.block = Block()
        self.head = nn.Dense(SIZE, CLASSES, has_bias=False)

    def construct(self, x):
        return self.head(self.block(x))


def network(r=2):
    """(network, handle) with the same values each time."""
    net, random = Net(), np.random.default_rng(0)
    for parameter in net.get_parameters():
        if "norm" not in parameter.name:
            parameter.set_data(ms.Tensor(random.standard_normal(parameter.shape).astype(np.float32) * 0.5))
    handle = inject(net, LoraConfig(r=r, target_modules=["up", "down"], modules_to_save=["head"],
                                     lora_dropout=0.1), seed=1)
    return net, handle


def with_loss(net):
    return nn.WithLossCell(net, nn.CrossEntropyLoss())


def rows(count):
    """(x (count, 6) float32, labels (count,) int32)."""
    random = np.random.default_rng(5)
    return (random.standard_normal((count, SIZE)).astype(np.float32),
            random.integers(0, CLASSES, count).astype(np.int32))


def dataset():
    """7 shuffled batches of 4, the last row of 29 dropped."""
    ds.config.set_seed(11)
    x, labels = rows(29)
    return ds.NumpySlicesDataset((x, labels), ["x", "label"], shuffle=True).batch(BATCH, drop_remainder=True)


class Accumulate(nn.TrainOneStepCell):
    """Gradients of two batches, added in Parameters, make one update."""

    def __init__(self, net, optimizer):
        super().__init__(net, optimizer)
        self.total = self.optimizer.parameters.clone(prefix="total", init="zeros")
        self.count = ms.Parameter(ms.Tensor(0, ms.int32), name="accumulated")
        self.map = ops.HyperMap()

    def construct(self, *inputs):
        loss = self.network(*inputs)
        grads = self.grad(self.network, self.weights)(*inputs, ops.ones_like(loss))
        loss = ops.depend(loss, self.map(ops.assign_add, self.total, grads))
        loss = ops.depend(loss, ops.assign_add(self.count, ms.Tensor(1, ms.int32)))
        if self.count % 2 == 0:
            loss = ops.depend(loss, self.optimizer(self.total))
            loss = ops.depend(loss, self.map(ops.assign, self.total, self.map(ops.zeros_like, self.total)))
        return loss


class Scaled(nn.TrainOneStepCell):
    """Dynamic loss scaling; Model's own way (DynamicLossScaleManager) has no CPU operators."""

    def __init__(self, net, optimizer):
        super().__init__(net, optimizer)
        self.scaler = ms.amp.DynamicLossScaler(2.0 ** 16, 2, 3)
        self.scale_value, self.counter = self.scaler.scale_value, self.scaler.counter

    def construct(self, *inputs):
        loss = self.network(*inputs)
        grads = self.grad(self.network, self.weights)(*inputs, ops.ones_like(loss) * self.scale_value)
        grads = self.scaler.unscale(grads)
        finite = ms.amp.all_finite(grads)
        loss = ops.depend(loss, self.scaler.adjust(finite))
        if finite:
            loss = ops.depend(loss, self.optimizer(grads))
        return loss


def model(folder=None, every=2, kind="accumulate", r=2):
    """(Model, handle, AdapterCheckpoint or None)."""
    net, handle = network(r)
    rate = nn.cosine_decay_lr(0.001, 0.05, 21, 7, 3)
    optimizer = nn.Adam(handle.trainable_params(), learning_rate=rate)
    if kind == "scale":
        built = ms.train.Model(Scaled(with_loss(ms.amp.auto_mixed_precision(net, "O2", ms.float16)), optimizer))
    else:
        built = ms.train.Model(Accumulate(with_loss(net), optimizer))
    return built, handle, AdapterCheckpoint(handle, folder, every) if folder else None


class Printer(ms.train.Callback):
    """One line a step: its number and the loss to the last bit."""

    def __init__(self, first):
        super().__init__()
        self.first = first

    def on_train_step_end(self, run_context):
        arguments = run_context.original_args()
        outputs = arguments.net_outputs
        loss = outputs[0] if isinstance(outputs, tuple) else outputs
        print(self.first + arguments.cur_step_num, loss.asnumpy().tobytes().hex(), flush=True)


def main(folder, kind="accumulate"):
    ms.set_context(mode=ms.GRAPH_MODE)
    ms.device_context.cpu.op_tuning.threads_num(1)  # exact losses; see AdapterCheckpoint
    ms.set_seed(3)
    built, _, keeper = model(folder, kind=kind)
    data = dataset()
    epoch = keeper.resume(built, data)
    print("start", flush=True)
    built.train(3, data, callbacks=[Printer(keeper.first), keeper], initial_epoch=epoch)


if __name__ == "__main__":
    main(*sys.argv[1:])
