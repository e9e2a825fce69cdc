"""Step 9, in a process of its own: CANN's operators as our graphs call them (colora_ms.kernels.ascend_builtin),
against NumPy in float64. Without a device the rehearsal's strict stand-ins answer."""
import argparse

import child
import numpy as np

import mindspore as ms
from mindspore import Parameter, Tensor, nn, ops

from colora_ms.kernels import ascend_builtin as device

STEP = {ms.float16: 2.0 ** -10, ms.bfloat16: 2.0 ** -7}


def tensor(values, dtype):
    return Tensor(np.asarray(values, np.float32)).astype(dtype)


def back(value):
    return value.astype(ms.float32).asnumpy().astype(np.float64)


def differs(got, want, dtype, slack=2.0):
    """None, or a sentence; products of half types are rounded once, sums may go in any order."""
    got = back(got)
    if not np.isfinite(got).all():
        return f"{int((~np.isfinite(got)).sum())} values are not finite"
    allowed = slack * STEP[dtype] * (np.abs(want) + np.abs(want).max() * 2.0 ** -4)
    over = np.abs(got - want) > allowed
    return f"{int(over.sum())} of {over.size} differ by up to {np.abs(got - want).max():.3g}" if over.any() else None


class Norm(nn.Cell):
    def construct(self, x, gamma):
        return device.rms_norm(x, gamma, 1e-5)


class AddNorm(nn.Cell):
    def construct(self, x1, x2, gamma):
        return device.add_rms_norm(x1, x2, gamma, 1e-5)


class Rotary(nn.Cell):
    def construct(self, query, key, cos, sin, batch_valid_length):
        return device.rotary(query, key, cos, sin, batch_valid_length)


class Swiglu(nn.Cell):
    def construct(self, x):
        return device.swiglu(x)


class Linear(nn.Cell):
    def construct(self, x, weight):
        return device.linear(x, weight)


class Grouped(nn.Cell):
    def construct(self, x, weight, groups):
        return device.grouped_linear(x, weight, groups)


class Chosen(nn.Cell):
    """The masked form of a prompt's pairs: whose column it is, Select, and a product that is not transposed."""

    def construct(self, slots, owner, x, zero, matrix):
        mask = ops.equal(ops.expand_dims(slots, 1), owner)
        return device.product(device.where(mask, x, zero), matrix)


class Quantized(nn.Cell):
    def __init__(self, group):
        super().__init__()
        self.group = group

    def construct(self, x, weight, scale):
        return device.quantized_linear(x, weight, scale, self.group)


class Routed(nn.Cell):
    """Router logits to shares, tokens by expert, and back with nothing between, as a layer of experts calls them."""

    def __init__(self, experts, count):
        super().__init__()
        self.experts, self.count = experts, count

    def construct(self, logits, x):
        logits = ops.nan_to_num(logits, 0.0, 1e30, -1e30)
        shares, chosen = device.top_experts(logits, self.count)
        rows, places, sizes = device.by_expert(x, chosen, self.experts)
        return shares, chosen, rows, sizes, device.from_experts(rows, places, shares.astype(x.dtype))


class Scaled(nn.Cell):
    def construct(self, x, factors):
        return device.scaled_rows(x, factors)


class Append(nn.Cell):
    def __init__(self, key_cache, value_cache):
        super().__init__()
        self.key_cache, self.value_cache = Parameter(key_cache, name="k"), Parameter(value_cache, name="v")

    def construct(self, key, value, slots):
        return device.reshape_and_cache(key, value, self.key_cache, self.value_cache, slots)


class Decode(nn.Cell):
    """The lengths must bear this name: PagedAttention finds them among the graph's inputs by it."""

    def construct(self, query, key_cache, value_cache, tables, batch_valid_length):
        return device.paged_attention(query, key_cache, value_cache, tables, batch_valid_length, None, None, 4, 0.125,
                                      2)


class Prompt(nn.Cell):
    def construct(self, query, key, value, mask, batch_valid_length, q_seq_lens):
        return device.flash_attention(query, key, value, mask, 4, 0.125)


def attended(query, keys, values, scale=0.125):
    """(queries, heads, dim) over (positions, kv_heads, dim); the last query sees all positions."""
    out, group = np.empty(query.shape), query.shape[1] // keys.shape[1]
    for t in range(len(query)):
        seen = len(keys) - len(query) + t + 1
        for h in range(query.shape[1]):
            score = keys[:seen, h // group] @ query[t, h] * scale
            score = np.exp(score - score.max())
            out[t, h] = score / score.sum() @ values[:seen, h // group]
    return out


def check_norms(rng, dtype):
    x, y = tensor(rng.normal(size=(5, 96)), dtype), tensor(rng.normal(size=(5, 96)), dtype)
    gamma = tensor(rng.normal(size=96), dtype)

    def normed(values):
        return values / np.sqrt((values ** 2).mean(-1, keepdims=True) + 1e-5) * back(gamma)

    with child.reported(f"RmsNorm {dtype}") as line:
        line["wrong"] = differs(Norm()(x, gamma), normed(back(x)), dtype)
    with child.reported(f"AddRmsNorm {dtype}") as line:
        normal, total = AddNorm()(x, y, gamma)
        line["wrong"] = differs(total, back(x) + back(y), dtype) or differs(normal, normed(back(x) + back(y)), dtype)
    with child.reported(f"Swiglu {dtype}") as line:
        gate, up = np.split(back(x), 2, -1)
        line["wrong"] = differs(Swiglu()(x), gate / (1 + np.exp(-gate)) * up, dtype)


def check_rotary(rng, dtype, dim):
    query, key = (tensor(rng.normal(size=(6, n * dim)), dtype) for n in (4, 2))
    angle = np.tile(rng.uniform(0, 6, (6, dim // 2)), 2)
    cos, sin = tensor(np.cos(angle), dtype), tensor(np.sin(angle), dtype)
    with child.reported(f"ApplyRotaryPosEmb {dim} {dtype}") as line:
        turned = Rotary()(query, key, cos, sin, Tensor(np.array([3, 3], np.int32)))
        for got, given in zip(turned, (query, key)):
            heads = back(given).reshape(6, -1, dim)
            first, second = np.split(heads, 2, -1)
            want = heads * back(cos)[:, None] + np.concatenate((-second, first), -1) * back(sin)[:, None]
            line["wrong"] = line["wrong"] or differs(got, want.reshape(given.shape), dtype)


def check_cache(rng, dtype):
    cell = Append(*[tensor(rng.normal(size=(4, 16, 2, 64)), dtype) for _ in range(2)])
    before = [back(one).reshape(64, 128) for one in (cell.key_cache, cell.value_cache)]
    new = [tensor(rng.normal(size=(1, 3, 128)), dtype) for _ in range(2)]
    with child.reported(f"ReshapeAndCache, -1, three tokens {dtype}") as line:
        cell(*new, Tensor(np.array([17, -1, 40], np.int32)))
        for cache, was, given in zip((cell.key_cache, cell.value_cache), before, new):
            was[[17, 40]] = back(given).reshape(3, 128)[[0, 2]]
            if not np.array_equal(back(cache).reshape(64, 128), was):
                line["wrong"] = "the cache does not hold what was written, or more was written"


def check_paged(rng, dtype, block, dim):
    lengths, wide = [1, 40, 17], -(-40 // block)
    caches = [rng.normal(size=(3 * wide + 1, block, 2, dim)) for _ in range(2)]
    tables = rng.permutation(3 * wide + 1)[:3 * wide].reshape(3, wide).astype(np.int32)
    for cache in caches:  # behind a row's length: numbers that show at once
        for row, length in enumerate(lengths):
            places = np.where(np.arange(wide * block) < length, 1.0, 1e4).reshape(wide, block, 1, 1)
            cache[tables[row]] *= places
    query = tensor(rng.normal(size=(3, 4 * dim)), dtype)
    keys, values = (tensor(cache, dtype) for cache in caches)
    with child.reported(f"PagedAttention, block {block}, head {dim} {dtype}") as line:
        got = Decode()(query, keys, values, Tensor(tables), Tensor(np.array(lengths, np.int32)))
        want = [attended(back(query)[row:row + 1].reshape(1, 4, dim),
                         *[back(one)[tables[row]].reshape(-1, 2, dim)[:length] for one in (keys, values)])
                for row, length in enumerate(lengths)]
        line["wrong"] = differs(got, np.concatenate(want).reshape(3, -1), dtype)


def check_prompt(rng, dtype):
    lengths = np.array([5, 1, 9], np.int32)
    query, key, value = (tensor(rng.normal(size=(15, n * 64)), dtype) for n in (4, 2, 2))
    mask, given = device.prompt_mask(dtype), (Tensor(lengths), Tensor(lengths))
    with child.reported(f"FlashAttentionScore TH {dtype}") as line:
        got = Prompt()(query, key, value, mask, *given)
        want, at = [], 0
        for length in lengths:
            want.append(attended(*[back(one)[at:at + length].reshape(length, -1, 64) for one in (query, key, value)]))
            at += length
        line["wrong"] = differs(got, np.concatenate(want).reshape(15, -1), dtype)
    with child.reported(f"FlashAttentionScore, a future token changes nothing {dtype}") as line:
        changed = back(key)
        changed[14] += 5  # the last token of the last row
        other = Prompt()(query, tensor(changed, dtype), value, mask, *given)
        if not np.array_equal(back(got)[:14], back(other)[:14]):
            line["wrong"] = "an earlier token sees it: the mask's values are not those of this dtype"


def check_products(rng, dtype):
    x, weight = tensor(rng.normal(size=(5, 96)), dtype), tensor(rng.normal(size=(70, 96)), dtype)
    with child.reported(f"MatMul transpose_b {dtype}") as line:
        line["wrong"] = differs(Linear()(x, weight), back(x) @ back(weight).T, dtype)
    banks = rng.normal(size=(4, 96, 16))
    banks[0] = 0  # slot 0 is the base rows' zero adapter
    x, banks = tensor(rng.normal(size=(8, 96)), dtype), tensor(banks, dtype)
    with child.reported(f"GroupedMatmulV4, zero adapter, an empty group {dtype}") as line:
        got = Grouped()(x, banks, Tensor(np.array([2, 5, 5, 8], np.int64)))
        parts = [back(x)[a:b] @ back(banks)[g] for g, a, b in ((0, 0, 2), (1, 2, 5), (3, 5, 8))]
        line["wrong"] = differs(got, np.concatenate(parts), dtype)
    slots, owner = np.array([-1, 0, 1, 2, 2, -1, 0, 1], np.int32), np.repeat(np.arange(3, dtype=np.int32), 16)[None]
    inner, matrix = rng.normal(size=(8, 48)), tensor(rng.normal(size=(48, 96)), dtype)
    inner[slots[:, None] != owner] = np.inf  # what is not chosen must not count
    with child.reported(f"Equal, Select, MatMul {dtype}") as line:
        got = Chosen()(Tensor(slots), Tensor(owner), tensor(inner, dtype), tensor([0], dtype), matrix)
        chosen = np.where(slots[:, None] == owner, back(tensor(inner, dtype)), 0)
        line["wrong"] = differs(got, chosen @ back(matrix), dtype)
    numbers = rng.integers(-128, 128, (64, 96)).astype(np.int8)
    for group in (0, 32):
        scale = tensor(rng.uniform(0.01, 0.02, (3, 64) if group else (64,)), dtype)
        spread = np.repeat(back(scale), 32, 0) if group else back(scale)[None]
        with child.reported(f"WeightQuantBatchMatmul int8, group {group} {dtype}") as line:
            want = back(x) @ (numbers.astype(np.float64) * spread.T).T
            line["wrong"] = differs(Quantized(group)(x, Tensor(numbers), scale), want, dtype, 4)


def check_experts(rng, dtype):
    logits, x = rng.normal(size=(6, 5)) * 3, tensor(rng.normal(size=(6, 96)), dtype)
    logits[:, 3] = -20  # nobody's expert
    chances = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    order = np.argsort(-chances, -1)[:, :2]
    with child.reported(f"MoeGatingTopKSoftmax, MoeInitRoutingV2, MoeTokenUnpermute {dtype}") as line:
        shares, chosen, rows, sizes, again = Routed(5, 2)(tensor(logits, ms.float32), x)
        want = np.take_along_axis(chances, order, 1)
        if not np.array_equal(chosen.asnumpy(), order):
            line["wrong"] = "other experts were chosen"
        elif not np.array_equal(back(rows), back(x)[np.argsort(order.reshape(-1), kind="stable") // 2]):
            line["wrong"] = "an expert's tokens do not stand beside each other, in their order"
        elif sizes.asnumpy().tolist() != np.bincount(order.reshape(-1), minlength=5).tolist():
            line["wrong"] = f"the experts' tokens are counted as {sizes.asnumpy().tolist()}"
        else:
            line["wrong"] = (differs(shares, want, ms.float16)
                             or differs(again, back(x) * want.sum(1, keepdims=True), dtype, 4))
    with child.reported(f"MoeGatingTopKSoftmax, MoeInitRoutingV2, a spoiled row {dtype}") as line:
        logits[2] = np.nan
        other = Routed(5, 2)(tensor(logits, ms.float32), x)[4]
        kept = np.arange(6) != 2
        if not np.array_equal(back(other)[kept], back(again)[kept]):
            line["wrong"] = "router logits that are no numbers change other rows"
    with child.reported(f"Mul of rows {dtype}") as line:
        factors = tensor(rng.normal(size=(6, 1)), dtype)
        line["wrong"] = differs(Scaled()(x, factors), back(x) * back(factors), dtype)


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--target", default="Ascend")
    parser.add_argument("--quick", action="store_true", help="one dtype")
    options = parser.parse_args()
    from colora_ms.kernels import bind

    ms.set_context(mode=ms.GRAPH_MODE)
    ms.set_device(options.target)
    ms.set_context(jit_config={"jit_level": "O0", "infer_boost": "on"})
    bind() if options.target == "Ascend" else device.load()
    rng = np.random.default_rng(7)
    for dtype in list(STEP)[-1:] if options.quick else STEP:
        check_norms(rng, dtype)
        check_cache(rng, dtype)
        for dim in (64, 128):
            check_rotary(rng, dtype, dim)
        for block, dim in ((16, 64), (128, 64), (16, 128), (128, 128)):
            check_paged(rng, dtype, block, dim)
        check_prompt(rng, dtype)
        check_products(rng, dtype)
        check_experts(rng, dtype)


if __name__ == "__main__":
    main()
