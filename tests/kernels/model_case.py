"""Random layers of the Llama family for tests, and what the operators of their parts make of a flat batch."""

from typing import NamedTuple

import numpy as np

import call as direct
from call import call, to_bf16
from colora_ms.kernels.layer_form import LAYER_REAL, LAYER_WHOLE
from colora_ms.kernels.operands import LAYER, OPTIONAL
from colora_ms.kernels.paged import BLOCK
from paged_case import empty_cache, numbers

#: Factor on the scales of the second three slots.
STRENGTH = np.float32(0.7)


class Product(NamedTuple):
    """In the place of a linear's six tensors: a product of two or three small matrices, with adapters or without."""

    inner: object
    outer: object
    core: object = None
    bias: object = None
    down: object = None
    up: object = None
    scale: object = None


def flat(part):
    """A linear's tensors as the operators take them."""
    return direct.product(*part) if isinstance(part, Product) else direct.linear(*part)


#: A layer of the Llama family, in numbers.
LLAMA = {name: 0 for name in (*LAYER_WHOLE, *LAYER_REAL)} | {"branch_factor": 1.0}


def flat_layer(layer, dim):
    """A layer's tensors as the step takes them, its form first."""
    there = {name: name in layer and layer[name][0] is not None for name, _ in LAYER}
    form = {**LLAMA, "rotary_width": dim, "parts": sum(1 << i for i, name in enumerate(OPTIONAL) if there[name])}
    found = [np.array([form[name] for name in LAYER_WHOLE], np.int32),
             np.array([form[name] for name in LAYER_REAL], np.float32)]
    for name, kind in LAYER:
        if there[name]:
            found += flat(layer[name]) if kind in ("linear", "optional_linear") else layer[name]
    return found


def first_shape(value):
    return (value[0] if isinstance(value, tuple) else value).shape


def copied(cache):
    return (cache[0].copy(), cache[1]) if isinstance(cache, tuple) else cache.copy()


def bits(value):
    value = numbers(value)
    return value.view(np.int32) if value.dtype == np.float32 else value


class Model:
    """Random layers over ``blocks`` blocks of cache, an embedding and a head."""

    def __init__(self, seed, hidden=24, kv_heads=1, group=2, dim=6, inner=20, count=2, rank=3, weights="float32",
                 qk_norm=False, cache="float32", bias=False, products=0.0, blocks=12, positions=64, vocab=29,
                 adapted_head=True, tied=False):
        self.random = np.random.default_rng(seed)
        self.hidden, self.vocab, self.cache, self.blocks = hidden, vocab, cache, blocks
        self.weights, self.rank, self.bias, self.products = weights, rank, bias, products
        angles = self.normal(positions, dim // 2)
        self.cos, self.sin = np.cos(angles), np.sin(angles)
        width, kv_width = kv_heads * group * dim, kv_heads * dim
        self.layers = []
        for _ in range(count):
            caches = [empty_cache(blocks, kv_heads, dim, cache) for _ in range(2)]
            self.layers.append({
                "before_attention": self.norm(hidden), "q_proj": self.linear(width, hidden),
                "k_proj": self.linear(kv_width, hidden), "v_proj": self.linear(kv_width, hidden),
                "q_norm": self.norm(dim) if qk_norm else [None, None],
                "k_norm": self.norm(dim) if qk_norm else [None, None],
                "k_cache": [caches[0]], "v_cache": [caches[1]],
                "o_proj": self.linear(hidden, width), "before_mlp": self.norm(hidden),
                "gate_proj": self.linear(inner, hidden), "up_proj": self.linear(inner, hidden),
                "down_proj": self.linear(hidden, inner)})
        self.embed = self.linear(vocab, hidden, plain=True)[:2]
        self.last_norm = self.norm(hidden)
        head = self.linear(vocab, hidden, plain=True)
        self.head = (self.embed if tied else head[:2]) + head[2:3] + (head[3:] if adapted_head else [None] * 3)

    def normal(self, *shape):
        return self.random.normal(size=shape).astype(np.float32)

    def norm(self, n):
        return [self.normal(n), np.float32([1e-5])]

    def linear(self, out, columns, plain=False):
        if not plain and self.random.random() < self.products:
            return self.factors(out, columns)
        weight, scale = self.normal(out, columns), None
        if self.weights == "bfloat16":
            weight = to_bf16(weight)
        elif self.weights == "int8":
            weight, scale = self.random.integers(-127, 128, (out, columns)).astype(np.int8), self.normal(out) / 64
        elif self.weights == "int4":
            weight, scale = self.random.integers(0, 256, (out, columns // 2)).astype(np.uint8), self.normal(out, 1) / 8
        return [weight, scale, self.normal(out) if self.bias else None, *self.adapter(out, columns)]

    def adapter(self, out, columns):
        """Six slots: three adapters, and the same at another strength."""
        if not self.rank:
            return [None] * 3
        down, up, scale = self.normal(3, self.rank, columns), self.normal(3, out, self.rank), self.normal(3)
        return [np.concatenate([x, x]) for x in (down, up)] + [np.concatenate([scale, scale * STRENGTH])]

    def factors(self, out, columns):
        """In the place of a weight: a product of two or three small matrices."""
        rank, wide = self.random.integers(1, 9, 2)
        three = self.random.random() < 0.5
        found = [self.normal(rank, columns), self.normal(out, wide if three else rank),
                 self.normal(wide, rank) if three else None]
        if self.weights == "bfloat16":
            found = [None if factor is None else to_bf16(factor) for factor in found]
        return Product(*found, self.normal(out) if self.bias else None, *self.adapter(out, columns))

    def operands(self):
        """The tensors of the model's table of weights (``Decoder.step_operands``)."""
        return [np.array([0, 1], np.int32), np.array([1, 1, 0], np.float32), self.cos, self.sin, *self.last_norm,
                *flat(self.embed), *flat(self.head),
                *(t for layer in self.layers for t in flat_layer(layer, 2 * self.cos.shape[1]))]

    def caches(self):
        return [layer[name][0] for layer in self.layers for name in ("k_cache", "v_cache")]

    def restore(self, caches):
        for cache, before in zip(self.caches(), caches):
            numbers(cache)[:] = numbers(before)

    # -- by the parts --------------------------------------------------------------------------------------------------

    def hidden_states(self, ids, rows, positions, slots, tables):
        """Flat batch -> (tokens, hidden) behind the last norm; slots: of the tokens. The caches are written."""
        x = call("embedding", [ids.reshape(-1, 1), *flat(self.embed)], [((len(ids), 1, self.hidden), "float32")])[0]
        residual = np.zeros_like(x)
        for layer in self.layers:
            h, residual = self.add_norm(x, residual, layer["before_attention"])
            q, k, v = self.products_of(h, slots, layer, "q_proj", "k_proj", "v_proj")
            q, k = self.norm_heads(q, layer["q_norm"]), self.norm_heads(k, layer["k_norm"])
            y = call("paged_attention", [*(t[:, 0] for t in (q, k, v)), self.cos, self.sin, layer["k_cache"][0],
                                         layer["v_cache"][0], rows, positions, tables], [(q[:, 0].shape, "float32")])[0]
            x, = self.products_of(y[:, None], slots, layer, "o_proj")
            h, residual = self.add_norm(x, residual, layer["before_mlp"])
            gate, up = self.products_of(h, slots, layer, "gate_proj", "up_proj")
            act = call("swiglu", [gate, up], [(gate.shape, "float32")])[0]
            x, = self.products_of(act, slots, layer, "down_proj")
        return self.add_norm(x, residual, self.last_norm)[0][:, 0]

    def logits(self, h, slots):
        """(tokens, hidden) -> (tokens, vocab)."""
        return call("multi_lora_linear", [h, slots, *flat(self.head)], [((len(h), self.vocab), "float32")])[0]

    def add_norm(self, x, residual, norm):
        return call("rms_norm_residual", [x, residual, *norm],
                    [(x.shape, "float32"), (x.shape, "float32"), (x.shape[:-1], "float32")])[:2]

    def norm_heads(self, x, norm):
        if norm[0] is None:
            return x
        heads = x.reshape(-1, len(norm[0]))
        return call("rms_norm", [heads, *norm],
                    [(heads.shape, "float32"), (heads.shape[:1], "float32")])[0].reshape(x.shape)

    def products_of(self, x, slots, layer, *names):
        if any(isinstance(layer[name], Product) for name in names):
            return [self.chain(x, slots, layer[name]) for name in names]
        outs = [first_shape(layer[name][0])[0] for name in names]
        return call("multi_lora_linear", [x, slots] + [t for name in names for t in flat(layer[name])],
                    [(x.shape[:2] + (out,), "float32") for out in outs])

    def chain(self, x, slots, operands):
        """A linear by itself; of a product without adapters, the factors one by one."""
        if not isinstance(operands, Product):
            return self.products_of(x, slots, {"only": operands}, "only")[0]
        if operands.down is not None:
            return call("multi_lora_linear", [x, slots, *flat(operands)],
                        [(x.shape[:2] + first_shape(operands.outer)[:1], "float32")])[0]
        for factor, shift in ((operands.inner, None), (operands.core, None), (operands.outer, operands.bias)):
            if factor is not None:
                x, = self.products_of(x, slots, {"only": [factor, None, shift, None, None, None]}, "only")
        return x


def tables_for(lengths, blocks, random, width=None):
    """Block tables (rows, width) of blocks of their own, in any order, for rows of these lengths."""
    counts = [-(-n // BLOCK) for n in lengths]
    order = random.permutation(blocks)
    tables = np.full((len(counts), width or max([*counts, 1])), -1, np.int32)
    for row, count in enumerate(counts):
        at = sum(counts[:row])
        assert at + count <= blocks
        tables[row, :count] = order[at:at + count]
    return tables
