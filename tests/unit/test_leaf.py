"""A new linear Cell is one class; Cells are replaced wherever they stand, and their Parameters keep their names."""

import numpy as np
import pytest

import mindspore as ms
from mindspore import Parameter, Tensor, nn

from colora_ms.adapters import LoraConfig, inject, load_adapter
from colora_ms.adapters.outside import leaf
from colora_ms.errors import AdapterError
from colora_ms.kernels import multi_lora_linear
from colora_ms.kernels.operands import FLOAT32, base_of, linear_of
from colora_ms.models.formats import FORMATS
from colora_ms.models.layers import Linear
from colora_ms.models.leaf import Leaf
from colora_ms.models.replacing import cell_at, replace_cells
from colora_ms.models.rows import slots_of

ms.set_context(mode=ms.GRAPH_MODE)

PATHS = ["model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.q_proj"]


class HalvedLinear(Leaf, nn.Cell):
    """A linear whose weight is stored as twice what it is; no other file knows of it."""

    fusible = True
    whole = False

    def __init__(self, base, path):
        super().__init__(auto_prefix=False)
        self.in_features, self.out_features = base.sizes()
        self.doubled = Parameter(Tensor(2 * base.weight.asnumpy()), name=f"{path}.doubled", requires_grad=False)
        self.bias, self.has_bias = base.bias, base.has_bias

    def base(self):
        return base_of(FLOAT32, self.doubled * 0.5, bias=self.bias)

    def operands(self):
        return linear_of(self.base())

    def construct(self, x, rows):
        return multi_lora_linear(x, slots_of(rows), self.operands())

    def sizes(self):
        return self.in_features, self.out_features

    def leaf_parameters(self):
        return {"weight": self.doubled}

    def base_values(self):
        return {"weight": self.doubled.asnumpy() / 2}


def logits(net, slots):
    ids = np.random.default_rng(0).integers(0, 90, (3, 6)).astype(np.int32)
    return net(Tensor(ids), Tensor(np.full(3, 6, np.int32)), slots).asnumpy()


def test_a_new_linear_is_one_class(tiny_decoder, tmp_path):
    plain, net = tiny_decoder(), tiny_decoder()
    names = [parameter.name for parameter in net.get_parameters()]
    config = LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
    wanted = inject(plain, config, "a", seed=3)
    wanted.save(tmp_path / "a")
    made = {path: HalvedLinear(cell_at(net, path), path) for path in PATHS}
    replace_cells(net, made)
    expected = [name.replace("weight", "doubled") if name.rpartition(".")[0] in PATHS else name for name in names]
    assert [parameter.name for parameter in net.get_parameters()] == expected
    handle = load_adapter(net, tmp_path / "a", "a", slots=2, max_rank=4)
    assert all(handle.modules[path].kind == "linear" and not handle.modules[path].whole for path in PATHS)
    assert all(handle.cells[path] is made[path] for path in PATHS)
    for name in ("a", None):
        assert np.array_equal(logits(net, handle.slots(3, [name] * 3)), logits(plain, wanted.slots(3, [name] * 3)))
    # Another rank: with the seed that another test may have left, the values of the same one could be those of "a".
    handle.add_adapter("magnitudes", LoraConfig(r=3, target_modules=["q_proj"], init_lora_weights=False))
    assert not np.array_equal(logits(net, handle.slots(3, "magnitudes")), logits(net, handle.slots(3, "a")))
    handle.unload()
    assert [parameter.name for parameter in net.get_parameters()] == expected
    assert all(cell_at(net, path) is made[path] for path in PATHS)


def test_faces_of_other_libraries_cells():
    dense, table, norm = nn.Dense(5, 7, has_bias=False), nn.Embedding(11, 3), nn.LayerNorm((4,))
    assert leaf(dense).sizes() == (5, 7) and leaf(dense).plain and not leaf(dense).takes_rows
    assert leaf(table).sizes() == (11, 3) and leaf(table).leaf_shapes() == {"weight": (11, 3)}
    assert leaf(norm).kind == "norm" and set(leaf(norm).base_values()) == {"weight", "bias"}
    assert leaf(nn.ReLU()) is None


class Places(nn.Cell):
    def __init__(self):
        super().__init__()
        self.one = nn.Dense(2, 2)
        self.several = nn.CellList([nn.Dense(2, 2), nn.SequentialCell(nn.Dense(2, 2), nn.ReLU())])
        self.named = nn.CellDict({"a": nn.Dense(2, 2)})

    def construct(self, x):
        return self.named["a"](self.several[1](self.several[0](self.one(x))))


def test_cells_are_replaced_wherever_they_stand():
    net = Places()
    x = Tensor(np.ones((1, 2), np.float32))
    before = net(x).asnumpy()
    names = [parameter.name for parameter in net.get_parameters()]
    places = ("one", "several.0", "several.1.0", "named.a")
    new = {path: nn.Dense(2, 2, weight_init="ones", bias_init="zeros") for path in places}
    for path, cell in new.items():
        cell.weight.name, cell.bias.name = f"new.{path}.weight", f"new.{path}.bias"
    replace_cells(net, new)
    assert [parameter.name for parameter in net.get_parameters()] == [f"new.{name}" for name in names]
    assert all(cell_at(net, path) is cell for path, cell in new.items())
    assert np.array_equal(net(x).asnumpy(),
                          np.full((1, 2), 16.0, np.float32)) and not np.array_equal(before, net(x).asnumpy())


def test_equal_names_are_refused_before_anything_changes():
    net = Places()
    net.several[0].weight.name = net.one.weight.name
    old = net.one
    with pytest.raises(AdapterError, match="two parameters of the model are called 'one.weight'"):
        replace_cells(net, {"one": nn.Dense(2, 2)})
    assert net.one is old


def test_a_linear_says_its_sizes_and_shapes_in_integer_formats():
    weight = Parameter(Tensor(np.full((4, 3), 0x98, np.uint8)), name="w")
    cell = Linear(weight, 6, 4, Parameter(Tensor(np.full((4, 1), 0.5, np.float32)), name="s"),
                  weight_format=FORMATS["int4"])
    assert cell.sizes() == (6, 4) and cell.leaf_shapes() == {"weight": (4, 6)}
    assert np.array_equal(cell.base_values()["weight"], np.tile(np.float32([0.0, 0.5]), (4, 3)))
