"""cached_attention and causal_attention: the C operators against NumPy float64, the faces in graph mode."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import mindspore as ms
from mindspore import Parameter, Tensor, nn, ops

from call import Refused, call, from_bf16, set_threads, to_bf16
from colora_ms.kernels import attention, backend
from colora_ms.kernels.aot import KernelError

ms.set_context(mode=ms.GRAPH_MODE)


def tables(max_len, dim):
    frequencies = 1 / 10000.0 ** (np.arange(0, dim, 2) / dim)
    angles = np.arange(max_len)[:, None] * frequencies
    return np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32)


def rotate(x, cos, sin):
    half = x.shape[-1] // 2
    a, b = x[..., :half], x[..., half:]
    return np.concatenate([a * cos - b * sin, b * cos + a * sin], -1)


def attend(query, keys, values):
    """One query (dim,) over keys and values (positions, dim), float64 -> (output, log-sum-exp)."""
    scores = keys @ query / np.sqrt(len(query))
    top = scores.max()
    weights = np.exp(scores - top)
    return weights @ values / weights.sum(), top + np.log(weights.sum())


class Case:
    """Random arguments of cached_attention, as the operator takes them."""

    def __init__(self, rng, rows, tokens, kv_heads, group, dim, max_len, bf16=False, spare=1):
        self.rows, self.tokens, self.kv_heads, self.group, self.dim, self.max_len = (
            rows, tokens, kv_heads, group, dim, max_len)
        self.bf16 = bf16
        self.q = rng.normal(size=(rows, tokens, kv_heads * group * dim)).astype(np.float32)
        self.k, self.v = rng.normal(size=(2, rows, tokens, kv_heads * dim)).astype(np.float32)
        self.cos, self.sin = tables(max_len + 2, dim)
        total = rows + spare
        self.cache_rows = rng.permutation(total)[:rows].astype(np.int32)
        self.length = rng.integers(0, tokens + 1, size=rows).astype(np.int32)
        self.start = rng.integers(0, max_len - tokens + 1, size=rows).astype(np.int32)
        if rng.integers(2):  # one row that ends at the cache's last position
            self.length[0] = tokens
            self.start[0] = max_len - tokens
        shape = (total, kv_heads, max_len, dim)
        self.k_cache, self.v_cache = np.full((2, *shape), np.nan, np.float32)  # what is not written must not be read
        for row in range(rows):
            if self.length[row]:
                past = (self.cache_rows[row], slice(None), slice(0, self.start[row]))
                self.k_cache[past] = rng.normal(size=self.k_cache[past].shape)
                self.v_cache[past] = rng.normal(size=self.v_cache[past].shape)
        if bf16:
            self.k_cache, self.v_cache = from_bf16(to_bf16(self.k_cache)), from_bf16(to_bf16(self.v_cache))

    def rounded(self, x):
        return from_bf16(to_bf16(x)) if self.bf16 else x

    def inputs(self, rows=slice(None)):
        caches = [to_bf16(c) if self.bf16 else c.copy() for c in (self.k_cache, self.v_cache)]
        return [self.q[rows], self.k[rows], self.v[rows], self.cos, self.sin, *caches, self.cache_rows[rows],
                self.start[rows], self.length[rows]]

    def run(self, rows=slice(None)):
        inputs = self.inputs(rows)
        out, = call("cached_attention", inputs, [(inputs[0].shape, "float32")])
        return out, *[from_bf16(c) if self.bf16 else c for c in inputs[5:7]]

    def expected(self, k_cache, v_cache):
        """The output in float64, given the caches that the operator left (checked on their own)."""
        out = np.zeros(self.q.shape)
        heads = self.kv_heads * self.group
        q = self.q.reshape(self.rows, self.tokens, heads, self.dim).astype(np.float64)
        for row in range(self.rows):
            for t in range(self.length[row]):
                p = self.start[row] + t
                for h in range(heads):
                    cached = (self.cache_rows[row], h // self.group, slice(0, p + 1))
                    y, _ = attend(rotate(q[row, t, h], self.cos[p], self.sin[p]), k_cache[cached].astype(np.float64),
                                  v_cache[cached].astype(np.float64))
                    out[row, t, h * self.dim:(h + 1) * self.dim] = y
        return out

    def check(self):
        out, k_cache, v_cache = self.run()
        want_k, want_v = self.k_cache.copy(), self.v_cache.copy()
        for row in range(self.rows):
            for t in range(self.length[row]):
                p, c = self.start[row] + t, self.cache_rows[row]
                k = self.k[row, t].reshape(self.kv_heads, self.dim)
                want_k[c, :, p] = self.rounded(rotate(k, self.cos[p], self.sin[p]))
                want_v[c, :, p] = self.rounded(self.v[row, t].reshape(self.kv_heads, self.dim))
        assert np.array_equal(v_cache, want_v, equal_nan=True)
        np.testing.assert_allclose(k_cache, want_k, rtol=1e-2 if self.bf16 else 1e-5, atol=1e-2 if self.bf16 else 1e-6)
        np.testing.assert_allclose(out, self.expected(k_cache, v_cache), rtol=1e-4, atol=3e-6)


@settings(max_examples=40, deadline=None)
@given(rows=st.integers(1, 5), kv_heads=st.integers(1, 3), group=st.integers(1, 8),
       dim=st.sampled_from([8, 10, 16, 24, 64, 80, 128, 256]), max_len=st.sampled_from([1, 2, 17, 64, 300]),
       bf16=st.booleans(), seed=st.integers(0, 999))
def test_decoding_matches_float64(rows, kv_heads, group, dim, max_len, bf16, seed):
    Case(np.random.default_rng(seed), rows, 1, kv_heads, group, dim, max_len, bf16).check()


@settings(max_examples=20, deadline=None)
@given(rows=st.integers(1, 3), tokens=st.integers(2, 40), kv_heads=st.integers(1, 2), group=st.integers(1, 8),
       dim=st.sampled_from([2, 8, 18, 64]), more=st.sampled_from([0, 1, 70]), bf16=st.booleans(),
       seed=st.integers(0, 999))
def test_prefill_matches_float64(rows, tokens, kv_heads, group, dim, more, bf16, seed):
    Case(np.random.default_rng(seed), rows, tokens, kv_heads, group, dim, tokens + more, bf16).check()


def test_a_long_row_is_merged_from_chunks():
    case = Case(np.random.default_rng(5), 2, 1, 1, 3, 16, 1100)
    case.length[:] = 1
    case.start[:] = 1099, 767
    case.k_cache[:], case.v_cache[:] = np.random.default_rng(6).normal(size=(2, *case.k_cache.shape))
    case.check()


@pytest.mark.parametrize("tokens", [1, 9])
def test_no_active_row_writes_and_reads_nothing(tokens):
    case = Case(np.random.default_rng(0), 3, tokens, 2, 2, 16, 20)
    case.length[:] = 0
    case.start[:] = 10 ** 6  # not looked at
    case.cache_rows[:] = -5
    case.k_cache[:] = case.v_cache[:] = np.nan
    out, k_cache, v_cache = case.run()
    assert not out.any() and np.isnan(k_cache).all() and np.isnan(v_cache).all()


@pytest.mark.parametrize("tokens", [1, 70])
@pytest.mark.parametrize("bf16", [False, True])
def test_rows_do_not_depend_on_neighbours_nor_on_threads(tokens, bf16):
    case = Case(np.random.default_rng(4), 6, tokens, 3, 3, 64, 900, bf16)
    case.length[:] = tokens
    for row in range(6):
        case.start[row] = (900 - tokens) * row // 5
        past = (case.cache_rows[row], slice(None), slice(0, case.start[row]))
        for cache in (case.k_cache, case.v_cache):
            cache[past] = case.rounded(np.random.default_rng(row).normal(size=cache[past].shape).astype(np.float32))
    whole = case.run()[0]
    assert np.isfinite(whole).all()
    for row in range(6):
        assert np.array_equal(case.run(slice(row, row + 1))[0][0], whole[row])
    set_threads(1)
    alone = case.run()[0]
    set_threads(2)
    assert np.array_equal(alone, whole)


def test_chunks_of_a_prompt_give_what_the_whole_prompt_gives():
    case = Case(np.random.default_rng(8), 1, 50, 2, 2, 32, 64)
    case.length[:], case.start[:] = 50, 0
    whole = case.run()[0]
    inputs, parts = case.inputs(), []
    for begin, end in ((0, 13), (13, 14), (14, 50)):
        part = [x[:, begin:end] for x in inputs[:3]]
        numbers = [case.cache_rows, np.array([begin], np.int32), np.array([end - begin], np.int32)]
        parts += call("cached_attention", [*part, *inputs[3:7], *numbers], [(part[0].shape, "float32")])
    np.testing.assert_allclose(np.concatenate(parts, 1), whole, rtol=1e-4, atol=2e-6)


BAD = {
    "start past the cache": (8, np.array([20, 0], np.int32), ("start", "20", "row 0", "0 to 19")),
    "negative start": (8, np.array([0, -1], np.int32), ("start", "-1", "row 1")),
    "cache row too large": (7, np.array([0, 3], np.int32), ("cache_rows", "3", "row 1")),
    "negative cache row": (7, np.array([-1, 2], np.int32), ("cache_rows", "-1", "row 0")),
    "shared cache row": (7, np.array([1, 1], np.int32), ("cache_rows", "1", "row 0", "row 1")),
    "length too large": (9, np.array([1, 2], np.int32), ("length", "2", "row 1")),
    "negative length": (9, np.array([-1, 1], np.int32), ("length", "-1", "row 0")),
    "length of int64": (9, np.array([1, 1], np.int64), ("length", "int64")),
    "q of another width": (0, np.zeros((2, 1, 60), np.float32), ("q", "60")),
    "k of another width": (1, np.zeros((2, 1, 16), np.float32), ("k", "(2, 1, 16)", "32")),
    "v of another shape": (2, np.zeros((2, 2, 32), np.float32), ("v", "(2, 2, 32)")),
    "cos too short": (3, np.zeros((19, 8), np.float32), ("cos", "19", "20")),
    "sin unlike cos": (4, np.zeros((22, 7), np.float32), ("sin", "(22, 7)")),
    "v_cache of another dtype": (6, np.zeros((3, 2, 20, 16), np.int8), ("v_cache", "int8")),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_arguments_are_refused_before_writing(name):
    place, value, words = BAD[name]
    case = Case(np.random.default_rng(0), 2, 1, 2, 2, 16, 20)
    case.length[:] = 1
    inputs = case.inputs()
    before = inputs[5].copy()
    inputs[place] = value
    out = np.full((2, 1, 64), 7, np.float32)
    with pytest.raises(Refused) as error:
        call("cached_attention", inputs, [out])
    assert all(word in str(error.value) for word in ("cached_attention", *words)), str(error.value)
    assert (out == 7).all()
    assert np.array_equal(inputs[5], before, equal_nan=True)


# -- faces in graph mode ----------------------------------------------------------------------------------------------

class Loop(nn.Cell):
    """Decodes ``steps`` tokens in a while loop of the graph; the cache is written in place."""

    def __init__(self, function, case, dtype):
        super().__init__()
        self.function = function
        shape = (case.rows + 1, case.kv_heads, case.max_len, case.dim)
        self.k_cache = Parameter(Tensor(np.zeros(shape), dtype), name="k_cache")
        self.v_cache = Parameter(Tensor(np.zeros(shape), dtype), name="v_cache")
        self.cos, self.sin = Tensor(case.cos), Tensor(case.sin)
        self.cache_rows = Tensor(case.cache_rows)
        self.sums = Parameter(Tensor(np.zeros(case.q.shape, np.float32)), name="sums")

    def construct(self, q, k, v, start, length, steps):
        step = ops.zeros((), ms.int32)
        while step < steps:
            out = self.function(q, k, v, self.cos, self.sin, self.k_cache, self.v_cache, self.cache_rows, start, length)
            ops.assign_add(self.sums, out)
            q = q + 0.1 * out
            start = start + length
            step = step + 1
        return self.sums


@pytest.mark.parametrize("tokens", [1, 3])
@pytest.mark.parametrize("dtype", [ms.float32, ms.bfloat16])
def test_face_and_reference_agree_inside_a_while_loop(tokens, dtype):
    if not (backend() == "cpu") and dtype == ms.bfloat16:
        pytest.skip("the reference form keeps a float32 cache on a CPU")
    case = Case(np.random.default_rng(9), 3, tokens, 2, 3, 16, 20)
    case.start[:], case.length[:] = (0, 2, 0), (1, tokens, 0)
    results = []
    for function in (attention.cached_attention, attention.cached_attention_reference):
        # The framework cannot assign bfloat16 on a CPU, so the reference keeps float32.
        net = Loop(function, case, ms.float32 if function is attention.cached_attention_reference else dtype)
        arguments = [Tensor(x) for x in (case.q, case.k, case.v, case.start, case.length)]
        out = net(*arguments, Tensor(5, ms.int32)).asnumpy()
        results.append((out, *(ops.cast(cache, ms.float32).asnumpy() for cache in (net.k_cache, net.v_cache))))
    for got, want in zip(*results):
        np.testing.assert_allclose(got, want, rtol=1e-4, atol=2e-2 if dtype == ms.bfloat16 else 1e-5)
    out, k_cache, _ = results[0]
    assert out[0, 0].any() and not out[2].any()
    assert not k_cache[case.cache_rows[2]].any()
    assert (np.abs(k_cache[case.cache_rows[1]]).sum((0, 2)) > 0).tolist() == [2 <= p < 2 + 5 * tokens
                                                                             for p in range(20)]


def test_a_bad_position_is_a_python_exception_and_the_process_lives_on():
    if not (backend() == "cpu"):
        pytest.skip("needs the compiled CPU library")
    case = Case(np.random.default_rng(9), 1, 1, 1, 1, 8, 4)
    net = Loop(attention.cached_attention, case, ms.float32)
    arguments = [Tensor(x) for x in (case.q, case.k, case.v)]
    one = Tensor(np.ones(1, np.int32))
    with pytest.raises(RuntimeError, match="cached_attention"):
        net(*arguments, one * 3, one, Tensor(2, ms.int32))
    # The framework never runs a compiled graph again after an error in it; a new one works.
    assert Loop(attention.cached_attention, case, ms.float32)(*arguments, one * 0, one,
                                                              Tensor(2, ms.int32)).asnumpy().any()


def test_decoding_refuses_gradients():
    if not (backend() == "cpu"):
        pytest.skip("needs the compiled CPU library")
    case = Case(np.random.default_rng(9), 1, 1, 1, 1, 8, 4)
    numbers = [Tensor(x) for x in (case.cache_rows, case.start, case.length)]
    cache = [Parameter(Tensor(np.zeros((2, 1, 4, 8), np.float32)), name=name) for name in "kv"]
    rest = [Tensor(x) for x in (case.k, case.v, case.cos, case.sin)]

    @ms.jit
    def gradient(q):
        return ops.grad(lambda q: attention.cached_attention(q, *rest, *cache, *numbers).sum())(q)

    with pytest.raises(RuntimeError, match="cached_attention has no gradient"):
        gradient(Tensor(case.q))


def test_wrong_shapes_are_python_exceptions_at_compile_time():
    if not (backend() == "cpu"):
        pytest.skip("needs the compiled CPU library")
    case = Case(np.random.default_rng(9), 1, 1, 1, 1, 8, 4)
    case.q = case.q[..., :6]
    net = Loop(attention.cached_attention, case, ms.float32)
    arguments = [Tensor(x) for x in (case.q, case.k, case.v, case.start, case.length)]
    with pytest.raises(KernelError, match=r"cached_attention: q has shape \(1, 1, 6\)"):
        net(*arguments, Tensor(1, ms.int32))

# -- causal_attention -------------------------------------------------------------------------------------------------

def causal_inputs(rng, rows, tokens, kv_heads, group, dim):
    q = rng.normal(size=(rows, tokens, kv_heads * group * dim)).astype(np.float32)
    k, v = rng.normal(size=(2, rows, tokens, kv_heads * dim)).astype(np.float32)
    lengths = rng.integers(0, tokens + 1, size=rows).astype(np.int32)
    return [q, k, v, *tables(tokens + 3, dim), lengths]


def segments_of(lengths):
    """(row, part of it) of each sequence; lengths: (rows,) or (rows, segments)."""
    for row, parts in enumerate(np.reshape(lengths, (len(lengths), -1))):
        ends = np.cumsum(parts)
        yield from ((row, slice(end - n, end)) for n, end in zip(parts, ends) if n)


def causal_expected(q, k, v, cos, sin, lengths):
    """The output in the dtype of q, k, v (float64 for the tests)."""
    rows, tokens, _ = q.shape
    dim = 2 * cos.shape[1]
    heads, kv_heads = q.shape[2] // dim, k.shape[2] // dim
    q, k, v = (x.reshape(rows, tokens, -1, dim) for x in (q, k, v))
    out = np.zeros(q.shape)
    for row, part in segments_of(lengths):
        n = part.stop - part.start
        for h in range(heads):
            kv = h * kv_heads // heads
            scores = rotate(q[row, part, h], cos[:n], sin[:n]) @ rotate(k[row, part, kv], cos[:n], sin[:n]).T
            scores = np.where(np.tri(n, dtype=bool), scores / np.sqrt(dim), -np.inf)
            weights = np.exp(scores - scores.max(-1, keepdims=True, initial=-1e300))
            out[row, part, h] = weights @ v[row, part, kv] / weights.sum(-1, keepdims=True)
    return out.reshape(rows, tokens, heads * dim)


def run_causal(inputs):
    q, dim = inputs[0], 2 * inputs[3].shape[1]
    return call("causal_attention", inputs,
                [(q.shape, "float32"), ((q.shape[0], q.shape[2] // dim, q.shape[1]), "float32")])


def run_causal_gradients(inputs, dout):
    return call("causal_attention_grad", [*inputs, *run_causal(inputs), dout],
                [(x.shape, "float32") for x in inputs[:3]])


def check_causal_gradients(rng, inputs, dout):
    """The gradients of sum(dout * out) against central differences in float64, one direction at a time."""
    wide = [x.astype(np.float64) for x in inputs[:5]] + inputs[5:]
    for place, gradient in enumerate(run_causal_gradients(inputs, dout)):
        step = rng.normal(size=gradient.shape) * 1e-5
        ends = []
        for sign in (1, -1):
            moved = list(wide)
            moved[place] = wide[place] + sign * step
            ends.append((dout * causal_expected(*moved)).sum())
        size = np.abs(gradient * step).sum() + 1e-9  # float32 gradients, float64 differences
        assert abs((gradient * step).sum() - (ends[0] - ends[1]) / 2) < 2e-5 * size + 1e-9
        for row, parts in enumerate(inputs[5]):
            assert not gradient[row, np.sum(parts):].any()


CAUSAL = dict(rows=st.integers(1, 3), tokens=st.sampled_from([1, 2, 15, 64, 65, 130]), kv_heads=st.integers(1, 2),
              group=st.integers(1, 8), dim=st.sampled_from([2, 8, 18, 64]), seed=st.integers(0, 999))


@settings(max_examples=25, deadline=None)
@given(**CAUSAL)
def test_causal_attention_matches_float64(rows, tokens, kv_heads, group, dim, seed):
    inputs = causal_inputs(np.random.default_rng(seed), rows, tokens, kv_heads, group, dim)
    wide = [x.astype(np.float64) for x in inputs[:5]] + inputs[5:]
    np.testing.assert_allclose(run_causal(inputs)[0], causal_expected(*wide), rtol=1e-4, atol=3e-6)


@settings(max_examples=15, deadline=None)
@given(**CAUSAL)
def test_causal_gradients_match_finite_differences(rows, tokens, kv_heads, group, dim, seed):
    rng = np.random.default_rng(seed)
    inputs = causal_inputs(rng, rows, tokens, kv_heads, group, dim)
    check_causal_gradients(rng, inputs, rng.normal(size=inputs[0].shape).astype(np.float32))


def test_causal_rows_do_not_depend_on_neighbours_nor_on_threads():
    rng = np.random.default_rng(0)
    inputs = causal_inputs(rng, 4, 100, 3, 3, 32)
    inputs[5][:] = 100, 57, 0, 3
    dout = rng.normal(size=inputs[0].shape).astype(np.float32)

    def both(rows):
        part = [x[rows] for x in inputs[:3]] + inputs[3:5] + [inputs[5][rows]]
        return [run_causal(part)[0]] + run_causal_gradients(part, dout[rows])

    whole = both(slice(None))
    for row in range(4):
        assert all(np.array_equal(x[0], y[row]) for x, y in zip(both(slice(row, row + 1)), whole))
    set_threads(1)
    assert all(np.array_equal(x, y) for x, y in zip(both(slice(None)), whole))
    set_threads(2)


# Several sequences in a row: lengths (rows, segments). A row is cut at random places; zeros stand anywhere.
@st.composite
def cuts(draw):
    """(tokens, lengths (rows, segments) int32): empty rows, full rows, segments of one token, of any size."""
    tokens = draw(st.sampled_from([1, 2, 15, 64, 65, 150]))
    rows = []
    for _ in range(draw(st.integers(1, 3))):
        used = draw(st.sampled_from([0, tokens, draw(st.integers(0, tokens))]))
        sizes = draw(st.sampled_from([1, 5, 33, 150]))
        row = []
        while sum(row) < used:
            row.append(min(draw(st.integers(0, sizes)), used - sum(row)))
            if len(row) > 40:
                row.append(used - sum(row))
        rows.append(row)
    lengths = np.zeros((len(rows), max(1, max(map(len, rows)))), np.int32)
    for row, parts in zip(lengths, rows):
        row[:len(parts)] = parts
    return tokens, lengths


PACKED = dict(cut=cuts(), kv_heads=st.integers(1, 2), group=st.integers(1, 8), dim=st.sampled_from([2, 8, 18, 64]),
              seed=st.integers(0, 999))


def packed_inputs(rng, cut, kv_heads, group, dim):
    tokens, lengths = cut
    inputs = causal_inputs(rng, len(lengths), tokens, kv_heads, group, dim)[:3]
    # As few positions as the longest segment needs: less than the row.
    return [*inputs, *tables(max(1, int(lengths.max())), dim), lengths]


@settings(max_examples=40, deadline=None)
@given(**PACKED)
def test_packed_causal_attention_matches_float64(cut, kv_heads, group, dim, seed):
    inputs = packed_inputs(np.random.default_rng(seed), cut, kv_heads, group, dim)
    wide = [x.astype(np.float64) for x in inputs[:5]] + inputs[5:]
    np.testing.assert_allclose(run_causal(inputs)[0], causal_expected(*wide), rtol=1e-4, atol=3e-6)


@settings(max_examples=20, deadline=None)
@given(**PACKED)
def test_packed_causal_gradients_match_finite_differences(cut, kv_heads, group, dim, seed):
    rng = np.random.default_rng(seed)
    inputs = packed_inputs(rng, cut, kv_heads, group, dim)
    check_causal_gradients(rng, inputs, rng.normal(size=inputs[0].shape).astype(np.float32))


@settings(max_examples=25, deadline=None)
@given(threads=st.sampled_from([1, 2, 3]), **PACKED)
def test_a_segment_is_to_the_last_bit_what_it_is_alone(cut, kv_heads, group, dim, seed, threads):
    """Outputs and gradients, whatever stands beside it (NaN in the padding too), wherever it stands, for any
    threads."""
    rng = np.random.default_rng(seed)
    inputs = packed_inputs(rng, cut, kv_heads, group, dim)
    dout = rng.normal(size=inputs[0].shape).astype(np.float32)
    for row, parts in enumerate(inputs[5]):
        for x in (*inputs[:3], dout):
            x[row, parts.sum():] = np.nan
    set_threads(threads)
    whole = [run_causal(inputs)[0], *run_causal_gradients(inputs, dout)]
    set_threads(2)
    for row, part in segments_of(inputs[5]):
        n = part.stop - part.start
        alone = [np.ascontiguousarray(x[row:row + 1, part]) for x in (*inputs[:3], dout)]
        one = [*alone[:3], *inputs[3:5], np.array([n], np.int32)]
        for got, want in zip(whole, [run_causal(one)[0], *run_causal_gradients(one, alone[3])]):
            assert np.array_equal(got[row, part], want[0])
    for row, parts in enumerate(inputs[5]):
        assert not any(x[row, parts.sum():].any() for x in whole)


def test_one_segment_a_row_is_the_plain_form():
    rng = np.random.default_rng(1)
    inputs = causal_inputs(rng, 4, 70, 2, 3, 16)
    inputs[5][:] = 70, 0, 1, 33
    dout = rng.normal(size=inputs[0].shape).astype(np.float32)
    for lengths in (inputs[5][:, None], np.stack([inputs[5] * 0, inputs[5]], 1)):
        packed = [*inputs[:5], lengths]
        for got, want in zip(run_causal(packed) + run_causal_gradients(packed, dout),
                             run_causal(inputs) + run_causal_gradients(inputs, dout)):
            assert np.array_equal(got, want)
    nothing = [*inputs[:5], np.zeros((4, 0), np.int32)]
    assert not any(x.any() for x in run_causal(nothing) + run_causal_gradients(nothing, dout))


@pytest.mark.parametrize("place, value, words", [
    (5, np.array([[2, 2], [3, 2]], np.int32), ("lengths", "sums up to more than 4", "row 1")),
    (5, np.array([[2, 2], [2**31 - 1, 2**31 - 1]], np.int32), ("lengths", "2147483647", "row 1", "0 to 4")),
    (5, np.array([[2, -1], [1, 1]], np.int32), ("lengths", "-1", "row 0")),
    (5, np.array([[4, 0], [1, 1]], np.int32), ("cos", "3", "4", "segment in row 0")),
    (5, np.zeros((1, 2), np.int32), ("lengths", "(1, 2)", "2")),
    (5, np.zeros((2, 2, 1), np.int32), ("lengths", "(2, 2, 1)")),
    (5, np.zeros((2, 2), np.int64), ("lengths", "int64")),
])
def test_bad_segments_are_refused_before_writing(place, value, words):
    inputs = causal_inputs(np.random.default_rng(0), 2, 4, 2, 2, 16)
    inputs[3:5] = tables(3, 16)
    out, lse = np.full(inputs[0].shape, 7, np.float32), np.full((2, 4, 4), 7, np.float32)
    inputs[place] = value
    with pytest.raises(Refused) as error:
        call("causal_attention", inputs, [out, lse])
    assert all(word in str(error.value) for word in ("causal_attention", *words)), str(error.value)
    assert (out == 7).all() and (lse == 7).all()
    grads = [np.full(x.shape, 7, np.float32) for x in inputs[:3]]
    with pytest.raises(Refused):
        call("causal_attention_grad", [*inputs, out, lse, out], grads)
    assert all((x == 7).all() for x in grads)


@pytest.mark.parametrize("place, value, words", [
    (5, np.array([3, 5], np.int32), ("lengths", "5", "row 1", "0 to 4")),
    (5, np.array([-1, 2], np.int32), ("lengths", "-1", "row 0")),
    (3, np.zeros((3, 8), np.float32), ("cos", "3", "4")),
    (1, np.zeros((2, 4, 40), np.float32), ("k", "40")),
    (0, np.zeros((2, 4, 48), np.float32), ("q", "48", "32")),
])
def test_bad_causal_arguments_are_refused_before_writing(place, value, words):
    inputs = causal_inputs(np.random.default_rng(0), 2, 4, 2, 2, 16)
    inputs[4] = np.zeros((3, 8), np.float32) if place == 3 else inputs[4]
    out, lse = np.full(inputs[0].shape, 7, np.float32), np.full((2, 4, 4), 7, np.float32)
    inputs[place] = value
    with pytest.raises(Refused) as error:
        call("causal_attention", inputs, [out, lse])
    assert all(word in str(error.value) for word in ("causal_attention", *words)), str(error.value)
    assert (out == 7).all() and (lse == 7).all()


@pytest.mark.parametrize("cut", [
    [21, 9, 0], [[21, 0, 0, 0], [4, 1, 0, 7], [0, 0, 0, 0]], [[3, 5, 12, 1], [0, 1, 1, 1], [20, 0, 0, 1]]])
def test_causal_face_and_reference_agree_in_graph_mode(cut):
    rng = np.random.default_rng(2)
    inputs = causal_inputs(rng, 3, 21, 2, 3, 16)
    inputs[5] = np.array(cut, np.int32)
    q, k, v, cos, sin, lengths = (Tensor(x) for x in inputs)
    mix = Tensor(rng.normal(size=q.shape).astype(np.float32))

    @ms.jit
    def face(q, k, v):
        return ops.value_and_grad(
            lambda q, k, v: (attention.causal_attention(q, k, v, cos, sin, lengths) * mix).sum(), (0, 1, 2))(q, k, v)

    @ms.jit
    def reference(q, k, v):
        return ops.value_and_grad(
            lambda q, k, v: (attention.causal_attention_reference(q, k, v, cos, sin, lengths) * mix).sum(),
            (0, 1, 2))(q, k, v)

    value, gradients = face(q, k, v)
    want_value, want_gradients = reference(q, k, v)
    np.testing.assert_allclose(value.asnumpy(), want_value.asnumpy(), rtol=1e-4, atol=1e-4)
    for got, want in zip(gradients, want_gradients):
        assert want.asnumpy().any()
        np.testing.assert_allclose(got.asnumpy(), want.asnumpy(), rtol=1e-3, atol=1e-5)


def test_the_reference_of_packed_rows_matches_float64():
    """With tables shorter than the row, as a long row of short examples may have."""
    rng = np.random.default_rng(3)
    inputs = packed_inputs(rng, (23, np.array([[9, 1, 13], [0, 5, 0]], np.int32)), 2, 3, 8)
    wide = [x.astype(np.float64) for x in inputs[:5]] + inputs[5:]
    out = attention.causal_attention_reference(*(Tensor(x) for x in inputs)).asnumpy()
    np.testing.assert_allclose(out, causal_expected(*wide), rtol=1e-4, atol=3e-6)


def test_segments_of_other_rows_are_refused_at_compile_time():
    if backend() != "cpu":
        pytest.skip("needs the compiled CPU library")
    inputs = causal_inputs(np.random.default_rng(3), 2, 5, 1, 1, 8)
    inputs[5] = np.zeros((3, 2), np.int32)
    with pytest.raises(KernelError, match=r"causal_attention: lengths has shape \(3, 2\), expected \(2, segments\)"):
        attention.causal_attention(*(Tensor(x) for x in inputs))
