"""The stand-ins of Ascend's built-in operators against NumPy in float64, and the calls that they must refuse."""
import shutil

import numpy as np
import pytest

ms = pytest.importorskip("mindspore")
from mindspore import Parameter, Tensor, nn  # noqa: E402

from colora_ms.kernels import ascend_builtin as device  # noqa: E402
from colora_ms.kernels import bound  # noqa: E402

HALF = (ms.float16, ms.bfloat16)
#: What a result may be off, relative: a half type's unit in the last place; float32 sums in another order.
STEP = {ms.float16: 2.0**-10, ms.bfloat16: 2.0**-7, ms.float32: 2.0**-17}


@pytest.fixture(scope="module", autouse=True)
def loaded():
    if not (shutil.which("g++") or shutil.which("clang++")):
        pytest.skip("no C++ compiler: install g++ to build the rehearsal's stand-ins")
    ms.set_context(mode=ms.GRAPH_MODE)
    device.load()
    ms.set_context(jit_config={"jit_level": "O0", "infer_boost": "on"})
    yield
    ms.set_context(jit_config={"jit_level": "O0", "infer_boost": "off"})


@pytest.fixture
def random():
    return np.random.default_rng(7)


def tensor(array, dtype):
    return Tensor(np.asarray(array, np.float32)).astype(dtype)


def back(value):
    """A tensor's numbers in float64."""
    return value.astype(ms.float32).asnumpy().astype(np.float64)


def close(value, wanted, dtype, slack=1.0):
    """Equal up to the rounding of one half number (and what float32 sums lose)."""
    got = back(value)
    assert np.all(np.isfinite(got))
    allowed = slack * STEP[dtype] * (np.abs(wanted) + np.max(np.abs(wanted)) * 2.0**-6)
    assert np.all(np.abs(got - wanted) <= allowed), np.max(np.abs(got - wanted) - allowed)


class RmsNorm(nn.Cell):
    def construct(self, x, gamma):
        return device.rms_norm(x, gamma, 1e-5)


class AddRmsNorm(nn.Cell):
    def construct(self, x1, x2, gamma):
        return device.add_rms_norm(x1, x2, gamma, 1e-5)


class Rotary(nn.Cell):
    def construct(self, query, key, cos, sin, lengths):
        return device.rotary(query, key, cos, sin, lengths)


class Write(nn.Cell):
    def __init__(self, key_cache, value_cache):
        super().__init__()
        self.key_cache, self.value_cache = Parameter(key_cache, name="k"), Parameter(value_cache, name="v")

    def construct(self, key, value, slots):
        return device.reshape_and_cache(key, value, self.key_cache, self.value_cache, slots)


class Swiglu(nn.Cell):
    def construct(self, x):
        return device.swiglu(x)


class Linear(nn.Cell):
    def construct(self, x, weight):
        return device.linear(x, weight)


class Chosen(nn.Cell):
    def construct(self, mask, x, other, matrix):
        chosen = device.where(mask, x, other)
        return chosen, device.product(chosen, matrix)


class Embedding(nn.Cell):
    def construct(self, table, tokens):
        return device.embedding(table, tokens)


class Add(nn.Cell):
    def construct(self, a, b):
        return device.add(a, b)


class Cut(nn.Cell):
    def construct(self, x):
        first, second, third = device.split(x, (32, 16, 48))
        left, right = device.split(second, (4, 12))
        return device.reshape(first, (1, -1, 32)), left, right, device.reshape(third, (-1,))


class Grouped(nn.Cell):
    def __init__(self, counts=False):
        super().__init__()
        self.counts = counts

    def construct(self, x, weight, groups):
        return device.grouped_linear(x, weight, groups, self.counts)


class Quantized(nn.Cell):
    def __init__(self, group=0):
        super().__init__()
        self.group = group

    def construct(self, x, weight, scale):
        return device.quantized_linear(x, weight, scale, self.group)


class Decode(nn.Cell):
    """One query token a row; its arguments bear the names that the operator looks for."""

    def __init__(self, heads=4, kv_heads=2, scale=0.125):
        super().__init__()
        self.heads, self.kv_heads, self.scale = heads, kv_heads, scale

    def construct(self, query, key_cache, value_cache, tables, batch_valid_length):
        return device.paged_attention(query, key_cache, value_cache, tables, batch_valid_length, None, None, self.heads,
                                      self.scale, self.kv_heads)


class Nameless(Decode):
    def construct(self, query, key_cache, value_cache, tables, lengths):
        return device.paged_attention(query, key_cache, value_cache, tables, lengths, None, None, self.heads,
                                      self.scale, self.kv_heads)


class Chunks(Decode):
    def construct(self, query, key_cache, value_cache, tables, batch_valid_length, q_seq_lens, mask):
        return device.paged_attention(query, key_cache, value_cache, tables, batch_valid_length, q_seq_lens, mask,
                                      self.heads, self.scale, self.kv_heads)


class Prompt(nn.Cell):
    def construct(self, query, key, value, mask, batch_valid_length, q_seq_lens):
        return device.flash_attention(query, key, value, mask, 4, 0.125)


class WriteThenRead(nn.Cell):
    """The write is seen by what follows it in the graph, without a word of the caller."""

    def __init__(self, key_cache, value_cache):
        super().__init__()
        self.key_cache, self.value_cache = Parameter(key_cache, name="k"), Parameter(value_cache, name="v")

    def construct(self, query, key, value, slots, tables, batch_valid_length):
        device.reshape_and_cache(key, value, self.key_cache, self.value_cache, slots)
        return device.paged_attention(query, self.key_cache, self.value_cache, tables, batch_valid_length, None, None,
                                      4, 0.125, 2)


# -- values -----------------------------------------------------------------------------------------------------------

def normed(x, gamma):
    return x / np.sqrt(np.mean(x * x, -1, keepdims=True) + 1e-5) * gamma


@pytest.mark.parametrize("dtype", (*HALF, ms.float32))
def test_what_looks_at_one_token(random, dtype):
    x, other = tensor(random.normal(size=(5, 96)), dtype), tensor(random.normal(size=(5, 96)), dtype)
    gamma = tensor(random.normal(size=96), dtype)
    close(RmsNorm()(x, gamma), normed(back(x), back(gamma)), dtype)
    close(RmsNorm()(x, gamma.astype(ms.float32)), normed(back(x), back(gamma)), dtype)
    y, total = AddRmsNorm()(x, other, gamma)
    close(total, back(x) + back(other), dtype)
    close(y, normed(back(x) + back(other), back(gamma)), dtype)
    close(Add()(x, other), back(x) + back(other), dtype)
    gate, up = np.split(back(x), 2, -1)
    close(Swiglu()(x), gate / (1 + np.exp(-gate)) * up, dtype)
    weight = tensor(random.normal(size=(70, 96)), dtype)
    close(Linear()(x, weight), back(x) @ back(weight).T, dtype, 2)
    mask, holes = random.random((5, 96)) < 0.5, back(x)
    holes[~mask] = np.nan  # what is not chosen does not count
    matrix = tensor(random.normal(size=(96, 70)), dtype)
    chosen, made = Chosen()(Tensor(mask), tensor(holes, dtype), tensor([0], dtype), matrix)
    np.testing.assert_array_equal(back(chosen), np.where(mask, back(x), 0))
    close(made, np.where(mask, back(x), 0) @ back(matrix), dtype, 2)
    shaped, left, right, flat = Cut()(x)
    assert shaped.shape == (1, 5, 32)
    np.testing.assert_array_equal(np.concatenate([back(shaped)[0], back(left), back(right), back(flat).reshape(5, 48)],
                                                 1), back(x))
    tokens = Tensor(np.array([[4, 0], [69, 4]], np.int32))
    np.testing.assert_array_equal(back(Embedding()(weight, tokens)), back(weight)[tokens.asnumpy()])


def rotated(x, cos, sin, dim):
    heads = x.reshape(len(x), -1, dim)
    first, second = np.split(heads, 2, -1)
    turned = heads * cos[:, None] + np.concatenate((-second, first), -1) * sin[:, None]
    return turned.reshape(x.shape)


@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.parametrize("dtype", HALF)
def test_rotary(random, dtype, dim):
    query, key = (tensor(random.normal(size=(6, n * dim)), dtype) for n in (4, 2))
    angle = np.tile(random.uniform(0, 6, (6, dim // 2)), 2)
    cos, sin = tensor(np.cos(angle), dtype), tensor(np.sin(angle), dtype)
    turned = Rotary()(query, key, cos, sin, Tensor(np.array([3, 3], np.int32)))
    for got, given in zip(turned, (query, key)):
        close(got, rotated(back(given), back(cos), back(sin), dim), dtype)


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("shape", [(1, 3, 128), (3, 1, 128)])
def test_the_cache_is_written_in_place_and_minus_one_writes_nothing(random, dtype, shape):
    before = [random.normal(size=(4, 16, 2, 64)) for _ in range(2)]
    cell = Write(*[tensor(one, dtype) for one in before])
    before = [back(one) for one in (cell.key_cache, cell.value_cache)]
    new = [tensor(random.normal(size=shape), dtype) for _ in range(2)]
    cell(*new, Tensor(np.array([17, -1, 40], np.int32)))
    for cache, was, given in zip((cell.key_cache, cell.value_cache), before, new):
        wanted = was.reshape(64, 128).copy()
        wanted[[17, 40]] = back(given).reshape(3, 128)[[0, 2]]
        np.testing.assert_array_equal(back(cache).reshape(64, 128), wanted)


def attended(query, keys, values, scale):
    """(queries, heads, dim) over (positions, kv_heads, dim); the last query sees all positions."""
    queries, heads, _ = query.shape
    out = np.empty(query.shape)
    for t in range(queries):
        seen = len(keys) - queries + t + 1
        for h in range(heads):
            g = h // (heads // keys.shape[1])
            score = keys[:seen, g] @ query[t, h] * scale
            score = np.exp(score - score.max())
            out[t, h] = score / score.sum() @ values[:seen, g]
    return out


def paged(random, dtype, block, dim, lengths, queries, kv_heads=2):
    """(query, key_cache, value_cache, tables, lengths) with shuffled blocks and places of NaN nobody may read."""
    rows, wide = len(lengths), -(-max(lengths) // block)
    caches = [random.normal(size=(rows * wide + 1, block, kv_heads, dim)) for _ in range(2)]
    tables = random.permutation(rows * wide + 1)[:rows * wide].reshape(rows, wide).astype(np.int32)
    for cache in caches:
        for row, length in enumerate(lengths):
            flat = np.full((wide * block,), np.nan)
            flat[:length] = 0
            cache[tables[row]] += flat.reshape(wide, block, 1, 1)
    query = random.normal(size=(sum(queries), 2 * kv_heads * dim))
    return (tensor(query, dtype), *[tensor(cache, dtype) for cache in caches], Tensor(tables),
            Tensor(np.array(lengths, np.int32)))


def paged_result(query, key_cache, value_cache, tables, lengths, queries, scale=0.125):
    _, _, kv_heads, dim = key_cache.shape
    keys, values, given = back(key_cache), back(value_cache), back(query).reshape(-1, 2 * kv_heads, dim)
    out, at = [], 0
    for row, (length, count) in enumerate(zip(lengths.asnumpy(), queries)):
        past = [cache[tables.asnumpy()[row]].reshape(-1, kv_heads, dim)[:length] for cache in (keys, values)]
        out.append(attended(given[at:at + count], *past, scale))
        at += count
    return np.concatenate(out).reshape(query.shape)


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("block, dim", [(16, 64), (128, 128), (32, 256)])
def test_paged_attention_of_one_token_a_row(random, dtype, block, dim):
    case = paged(random, dtype, block, dim, [1, 40, 17], [1, 1, 1])
    close(Decode()(*case), paged_result(*case, [1, 1, 1]), dtype)


def chunk_mask(lengths, queries, width, dtype):
    """(tokens, width): 0 up to a token's own position, -10000 behind it."""
    rows = [np.where(np.arange(width) <= length - count + t, 0, -10000.0)
            for length, count in zip(lengths, queries) for t in range(count)]
    return tensor(np.stack(rows), dtype)


@pytest.mark.parametrize("dtype", HALF)
def test_paged_attention_of_chunks(random, dtype):
    lengths, queries = [5, 30, 18], [3, 1, 7]
    case = paged(random, dtype, 16, 64, lengths, queries)
    got = Chunks()(*case, Tensor(np.array(queries, np.int32)), chunk_mask(lengths, queries, 32, dtype))
    close(got, paged_result(*case, queries), dtype)


@pytest.mark.parametrize("dtype", HALF)
def test_flash_attention_of_prompts(random, dtype):
    lengths = np.array([5, 1, 9], np.int32)
    query, key, value = (tensor(random.normal(size=(15, n * 64)), dtype) for n in (4, 2, 2))
    got = Prompt()(query, key, value, device.prompt_mask(dtype), Tensor(lengths), Tensor(lengths))
    wanted, at = [], 0
    for length in lengths:
        part = [back(one)[at:at + length].reshape(length, -1, 64) for one in (query, key, value)]
        wanted.append(attended(*part, 0.125))
        at += length
    close(got, np.concatenate(wanted).reshape(15, -1), dtype)


def test_a_write_is_seen_by_the_attention_behind_it(random):
    cache = tensor(np.zeros((3, 16, 2, 64)), ms.float16)
    cell = WriteThenRead(cache, cache.copy())
    key, value = (tensor(random.normal(size=(1, 1, 128)), ms.float16) for _ in range(2))
    query = tensor(random.normal(size=(1, 256)), ms.float16)
    for step in range(2):  # the second token sees the first one, written by the graph before
        got = cell(query, key, value, Tensor(np.array([32 + step], np.int32)), Tensor(np.array([[2]], np.int32)),
                   Tensor(np.array([step + 1], np.int32)))
        np.testing.assert_array_equal(back(got).reshape(4, 64)[::2], back(value).reshape(2, 64))


@pytest.mark.parametrize("dtype", HALF)
def test_a_grouped_product_leaves_rows_behind_the_groups_unwritten(random, dtype):
    x, weight = tensor(random.normal(size=(8, 48)), dtype), tensor(random.normal(size=(3, 48, 20)), dtype)
    for cell, groups in ((Grouped(), [2, 2, 6]), (Grouped(True), [2, 0, 4])):
        got = cell(x, weight, Tensor(np.array(groups, np.int64)))
        wanted = np.concatenate([back(x)[:2] @ back(weight)[0], back(x)[2:6] @ back(weight)[2]])
        close(got[:6], wanted, dtype, 2)
        assert np.all(np.isnan(back(got)[6:]))


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("group", [0, 32])
def test_a_product_with_whole_numbers(random, dtype, group):
    x, weight = tensor(random.normal(size=(5, 96)), dtype), random.integers(-128, 128, (24, 96)).astype(np.int8)
    scale = tensor(random.uniform(0.01, 0.02, (3, 24) if group else (24,)), dtype)
    spread = np.repeat(back(scale), 32, 0) if group else back(scale)
    wanted = back(x) @ (weight.astype(np.float64) * spread.T.reshape(24, -1)).T
    close(Quantized(group)(x, Tensor(weight), scale), wanted, dtype, 2)
    small = weight >> 4  # -8..7, two to a byte
    packed = (small[:, ::2] & 15 | small[:, 1::2] << 4).astype(np.int8)
    wanted = back(x) @ (small.astype(np.float64) * spread.T.reshape(24, -1)).T
    close(Quantized(group)(x, Tensor(packed, dtype=ms.qint4x2), scale), wanted, dtype, 2)


class Causal(nn.Cell):
    def construct(self, query, key, value, mask):
        return device.causal(query, key, value, mask, 4, 0.25)


class Weighted(nn.Cell):
    """A scalar of the attention's result, whose gradients hang on all of it."""

    def __init__(self, weights):
        super().__init__()
        self.attend, self.weights = Causal(), weights

    def construct(self, query, key, value, mask):
        return (self.attend(query, key, value, mask).astype(ms.float32) * self.weights).sum()


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("dtype", HALF)
def test_attention_for_training_and_its_gradients(random, dtype, packed):
    """A row of nine tokens, or sequences of four and five in it."""
    query, key, value = (tensor(random.normal(size=(2, 9, n * 16)), dtype) for n in (4, 2, 2))
    weights = random.normal(size=(2, 9, 64)).astype(np.float32)

    cuts = [0, 4, 9] if packed else [0, 9]
    segment = np.searchsorted(cuts, np.arange(9), side="right")
    hidden = ~((segment[:, None] == segment) & np.tri(9, dtype=bool))
    mask = Tensor(np.stack([hidden[None]] * 2).astype(np.uint8)) if packed else bound.builtin_causal_mask

    def attend(q, k, v):
        return np.stack([np.concatenate([attended(*(one[r, a:b].reshape(b - a, -1, 16) for one in (q, k, v)), 0.25)
                                         for a, b in zip(cuts, cuts[1:])]) for r in range(2)]).reshape(2, 9, 64)

    given = [back(one) for one in (query, key, value)]
    close(Causal()(query, key, value, mask), attend(*given), dtype)
    loss = Weighted(Tensor(weights))
    gradients = ms.grad(loss, grad_position=(0, 1, 2))(query, key, value, mask)
    rounded = back(tensor(weights, dtype))
    for place, gradient in enumerate(gradients):
        for _ in range(4):  # against differences of the float64 form, at a few places
            at = tuple(random.integers(0, n) for n in given[place].shape)
            moved = [[one.copy() for one in given] for _ in range(2)]
            moved[0][place][at] += 1e-5
            moved[1][place][at] -= 1e-5
            slope = ((attend(*moved[0]) - attend(*moved[1])) * rounded).sum() / 2e-5
            assert abs(back(gradient)[at] - slope) < 12 * STEP[dtype] * (1 + abs(slope))
