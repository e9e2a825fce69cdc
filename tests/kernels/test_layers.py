"""decoder_layers: the C operator against the operators of its parts, to the last bit, and the face's checks."""

from typing import NamedTuple

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import call as direct
from call import Refused, call, set_threads, to_bf16
from colora_ms.kernels import layers
from colora_ms.kernels.aot import KernelError
from colora_ms.kernels.operands import read_layer


class Product(NamedTuple):
    """In the place of a linear's six tensors: a product of two or three small matrices, with adapters or without."""

    inner: object
    outer: object
    core: object = None
    bias: object = None
    down: object = None
    up: object = None
    scale: object = None


def flat_layer(layer):
    """A layer's tensors as the operators take them, its tag first."""
    from colora_ms.kernels.operands import LAYER, OPTIONAL

    mask = sum(1 << i for i, name in enumerate(OPTIONAL) if layer[name][0] is not None)
    found = [np.zeros(1 + mask, np.int8)]
    for name, kind in LAYER:
        part = layer[name]
        if kind == "linear":
            found += direct.product(*part) if isinstance(part, Product) else direct.linear(*part)
        elif kind != "optional_norm" or part[0] is not None:
            found += part
    return found


class Case:
    """Random layers and a random call."""

    def __init__(self, seed, rows=2, tokens=1, hidden=24, kv_heads=1, group=2, dim=6, inner=20, count=2, rank=3,
                 weights="float32", qk_norm=False, bf16_cache=False, bias=False, max_len=12, products=0.0):
        self.random = np.random.default_rng(seed)
        self.rows, self.tokens, self.hidden, self.count = rows, tokens, hidden, count
        self.weights, self.rank, self.bias, self.products = weights, rank, bias, products
        self.x, self.residual = self.normal(rows, tokens, hidden), self.normal(rows, tokens, hidden)
        self.slots = self.random.integers(-1, 3, rows).astype(np.int32)
        angles = self.normal(max_len, dim // 2)
        self.cos, self.sin = np.cos(angles), np.sin(angles)
        self.cache_rows = self.random.permutation(rows + 1)[:rows].astype(np.int32)
        self.length = self.random.integers(0, tokens + 1, rows).astype(np.int32)
        self.start = self.random.integers(0, max_len - tokens + 1, rows).astype(np.int32)
        width, kv_width = kv_heads * group * dim, kv_heads * dim
        self.layers = []
        for _ in range(count):
            caches = self.normal(2, rows + 1, kv_heads, max_len, dim)
            self.layers.append({
                "input_layernorm": self.norm(hidden), "q_proj": self.linear(width, hidden),
                "k_proj": self.linear(kv_width, hidden), "v_proj": self.linear(kv_width, hidden),
                "q_norm": self.norm(dim) if qk_norm else [None, None],
                "k_norm": self.norm(dim) if qk_norm else [None, None],
                "k_cache": [to_bf16(caches[0]) if bf16_cache else caches[0].copy()],
                "v_cache": [to_bf16(caches[1]) if bf16_cache else caches[1].copy()],
                "o_proj": self.linear(hidden, width), "post_attention_layernorm": self.norm(hidden),
                "gate_proj": self.linear(inner, hidden), "up_proj": self.linear(inner, hidden),
                "down_proj": self.linear(hidden, inner)})

    def normal(self, *shape):
        return self.random.normal(size=shape).astype(np.float32)

    def norm(self, n):
        return [self.normal(n), np.float32([1e-5])]

    def linear(self, out, columns):
        if self.random.random() < self.products:
            return self.factors(out, columns)
        weight, scale = self.normal(out, columns), None
        if self.weights == "bfloat16":
            weight = to_bf16(weight)
        elif self.weights == "int8":
            weight, scale = self.random.integers(-127, 128, (out, columns)).astype(np.int8), self.normal(out) / 64
        elif self.weights == "int4":
            weight, scale = self.random.integers(0, 256, (out, columns // 2)).astype(np.uint8), self.normal(out, 1) / 8
        adapter = [None] * 3
        if self.rank:
            adapter = [self.normal(3, self.rank, columns), self.normal(3, out, self.rank), self.normal(3)]
        return [weight, scale, self.normal(out) if self.bias else None, *adapter]

    def factors(self, out, columns):
        """In the place of a weight: a product of two or three small matrices."""
        rank, wide = self.random.integers(1, 9, 2)
        three = self.random.random() < 0.5
        found = [self.normal(rank, columns), self.normal(out, wide if three else rank),
                 self.normal(wide, rank) if three else None]
        if self.weights == "bfloat16":
            found = [None if factor is None else to_bf16(factor) for factor in found]
        adapter = [None] * 3
        if self.rank:
            adapter = [self.normal(3, self.rank, columns), self.normal(3, out, self.rank), self.normal(3)]
        return Product(*found, self.normal(out) if self.bias else None, *adapter)

    def fixed(self):
        return [self.x, self.residual, self.slots, self.cos, self.sin, self.cache_rows, self.start, self.length]

    def inputs(self):
        return self.fixed() + [tensor for layer in self.layers for tensor in flat_layer(layer)]

    def run(self):
        return call("decoder_layers", self.inputs(), [(self.x.shape, "float32")] * 2)

    def compose(self):
        """The same by the parts; the caches are copies."""
        x, residual = self.x, self.residual
        caches = []
        for layer in self.layers:
            h, residual = self.add_norm(x, residual, layer["input_layernorm"])
            q, k, v = self.product(h, layer, "q_proj", "k_proj", "v_proj")
            q, k = self.norm_heads(q, layer["q_norm"]), self.norm_heads(k, layer["k_norm"])
            copies = [copied(layer[name][0]) for name in ("k_cache", "v_cache")]
            caches.append(copies)
            y = call("cached_attention", [q, k, v, self.cos, self.sin, *copies, self.cache_rows, self.start,
                                          self.length],
                     [(q.shape, "float32")])[0]
            x, = self.product(y, layer, "o_proj")
            h, residual = self.add_norm(x, residual, layer["post_attention_layernorm"])
            gate, up = self.product(h, layer, "gate_proj", "up_proj")
            act = call("swiglu", [gate, up], [(gate.shape, "float32")])[0]
            x, = self.product(act, layer, "down_proj")
        return x, residual, caches

    def add_norm(self, x, residual, norm):
        return call("rms_norm_residual", [x, residual, *norm],
                    [(x.shape, "float32"), (x.shape, "float32"), (x.shape[:-1], "float32")])[:2]

    def norm_heads(self, x, norm):
        if norm[0] is None:
            return x
        heads = x.reshape(-1, len(norm[0]))
        return call("rms_norm", [heads, *norm],
                    [(heads.shape, "float32"), (heads.shape[:1], "float32")])[0].reshape(x.shape)

    def product(self, x, layer, *names):
        if any(isinstance(layer[name], Product) for name in names):
            return [self.chain(x, layer[name]) for name in names]
        outs = [first_shape(layer[name][0])[0] for name in names]
        return call("multi_lora_linear", [x, self.slots] + [t for name in names for t in direct.linear(*layer[name])],
                    [(x.shape[:2] + (out,), "float32") for out in outs])

    def chain(self, x, operands):
        """A linear by itself; of a product without adapters, the factors one by one."""
        if not isinstance(operands, Product):
            return self.product(x, {"only": operands}, "only")[0]
        if operands.down is not None:
            return call("multi_lora_linear", [x, self.slots, *direct.product(*operands)],
                        [(x.shape[:2] + first_shape(operands.outer)[:1], "float32")])[0]
        for factor, shift in ((operands.inner, None), (operands.core, None), (operands.outer, operands.bias)):
            if factor is not None:
                x, = self.product(x, {"only": [factor, None, shift, None, None, None]}, "only")
        return x


def first_shape(value):
    return (value[0] if isinstance(value, tuple) else value).shape


def copied(cache):
    return (cache[0].copy(), cache[1]) if isinstance(cache, tuple) else cache.copy()


def bits(value):
    return value[0] if isinstance(value, tuple) else value.view(np.int32)


def check(case):
    x, residual, caches = case.compose()
    y, total = case.run()
    assert np.array_equal(bits(y), bits(x)) and np.array_equal(bits(total), bits(residual))
    for layer, copies in zip(case.layers, caches):
        for name, copy in zip(("k_cache", "v_cache"), copies):
            assert np.array_equal(bits(layer[name][0]), bits(copy))


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 2**16), rows=st.integers(1, 5), tokens=st.integers(1, 7), kv_heads=st.integers(1, 3),
       group=st.integers(1, 3), half=st.integers(1, 9), hidden=st.integers(1, 40), inner=st.integers(1, 40),
       count=st.integers(1, 3), rank=st.sampled_from([0, 1, 5, 17]),
       weights=st.sampled_from(["float32", "bfloat16", "int8"]),
       qk_norm=st.booleans(), bf16_cache=st.booleans(), bias=st.booleans(), products=st.sampled_from([0.0, 0.5, 1.0]))
def test_equals_the_operators_of_its_parts(seed, half, **sizes):
    check(Case(seed, dim=2 * half, **sizes))


@pytest.mark.parametrize("tokens", [1, 9])
@pytest.mark.parametrize("weights", ["float32", "int4"])
def test_usual_sizes_on_one_and_two_threads(weights, tokens):
    for threads in (1, 2):
        set_threads(threads)
        check(Case(3, rows=3, tokens=tokens, hidden=64, kv_heads=2, group=3, dim=32, inner=96, count=2, rank=16,
                   weights=weights, max_len=300))


def test_products_of_usual_sizes_with_many_rows():
    check(Case(11, rows=3, tokens=40, hidden=64, kv_heads=2, group=3, dim=32, inner=96, rank=4, max_len=300,
               products=0.7))


def test_no_rows():
    case = Case(1, rows=0)
    assert case.run()[0].shape == (0, 1, 24)


@pytest.mark.parametrize("name, value, message", [
    ("slots", [3, 0], "'slots' holds slot 3 at index 0"),
    ("cache_rows", [0, 7], "'cache_rows' is 7 in row 1"),
    ("start", [0, 12], "'start' is 12 in row 1"),
    ("length", [1, 2], "'length' is 2 in row 1"),
])
def test_a_bad_number_changes_nothing(name, value, message):
    case = Case(5)
    case.length[:] = 1
    setattr(case, name, np.int32(value))
    before = [layer["k_cache"][0].copy() for layer in case.layers]
    with pytest.raises(Refused, match=message):
        case.run()
    assert all(np.array_equal(layer["k_cache"][0], copy) for layer, copy in zip(case.layers, before))


def shapes(case):
    return [list(first_shape(value)) if value is not None else [] for value in case.inputs()]


def places(good, layer=0):
    """{(part, name of the tensor): its place among the inputs} of one layer."""
    at = len(layers.ARGUMENTS)
    for _ in range(layer + 1):
        parts, at = read_layer("decoder_layers", good, at)
    found = {}
    for part, where in parts.items():
        if isinstance(where, tuple) and not hasattr(where, "form"):
            found.update({(part, i): place for i, place in enumerate(where)})
        else:
            found.update({(part, name): place for name, place in (*where.base.items(), *where.adapter.items())})
    return found


def test_shapes_are_checked_when_the_graph_is_compiled():
    case = Case(7, qk_norm=True, rank=0)
    good = shapes(case)
    assert layers._shapes(*good) == ([2, 1, 24], [2, 1, 24])
    fixed, at = layers.ARGUMENTS.index, places(good)
    for place, shape, message in [(fixed("residual"), [2, 1, 23], "residual"), (fixed("sin"), [12, 4], "sin"),
                                  (fixed("start"), [3], "start"), (at["input_layernorm", 0], [23], "input_layernorm"),
                                  (at["q_proj", "weight"], [13, 24], "outputs of q_proj"),
                                  (at["k_proj", "weight"], [5, 24], "outputs of k_proj"),
                                  (at["k_cache", 0], [3, 1, 12], "k_cache"),
                                  (at["down_proj", "weight"], [24, 19], "weight")]:
        with pytest.raises(KernelError, match=message):
            layers._shapes(*(shape if i == place else s for i, s in enumerate(good)))
    with pytest.raises(KernelError, match="number of operands"):
        layers._shapes(*good[:-1])


def test_shapes_of_products_are_checked_when_the_graph_is_compiled():
    case = Case(7, rank=0, products=1.0)
    case.layers[0]["down_proj"] = Product(case.normal(5, 20), case.normal(24, 4), case.normal(4, 5), case.normal(24))
    good = shapes(case)
    assert layers._shapes(*good) == ([2, 1, 24], [2, 1, 24])
    at = places(good)
    for name, shape, message in [("inner", [5, 19], "inner of down_proj"), ("outer", [24, 5], "outer of down_proj"),
                                 ("core", [4, 4], "core of down_proj"),
                                 ("outer", [23, 4], "outputs of down_proj|bias of"),
                                 ("bias", [23], "bias of down_proj")]:
        place = at["down_proj", name]
        with pytest.raises(KernelError, match=message):
            layers._shapes(*(shape if i == place else s for i, s in enumerate(good)))
