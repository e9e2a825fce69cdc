"""Lily's Cells against NumPy float64: all pools and both forms, padding, slots, gradients, one Parameter for all
layers."""

import numpy as np
import pytest

import mindspore as ms
from mindspore import Parameter, Tensor, nn, ops

from colora_ms.adapters import LilyConfig, inject
from colora_ms.errors import AdapterError
from colora_ms.kernels import ABSENT
from colora_ms.models.layers import Linear

ms.set_context(mode=ms.GRAPH_MODE)

IN, OUT, R, EXPERTS, LAYERS = 5, 7, 3, 2, 3
SLOTS = np.array([0, -1, 1, 0], np.int32)
LENGTHS = np.array([4, 2, 3, 1], np.int32)


class Layer(nn.Cell):
    def __init__(self, weight):
        super().__init__()
        self.proj = Linear(weight, IN, OUT)

    def construct(self, x, rows):
        return self.proj(x, rows)


class Stack(nn.Cell):
    """Linears that take (x, rows), as the decoder's do; their outputs side by side."""

    def __init__(self, layers=LAYERS):
        super().__init__()
        random = np.random.default_rng(0)
        cells = []
        for i in range(layers):
            weight = Parameter(Tensor(random.standard_normal((OUT, IN)).astype(np.float32)),
                               name=f"layers.{i}.proj.weight")
            cells.append(Layer(weight))
        self.layers = nn.CellList(cells)
        for i, cell in enumerate(cells):
            cell.proj.weight.name = f"layers.{i}.proj.weight"

    def construct(self, x, slots, lengths=ABSENT):
        outputs = ()
        for layer in self.layers:
            outputs = outputs + (layer(x, (slots, lengths)),)
        return ops.stack(outputs)


def made(pool="token", form="code", trainable=True, slots=2, max_rank=None):
    """(net, handle) with adapters "a" (rank R) and "b" (rank R - 1) of random values."""
    net = Stack()
    settings = dict(stride_A=2, num_B=EXPERTS, scaling=1.5, router_pool=pool, router_form=form, target_modules=["proj"],
                    init_weights=False)
    handle = inject(net, LilyConfig(r=R, **settings), "a", slots=slots, trainable=trainable, seed=3, max_rank=max_rank)
    if slots > 1:
        handle.add_adapter("b", LilyConfig(r=R - 1, **settings))
    return net, handle


def rows(seed=1, tokens=4):
    return np.random.default_rng(seed).standard_normal((len(SLOTS), tokens, IN)).astype(np.float32)


def softmax(z):
    z = np.exp(z - z.max(-1, keepdims=True))
    return z / z.sum(-1, keepdims=True)


def reference(handle, x, slots, lengths, pool, form):
    """(layers, rows, tokens, out) in float64, from the papers' formulas: the experts are mixed, then multiplied."""
    names, x = handle.names, x.astype(np.float64)
    result = []
    for layer in range(LAYERS):
        path = f"layers.{layer}.proj"
        cell = handle.sites[path, "lora"]
        y = x @ cell.base_layer.weight.asnumpy().astype(np.float64).T
        hidden, p = {}, {}
        for slot in range(len(names)):
            r = handle.config(names[slot]).r
            down = cell.down.asnumpy()[slot, :r].astype(np.float64)
            hidden[slot] = x @ down.T
            router = cell.router.asnumpy()[slot].astype(np.float64)
            if pool == "static":
                p[slot] = np.broadcast_to(softmax(router), x.shape[:2] + (EXPERTS,))
                continue
            logits = hidden[slot] @ router[:, :r].T
            real = np.arange(x.shape[1]) < lengths[:, None]  # (rows, tokens)
            mine = (real & (slots == slot)[:, None])[..., None]
            if pool == "token":
                p[slot] = softmax(logits)
            else:
                axes = (1,) if pool == "sequence" else (0, 1)
                counted = mine if pool == "batch" else real[..., None]
                if form == "code":
                    pooled = (softmax(logits) * counted).sum(axes,
                                                             keepdims=True) / counted.sum(axes, keepdims=True).clip(1)
                else:
                    pooled = softmax((logits * counted).sum(axes, keepdims=True))
                p[slot] = np.broadcast_to(pooled, logits.shape)
        for row, slot in enumerate(slots):
            if slot < 0:
                continue
            r = handle.config(names[slot]).r
            up = cell.up.asnumpy()[slot, :, :, :r].astype(np.float64)  # (out, experts, r)
            mixed = np.einsum("te,oer->tor", p[slot][row], up)
            y[row] += 1.5 * np.einsum("tr,tor->to", hidden[slot][row], mixed)
        result.append(y)
    return np.stack(result)


CASES = [("token", "code", True), ("token", "paper", False), ("sequence", "code", True), ("sequence", "paper", False),
         ("batch", "code", False), ("batch", "paper", True), ("static", "code", True)]


@pytest.mark.parametrize("pool, form, trainable", CASES)
def test_what_a_cell_computes_is_what_the_formula_says(pool, form, trainable):
    net, handle = made(pool, form, trainable)
    lengths = np.full(len(SLOTS), 4)
    x = rows()
    if pool in ("sequence", "batch"):
        whole = net(Tensor(x), Tensor(SLOTS)).asnumpy()
        assert np.abs(whole - reference(handle, x, SLOTS, lengths, pool, form)).max() < 1e-5
        lengths = LENGTHS
        for row, length in enumerate(lengths):  # what padding holds must reach no real token
            x[row, length:] = 1e6
    known = (Tensor(lengths.astype(np.int32)),) if lengths is LENGTHS else ()
    got = net(Tensor(x), Tensor(SLOTS), *known).asnumpy()
    wanted = reference(handle, x, SLOTS, lengths, pool, form)
    for row, length in enumerate(lengths):
        assert np.abs(got[:, row, :length] - wanted[:, row, :length]).max() < 1e-5
    changed = np.abs(got - np.stack([x @ layer.proj.base_layer.weight.asnumpy().T
                                     for layer in net.layers])).max((0, 2, 3))
    assert (changed[SLOTS >= 0] > 0.05).all() and changed[1] < 1e-5 * np.abs(x).max()


def test_rows_without_an_adapter_and_foreign_slots_stay_apart():
    for trainable in (True, False):
        net, handle = made(trainable=trainable)
        x, none = rows(), np.full(4, -1, np.int32)
        plain = np.stack([layer.proj.base_layer(Tensor(x), (Tensor(none), ABSENT)).asnumpy() for layer in net.layers])
        mixed = net(Tensor(x), Tensor(SLOTS)).asnumpy()
        assert np.array_equal(mixed[:, 1], plain[:, 1])
        alone = net(Tensor(x), handle.slots(4, "a")).asnumpy()
        for name in ("lily_A", "lily_B", "lily_router"):
            for parameter in net.get_parameters():
                if parameter.name.endswith(name):
                    value = parameter.asnumpy().copy()
                    value[handle.slot("b")] = np.nan
                    parameter.set_data(Tensor(value))
        poisoned = net(Tensor(x), Tensor(np.array([0, -1, 0, 0], np.int32))).asnumpy()
        assert np.array_equal(poisoned[:, [0, 2, 3]],
                              alone[:, [0, 2, 3]]) and np.array_equal(poisoned[:, 1], plain[:, 1])


def test_a_tensor_in_the_place_of_rows_is_refused():
    net, handle = made(trainable=False)
    with pytest.raises(AdapterError, match="a tensor in the place of rows"):
        handle.sites["layers.0.proj", "lora"](Tensor(rows()), Tensor(SLOTS))
    with pytest.raises(AdapterError, match="a tensor in the place of rows"):
        net.layers[0].proj.base_layer(Tensor(rows()), Tensor(SLOTS))


def test_two_axes_are_one_token_a_row():
    net, handle = made(trainable=False)
    x = rows(tokens=1)
    assert np.array_equal(net(Tensor(x[:, 0]), Tensor(SLOTS)).asnumpy(),
                          net(Tensor(x), Tensor(SLOTS)).asnumpy()[:, :, 0])


def test_shared_factors_are_one_parameter_each():
    net, handle = made(slots=1)
    cells = [handle.sites[f"layers.{i}.proj", "lora"] for i in range(LAYERS)]
    assert cells[0].down is cells[1].down and cells[1].down is not cells[2].down
    assert cells[0].up is cells[1].up and cells[1].up is cells[2].up
    assert len({id(cell.router) for cell in cells}) == LAYERS
    names = [parameter.name for parameter in handle.trainable_params()]
    assert sorted(names) == ["layers.0.proj.lily_A", "layers.0.proj.lily_B", "layers.0.proj.lily_router",
                             "layers.1.proj.lily_router", "layers.2.proj.lily_A", "layers.2.proj.lily_router"]
    assert sorted(parameter.name for parameter in net.trainable_params()) == sorted(names)
    expected = 2 * R * IN + EXPERTS * R * OUT + 3 * EXPERTS * R
    assert sum(parameter.size for parameter in handle.trainable_params()) == expected


class Loss(nn.Cell):
    """A weighted sum of the outputs, with gradients of the trainable Parameters."""

    def __init__(self, net):
        super().__init__(auto_prefix=False)
        self.net = net
        self.weights = Tensor(np.random.default_rng(5).standard_normal((LAYERS, 4, 4, OUT)).astype(np.float32))

    def construct(self, x, slots):
        return (ops.tanh(self.net(x, slots)) * self.weights).sum()


@pytest.mark.parametrize("pool, form",
                         [("token", "code"), ("batch", "code"), ("sequence", "paper"), ("static", "code")])
def test_gradients_of_shared_factors_add_up(pool, form):
    """Against finite differences of the float64 formula, in which the factors of all layers move together."""
    net, handle = made(pool, form, slots=1)
    loss = Loss(net)
    parameters = handle.trainable_params()
    x, slots, lengths = rows(), np.array([0, -1, 0, 0], np.int32), np.full(4, 4)
    gradients = ops.value_and_grad(loss, None, ms.ParameterTuple(parameters))
    value, found = gradients(Tensor(x), Tensor(slots))

    def total():
        outputs = reference(handle, x, slots, lengths, pool, form)
        return (np.tanh(outputs) * loss.weights.asnumpy()).sum()

    assert abs(float(value.asnumpy()) - total()) < 1e-3
    random = np.random.default_rng(2)
    for parameter, gradient in zip(parameters, found):
        before = parameter.asnumpy().copy()
        direction = random.uniform(-1.0, 1.0, before.shape)
        sides = []
        for sign in (1, -1):
            # Rounded to float32, so that both sides know the step that was really made.
            parameter.set_data(Tensor((before + sign * 2.0 ** -7 * direction).astype(np.float32)))
            sides.append(total())
        moved = (before + 2.0 ** -7 * direction).astype(np.float32).astype(np.float64) - before
        parameter.set_data(Tensor(before))
        expected = (sides[0] - sides[1]) / 2
        got = (gradient.asnumpy().astype(np.float64) * moved).sum()
        assert abs(expected - got) < 2e-3 * abs(expected) + 1e-6 and abs(expected) > 1e-6, parameter.name


def test_one_optimizer_state_a_shared_factor():
    from colora_ms.training.config import OptimizerConfig
    from colora_ms.training.optimizer import AdamW

    net, handle = made(slots=1)
    optimizer = AdamW(net.trainable_params(), OptimizerConfig(loraplus_lr_ratio=16.0))
    assert len(optimizer.mean) == len(optimizer.trained) == 6
    assert [parameter.name for parameter in optimizer.trained[optimizer.downs:]] == ["layers.0.proj.lily_B"]


def test_static_weights_merge_exactly_and_come_back():
    net, handle = made("static", trainable=False)
    x = rows()
    before = net(Tensor(x), handle.slots(4, "b")).asnumpy()
    weights = [layer.proj.base_layer.weight.asnumpy().copy() for layer in net.layers]
    handle.merge("b")
    assert np.abs(net(Tensor(x), handle.slots(4, "b")).asnumpy() - before).max() < 1e-5
    assert (handle.slots(4, "b").asnumpy() == -1).all()
    handle.unmerge()
    for layer, weight in zip(net.layers, weights):
        assert np.array_equal(layer.proj.base_layer.weight.asnumpy(), weight)
    assert np.array_equal(net(Tensor(x), handle.slots(4, "b")).asnumpy(), before)


def test_routed_adapters_refuse_to_merge_with_the_reason():
    for pool in ("token", "sequence", "batch"):
        net, handle = made(pool)
        weight = net.layers[0].proj.base_layer.weight.asnumpy().copy()
        with pytest.raises(AdapterError, match=f"router_pool='{pool}'.*weighs the experts by each input.*\"static\""):
            handle.merge("a")
        assert handle.merged is None and np.array_equal(net.layers[0].proj.base_layer.weight.asnumpy(), weight)


def test_adapters_of_another_structure_are_refused_and_nothing_changes():
    net, handle = made()
    handle.delete_adapter("b")
    good = dict(r=R, stride_A=2, num_B=EXPERTS, target_modules=["proj"])
    for change, words in [({"stride_A": 1}, "A owned by layers.0.proj, the adapter has layers.1.proj"),
                          ({"num_B": 3}, "experts 2, the adapter has 3"),
                          ({"router_pool": "batch"}, "router_pool token, the adapter has batch"),
                          ({"r": R + 1}, "room for rank 3, the adapter has rank 4"),
                          ({"layers_to_transform": [1, 2], "layers_pattern": "layers"},
                           "B owned by layers.0.proj, the adapter has layers.1.proj")]:
        with pytest.raises(AdapterError, match=words):
            handle.add_adapter("b", LilyConfig(**{**good, **change}))
    from colora_ms.adapters import LoraConfig
    with pytest.raises(AdapterError, match="of the method LORA, the model was prepared for LILY"):
        handle.add_adapter("b", LoraConfig(r=2, target_modules=["proj"]))
    assert handle.names == ("a",)
    handle.add_adapter("b", LilyConfig(**good))


def test_linears_of_other_models_with_one_row_and_none():
    for pool in ("token", "static"):
        net = nn.SequentialCell(nn.Dense(IN, OUT, activation="relu"), nn.Dense(OUT, OUT))
        x = rows()[:, 0]
        base = net(Tensor(x)).asnumpy()
        handle = inject(net, LilyConfig(r=R, scaling=2.0, target_modules=["0", "1"], init_weights=False,
                                        router_pool=pool))
        got = net(Tensor(x)).asnumpy()
        y = x.astype(np.float64)
        for name in ("0", "1"):
            cell = handle.sites[name, "lora"]
            hidden = y @ cell.down.asnumpy()[0].T.astype(np.float64)
            router = cell.router.asnumpy()[0].astype(np.float64)
            p = softmax(hidden @ router.T) if pool == "token" else np.broadcast_to(softmax(router), (len(x), EXPERTS))
            part = np.einsum("ne,oer,nr->no", p, cell.up.asnumpy()[0].astype(np.float64), hidden)
            inner = cell.base_layer
            y = y @ inner.weight.asnumpy().T.astype(np.float64) + inner.bias.asnumpy() + 2.0 * part
            y = np.maximum(y, 0) if name == "0" else y
        assert np.abs(got - y).max() < 1e-4 and np.abs(got - base).max() > 1e-3
        assert np.abs(net(Tensor(x[:1])).asnumpy() - got[:1]).max() < 1e-5
        with handle.disable_adapter():
            assert np.array_equal(net(Tensor(x)).asnumpy(), base)
        handle.unload()
        assert np.array_equal(net(Tensor(x)).asnumpy(), base)
