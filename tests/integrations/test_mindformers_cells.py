"""inject on mindformers' own Cells: every linear class, stored both ways, with and without bias, in several dtypes."""

import numpy as np
import pytest

from colora_ms.adapters import LoraConfig, adapters_of, inject
from colora_ms.errors import AdapterError

IN, OUT, RANK = 8, 6, 2


def legacy(**options):
    from mindformers.modules.layers import Linear

    return Linear(IN, OUT, **options)


def training(name):
    def build(params_dtype="float32", compute_dtype="float32", out=OUT, **options):
        from mindformers.parallel_core.training_graph.tensor_parallel import layers
        from mindformers.parallel_core.utils.init_method import init_method_normal

        config = transformer_config(params_dtype, compute_dtype)
        return getattr(layers, name)(IN, out, config, init_method=init_method_normal(0.5, config.params_dtype),
                                     **options)
    return build


def inference(name, *sizes):
    def build(params_dtype="float32", compute_dtype="float32", **options):
        from mindformers.parallel_core.inference.tensor_parallel import layers

        config = transformer_config(params_dtype, compute_dtype)
        return getattr(layers, name)(*sizes or (IN, OUT), config=config, compute_dtype=config.compute_dtype, **options)
    return build


def pynative(params_dtype="float32", compute_dtype="float32", **options):
    import mindspore as ms
    from mindformers.parallel_core.utils.init_method import init_method_normal
    from mindformers.pynative.layers.linear import Linear

    return Linear(IN, OUT, compute_dtype, params_dtype, init_method=init_method_normal(0.5, ms.float32), **options)


def transformer_config(params_dtype, compute_dtype):
    from mindformers.parallel_core.transformer_config import TransformerConfig

    return TransformerConfig(num_layers=1, hidden_size=IN, num_attention_heads=2, params_dtype=params_dtype,
                             compute_dtype=compute_dtype)


# (name, builder, options). In training_graph, a weight stored (in, out) works in mindformers itself only if it is
# square.
CASES = [
    ("Linear", legacy, dict(compute_dtype="float32")),
    ("Linear", legacy, dict(compute_dtype="float32", transpose_b=False, has_bias=False)),
    ("Linear", legacy, dict(compute_dtype="float32", transpose_b=False, activation="silu")),
    ("ColumnParallelLinear", training("ColumnParallelLinear"), {}),
    ("ColumnParallelLinear", training("ColumnParallelLinear"), dict(skip_bias_add=True)),
    ("ColumnParallelLinear", training("ColumnParallelLinear"), dict(bias=False, out=IN, transpose_b=False)),
    ("RowParallelLinear", training("RowParallelLinear"), {}),
    ("RowParallelLinear", training("RowParallelLinear"), dict(bias=False)),
    ("RowParallelLinear", training("RowParallelLinear"), dict(out=IN, transpose_b=False)),
    ("LinearNoTP", training("LinearNoTP"), {}),
    ("SequenceParallelLinear", training("SequenceParallelLinear"), dict(bias=False)),
    ("inference Column", inference("ColumnParallelLinear"), {}),
    ("inference Column", inference("ColumnParallelLinear"), dict(transpose_b=False, bias=False)),
    ("inference Row", inference("RowParallelLinear"), {}),
    ("inference Row", inference("RowParallelLinear"), dict(transpose_b=False, bias=False)),
    ("inference MergedColumn", inference("MergedColumnParallelLinear", IN, OUT // 2), {}),
    ("inference QKV", inference("QKVParallelLinear", IN, 4, 2, 1), dict(bias=False)),
    ("inference Replicated", inference("ReplicatedLinear"), dict(bias=False)),
    ("pynative Linear", pynative, {}),
    ("pynative Linear", pynative, dict(bias=False)),
]


def holder(cell):
    """A network around one linear: the first result of a pair, plus the bias that was not added."""
    from mindspore import nn

    pair = "training_graph" in type(cell).__module__

    class Holder(nn.Cell):
        def __init__(self):
            super().__init__()
            self.lin = cell

        def construct(self, x):
            if pair:
                y, bias = self.lin(x)
                return y if bias is None else y + bias
            return self.lin(x)

    return Holder()


def fill(net):
    """Known values in the weight and bias; returns (weight (out, in), bias or 0) in float64."""
    from mindspore import Tensor

    cell, random = net.lin, np.random.default_rng(3)
    for parameter in cell._params.values():
        if parameter is not None:
            value = Tensor(random.standard_normal(parameter.shape).astype(np.float32)).astype(parameter.dtype)
            parameter.set_data(value)
    weight = cell.weight.float().asnumpy().astype(np.float64)
    bias = cell.bias.float().asnumpy().astype(np.float64) if getattr(cell, "bias", None) is not None else 0.0
    return (weight if getattr(cell, "transpose_b", True) else weight.T), bias


def silu(x):
    return x / (1 + np.exp(-x))


@pytest.mark.parametrize("name, build, options", CASES,
                         ids=lambda value: value.__qualname__ if callable(value) else str(value)[:60])
def test_every_linear_class(mindformers, name, build, options):
    """y = W x + b + scale * up (down x) against NumPy float64; off, merged and unmerged; names as before."""
    import mindspore as ms
    from mindspore import Tensor

    if options.get("compute_dtype") == "float32" and build is legacy:
        options = {**options, "compute_dtype": ms.float32}
    net = holder(build(**options))
    weight, bias = fill(net)
    names = [p.name for p in net.get_parameters()]
    x = np.random.default_rng(1).standard_normal((2, 3, IN)).astype(np.float32)
    base = net(Tensor(x)).asnumpy()
    activation = silu if options.get("activation") else (lambda value: value)
    assert np.abs(base - activation(x @ weight.T + bias)).max() < 1e-5
    handle = inject(net, LoraConfig(r=RANK, lora_alpha=6, target_modules=["lin"], init_lora_weights=False))
    shapes = {"down": (RANK, IN), "up": (weight.shape[0], RANK)}
    pair = {key: value.astype(np.float64) for key, value in handle.sites["lin", "lora"].read(0, shapes).items()}
    expected = activation((x @ weight.T + bias) + 3 * (x @ pair["down"].T) @ pair["up"].T)
    adapted = net(Tensor(x)).asnumpy()
    assert np.abs(adapted - expected).max() < 1e-5 < np.abs(adapted - base).max()
    with handle.disable_adapter():
        assert np.array_equal(net(Tensor(x)).asnumpy(), base)
    handle.merge()
    assert np.abs(net(Tensor(x)).asnumpy() - expected).max() < 1e-5
    handle.unmerge()
    assert np.array_equal(net(Tensor(x)).asnumpy(), adapted)
    handle.unload()
    assert np.array_equal(net(Tensor(x)).asnumpy(), base) and [p.name for p in net.get_parameters()] == names


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("activation", [None, "silu"])
def test_half_precision(mindformers, dtype, activation):
    """Switched off, a half-precision linear gives the base's bits; bfloat16 has no CPU MatMul, only merging is
    checked."""
    import mindspore as ms
    from mindspore import Tensor

    compute = getattr(ms, dtype)
    net = holder(legacy(compute_dtype=compute, param_init_type=compute, activation=activation))
    weight, _ = fill(net)
    x = Tensor(np.random.default_rng(1).standard_normal((5, IN)).astype(np.float32))
    base = net(x).asnumpy() if dtype == "float16" else None
    handle = inject(net, LoraConfig(r=RANK, target_modules=["lin"], init_lora_weights=False))
    assert handle.sites["lin", "lora"].down.dtype == ms.float32
    if dtype == "float16":
        adapted = net(x).asnumpy()
        with handle.disable_adapter():
            assert np.array_equal(net(x).asnumpy(), base) and not np.allclose(adapted, base, atol=1e-2)
    delta = handle.sites["lin", "lora"].delta(0)
    before = handle.sites["lin", "lora"].base_layer.weight.float().asnumpy().tobytes()
    handle.merge()
    merged = handle.sites["lin", "lora"].base_layer.weight
    assert merged.dtype == compute
    assert np.array_equal(merged.float().asnumpy(),
                          Tensor((weight + delta).astype(np.float32)).astype(compute).float().asnumpy())
    handle.unmerge()
    assert merged.float().asnumpy().tobytes() == before


def test_a_weight_from_outside(mindformers):
    """A tied output head: the weight comes with the call, the pair is added, and merging is refused."""
    from mindspore import Tensor, nn

    head = training("ColumnParallelLinear")(bias=False, skip_weight_param_allocation=True)

    class Tied(nn.Cell):
        def __init__(self):
            super().__init__()
            self.output_layer = head

        def construct(self, x, weight):
            return self.output_layer(x, weight)[0]

    net, random = Tied(), np.random.default_rng(2)
    x, weight = (random.standard_normal(shape).astype(np.float32) for shape in ((3, IN), (OUT, IN)))
    handle = inject(net, LoraConfig(r=RANK, target_modules=["output_layer"], init_lora_weights=False))
    got = net(Tensor(x), Tensor(weight)).asnumpy()
    delta = handle.sites["output_layer", "lora"].delta(0)
    assert np.abs(got - x @ (weight + delta).T).max() < 1e-5 < np.abs(got - x @ weight.T).max()
    with pytest.raises(AdapterError, match="no weight of its own"):
        handle.merge()


def test_refusals(mindformers):
    experts = legacy(expert_num=2)
    net = holder(experts)
    with pytest.raises(AdapterError, match="several experts"):
        inject(net, LoraConfig(target_modules=["lin"]))
    assert adapters_of(net) is None and net.lin is experts
    split = inference("RowParallelLinear")()
    split.tensor_parallel_group_size = 2
    with pytest.raises(AdapterError, match="split over 2 devices"):
        inject(holder(split), LoraConfig(target_modules=["lin"]))
    with pytest.raises(AdapterError, match="can be saved whole"):
        inject(holder(legacy()), LoraConfig(target_modules=[], modules_to_save=["lin"]))


def test_llama_trains_its_adapter_alone(tiny_llama):
    """mindformers' own LlamaForCausalLM: all-linear leaves the head out, embedding and norm can be trained too."""
    import mindspore as ms
    from mindspore import Tensor, nn

    net = tiny_llama()
    ids = Tensor(np.random.default_rng(0).integers(3, 97, (2, 17)), ms.int32)
    net.set_train(True)
    base = float(net(ids).asnumpy()[0])
    handle = inject(net, LoraConfig(r=4, target_modules="all-linear", modules_to_save=["norm_out"]))
    assert len(handle.matched().targets) == 14 and "lm_head" not in handle.matched().targets
    assert float(net(ids).asnumpy()[0]) == base
    frozen = {p.name: p.asnumpy().copy() for p in net.get_parameters() if not p.requires_grad}
    trained = handle.trainable_params()
    assert {p.name for p in net.trainable_params()} == {p.name for p in trained} and len(trained) == 29
    optimizer = nn.AdamWeightDecay(trained, learning_rate=0.01)
    step = nn.TrainOneStepCell(net, optimizer)
    losses = [float(step(ids).asnumpy()[0]) for _ in range(12)]
    assert losses[-1] < losses[0] - 0.5
    assert all(np.array_equal(p.asnumpy(), frozen[p.name]) for p in net.get_parameters() if p.name in frozen)
