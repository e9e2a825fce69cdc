"""Adapters on Cells of other models: nn.Dense, mint.nn.Linear, embeddings, norms, in lists and sequences."""

import numpy as np
import pytest

from colora_ms.adapters import LoraConfig, adapters_of, inject, load_adapter
from colora_ms.adapters.matching import value_shapes
from colora_ms.errors import AdapterError

RANDOM = {"init_lora_weights": False}
IDS = np.array([[1, 2, 3], [4, 5, 6]], np.int32)


@pytest.fixture
def build(mindspore):
    """A function that builds a small network; the same weights each time."""
    from mindspore import Tensor, mint, nn

    class Block(nn.Cell):
        def __init__(self):
            super().__init__()
            self.up = nn.Dense(8, 12, activation="relu")
            self.down = mint.nn.Linear(12, 8)
            self.norm = nn.LayerNorm((8,))

        def construct(self, x):
            return self.norm(x + self.down(self.up(x)))

    class Net(nn.Cell):
        def __init__(self):
            super().__init__()
            self.embed = nn.Embedding(11, 8)
            self.blocks = nn.CellList([Block(), Block()])
            self.head = nn.SequentialCell(nn.Dense(8, 8, has_bias=False), nn.ReLU(), nn.Dense(8, 5))

        def construct(self, ids):
            x = self.embed(ids)
            for block in self.blocks:
                x = block(x)
            return self.head(x)

    def make(dtype=None):
        net = Net()
        random = np.random.default_rng(0)
        for parameter in net.get_parameters():
            value = random.standard_normal(parameter.shape).astype(np.float32) * 0.5
            parameter.set_data(Tensor(value))
        return net.to_float(dtype) if dtype is not None else net

    return make


def run(net, ids=IDS):
    from mindspore import Tensor

    return net(Tensor(ids)).asnumpy()


def randomize(handle, name="default", spread=0.3):
    """Random values in everything that an adapter owns."""
    random = np.random.default_rng(len(name))
    for place, shapes in value_shapes(handle.matched(name), handle.modules).items():
        cell = handle.sites[place]
        values = {key: random.standard_normal(shape).astype(np.float32) * spread for key, shape in shapes.items()}
        target = handle.matched(name).targets.get(place[0])
        cell.write(handle.slot(name), values, target.scaling if target else 1.0)


CASES = [
    {"target_modules": "all-linear"},
    {"target_modules": ["up", "embed", "head.0"]},
    {"target_modules": ["down"], "bias": "lora_only"},
    {"target_modules": ["head.2"], "bias": "all"},
    {"target_modules": ["down"], "modules_to_save": ["norm", "head.2", "embed"]},
]


@pytest.mark.parametrize("values", CASES, ids=lambda values: str(values)[:50])
def test_choosing_merging_and_files(build, tmp_path, values):
    net = build()
    base = run(net)
    names = [p.name for p in net.get_parameters()]
    handle = inject(net, LoraConfig(r=3, **values), "a", slots=2)
    handle.add_adapter("b", LoraConfig(r=3, **values))
    randomize(handle, "a")
    randomize(handle, "b", 0.2)
    first = run(net)
    graphs = len(net.compile_cache)
    assert np.abs(first - base).max() > 1e-2
    handle.set_adapter("b")
    second = run(net)
    assert np.abs(second - first).max() > 1e-2
    with handle.disable_adapter():
        assert np.array_equal(run(net), base)
    assert np.array_equal(run(net), second)
    handle.merge()
    assert np.abs(run(net) - second).max() < 1e-4
    handle.unmerge()
    assert np.array_equal(run(net), second)
    handle.save(tmp_path / "b")
    handle.delete_adapter("b")
    assert np.array_equal(run(net), base)
    handle.load(tmp_path / "b", "again")
    handle.set_adapter("again")
    assert np.array_equal(run(net), second)
    assert len(net.compile_cache) == graphs, "something was compiled anew"
    assert np.array_equal(run(load_adapter(build(), tmp_path / "b").net), second)
    handle.unload()
    assert np.array_equal(run(net), base) and adapters_of(net) is None
    assert [p.name for p in net.get_parameters()] == names


def test_dense_with_activation_adds_before_it(mindspore):
    from mindspore import Tensor, nn

    net = nn.SequentialCell(nn.Dense(4, 6, activation="relu"))
    weight, bias = net[0].weight.asnumpy().astype(np.float64), net[0].bias.asnumpy()
    handle = inject(net, LoraConfig(r=2, lora_alpha=6, target_modules=["0"], **RANDOM))
    values = handle.sites["0", "lora"].read(0, {"down": (2, 4), "up": (6, 2)})
    x = np.random.default_rng(1).standard_normal((7, 4)).astype(np.float32)
    expected = np.maximum(x @ weight.T + bias + 3 * (x @ values["down"].T.astype(np.float64)) @ values["up"].T, 0)
    assert np.abs(net(Tensor(x)).asnumpy() - expected).max() < 1e-5
    handle.unload()
    assert np.abs(net(Tensor(x)).asnumpy() - np.maximum(x @ weight.T + bias, 0)).max() < 1e-5


def test_half_precision_base(mindspore):
    """The pair stays float32; the result has the base's dtype, and merging rounds once."""
    from mindspore import Tensor, nn

    net = nn.SequentialCell(nn.Dense(16, 8, dtype=mindspore.float16))
    x = Tensor(np.random.default_rng(1).standard_normal((3, 16)).astype(np.float16))
    before = net[0].weight.asnumpy().tobytes()
    base = net(x).asnumpy()
    handle = inject(net, LoraConfig(r=2, target_modules="all-linear", **RANDOM))
    cell = handle.sites["0", "lora"]
    assert cell.down.dtype == mindspore.float32
    y = net(x)
    assert y.dtype == mindspore.float16 and np.abs(y.asnumpy() - base).max() > 1e-2
    handle.merge()
    assert np.abs(net(x).asnumpy() - y.asnumpy()).max() < 1e-2
    handle.unmerge()
    assert cell.base_layer.weight.asnumpy().tobytes() == before


def test_nan_in_another_slot_leaks_neither_into_results_nor_gradients(build):
    import mindspore as ms
    from mindspore import Tensor, nn

    net = build()
    base = run(net)
    handle = inject(net, LoraConfig(r=2, target_modules=["up", "embed"], **RANDOM), slots=2)
    handle.add_adapter("broken", LoraConfig(r=2, target_modules=["up", "embed"]))
    for place, shapes in value_shapes(handle.matched("broken"), handle.modules).items():
        handle.sites[place].write(1, {key: np.full(shape, np.nan, np.float32) for key, shape in shapes.items()}, 1.0)
    first = run(net)
    assert np.isfinite(first).all()

    class Step(nn.Cell):
        def __init__(self):
            super().__init__(auto_prefix=False)
            self.grad = ms.grad(net, None, handle.trainable_params())

        def construct(self, ids):
            return self.grad(ids)

    step = Step()
    found = [g.asnumpy() for g in step(Tensor(IDS))]
    assert all(np.isfinite(g).all() and not g[1].any() for g in found) and found[0][0].any()
    handle.set_adapter("broken")
    assert not np.allclose(run(net), first)  # ReLU makes NaN zero here, so that the result may be finite
    with handle.disable_adapter():
        assert np.array_equal(run(net), base)
        assert all(not g.asnumpy().any() for g in step(Tensor(IDS)))


def test_training_moves_only_the_adapter(build):
    from mindspore import Tensor, nn

    net = build()
    handle = inject(net, LoraConfig(r=2, target_modules=["up", "down"], modules_to_save=["head.2"]))
    assert {p.name for p in net.trainable_params()} == {p.name for p in handle.trainable_params()}
    frozen = {p.name: p.asnumpy().copy() for p in net.get_parameters() if not p.requires_grad}
    labels = Tensor(np.array([0, 3, 1, 4, 2, 2], np.int32))
    optimizer = nn.Adam(handle.trainable_params(), learning_rate=0.02)

    class Loss(nn.Cell):
        def __init__(self):
            super().__init__(auto_prefix=False)
            self.net, self.loss = net, nn.CrossEntropyLoss()

        def construct(self, ids):
            return self.loss(self.net(ids).reshape((-1, 5)), labels)

    step = nn.TrainOneStepCell(Loss(), optimizer)
    losses = [float(step(Tensor(IDS))) for _ in range(30)]
    assert losses[-1] < 0.5 * losses[0]
    assert all(np.array_equal(p.asnumpy(), frozen[p.name]) for p in net.get_parameters() if p.name in frozen)


def test_refusals(build):
    net = build()
    with pytest.raises(AdapterError, match="target_modules is not given"):
        inject(net, LoraConfig())
    with pytest.raises(AdapterError, match="neither linear nor embedding"):
        inject(net, LoraConfig(target_modules=["norm"]))
    assert adapters_of(net) is None and all(p.requires_grad for p in net.get_parameters())
