"""paged_attention: the C operator against NumPy float64, its order of addition, its refusals, and the face in
graphs."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import mindspore as ms
from mindspore import Parameter, Tensor, nn, ops

from call import Refused, call, set_threads
from colora_ms.kernels import backend, paged
from colora_ms.kernels.aot import KernelError
from colora_ms.kernels.paged import BLOCK
from paged_case import empty_cache, get, history, numbers, put, rounded
from test_attention import attend, rotate, tables

KINDS = ("float32", "bfloat16", "int8")


class Case:
    """Random rows in random blocks, and a flat batch: counts[r] tokens of row r behind starts[r] that are there."""

    def __init__(self, seed, starts, counts, kv_heads=2, group=3, dim=16, kind="float32"):
        self.rng = np.random.default_rng(seed)
        self.starts, self.counts, self.kind = list(starts), list(counts), kind
        self.kv_heads, self.group, self.dim = kv_heads, group, dim
        rows = len(self.starts)
        lengths = [s + c for s, c in zip(self.starts, self.counts)]
        self.width = max([-(-n // BLOCK) for n in lengths] + [1]) + 1
        self.cos, self.sin = tables(self.width * BLOCK, dim)
        wanted = [-(-n // BLOCK) for n in lengths]
        numbers_ = self.rng.permutation(sum(wanted) + 2)
        self.tables = np.full((rows, self.width), -1, np.int32)
        for row, count in enumerate(wanted):
            at = sum(wanted[:row])
            self.tables[row, :count] = numbers_[at:at + count]
        # The past, and the tokens to come.
        self.q, self.k, self.v = ([self.normal(n, heads * dim) for n in lengths]
                                  for heads in (kv_heads * group, kv_heads, kv_heads))
        self.k_cache, self.v_cache = (empty_cache(len(numbers_), kv_heads, dim, kind) for _ in range(2))
        for row, start in enumerate(self.starts):
            if start:
                self.calls([(row, 0, start)])

    def normal(self, *shape):
        return self.rng.normal(size=shape).astype(np.float32)

    def calls(self, pieces):
        """One call for pieces (row, first, count) -> (tokens, heads * dim)."""
        def cut(values):
            return np.concatenate([values[row][first:first + count] for row, first, count in pieces])

        rows = np.concatenate([np.full(count, row, np.int32) for row, _, count in pieces])
        positions = np.concatenate([np.arange(first, first + count, dtype=np.int32) for _, first, count in pieces])
        q = cut(self.q)
        return call("paged_attention", [q, cut(self.k), cut(self.v), self.cos, self.sin, self.k_cache, self.v_cache,
                                        rows,
                                        positions, self.tables], [(q.shape, "float32")])[0]

    def pieces(self):
        return [(row, start, count) for row, (start, count) in enumerate(zip(self.starts, self.counts)) if count]

    def expected(self, row, p):
        """The output of row's position p in float64, given what the cache holds."""
        out = []
        for h in range(self.kv_heads * self.group):
            query = rotate(self.q[row][p, h * self.dim:(h + 1) * self.dim].astype(np.float64), self.cos[p], self.sin[p])
            past = [history(cache, self.kind, keys, self.tables[row], p + 1, h // self.group, self.dim)
                    for cache, keys in ((self.k_cache, True), (self.v_cache, False))]
            out.append(attend(query, *(x.astype(np.float64) for x in past))[0])
        return np.concatenate(out)

    def check(self):
        out = self.calls(self.pieces())
        at = 0
        for row, first, count in self.pieces():
            for p in range(first, first + count):
                block, place = self.tables[row, p // BLOCK], p % BLOCK
                for head in range(self.kv_heads):
                    part = slice(head * self.dim, (head + 1) * self.dim)
                    want = rounded(rotate(self.k[row][p, part], self.cos[p], self.sin[p]), self.kind)
                    slack = {"float32": 1e-5, "bfloat16": 1e-2, "int8": 2e-2}[self.kind] * max(1, np.abs(want).max())
                    np.testing.assert_allclose(get(self.k_cache, self.kind, True, block, place, head, self.dim), want,
                                               atol=slack)
                    np.testing.assert_allclose(get(self.v_cache, self.kind, False, block, place, head, self.dim),
                                               rounded(self.v[row][p, part], self.kind), rtol=1e-6, atol=1e-7)
                np.testing.assert_allclose(out[at], self.expected(row, p), rtol=1e-4, atol=3e-6)
                at += 1


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 999), starts=st.lists(st.sampled_from([0, 1, 15, 16, 40, 300]), min_size=1, max_size=4),
       kv_heads=st.integers(1, 3), group=st.integers(1, 8), dim=st.sampled_from([2, 8, 10, 16, 64, 80, 128]),
       kind=st.sampled_from(KINDS))
def test_decoding_matches_float64(seed, starts, kv_heads, group, dim, kind):
    Case(seed, starts, [1] * len(starts), kv_heads, group, dim, kind).check()


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 999), rows=st.lists(st.tuples(st.sampled_from([0, 3, 16, 70]), st.integers(0, 40)),
                                               min_size=1, max_size=3),
       kv_heads=st.integers(1, 2), group=st.integers(1, 8), dim=st.sampled_from([2, 8, 18, 64]),
       kind=st.sampled_from(KINDS))
def test_pieces_of_prompts_and_single_tokens_match_float64(seed, rows, kv_heads, group, dim, kind):
    rows = rows + [(5, 1)]
    Case(seed, *zip(*rows), kv_heads, group, dim, kind).check()


def test_a_long_row_is_merged_from_chunks():
    Case(5, [1099, 767], [1, 1], 1, 3, 16).check()


@st.composite
def cut_rows(draw):
    """(number of positions, borders of its pieces) of a few rows."""
    found = []
    for _ in range(draw(st.integers(1, 3))):
        count = draw(st.sampled_from([1, 5, 16, 33, 130, 300, 530]))
        borders = draw(st.sets(st.integers(1, count - 1), max_size=5)) if count > 1 else set()
        found.append((count, sorted(borders)))
    return found


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 999), rows=cut_rows(), kv_heads=st.integers(1, 2), group=st.integers(1, 5),
       dim=st.sampled_from([2, 16, 24, 64]), kind=st.sampled_from(KINDS), threads=st.integers(1, 2))
def test_bits_do_not_depend_on_the_cut_nor_on_neighbours_nor_on_threads(seed, rows, kv_heads, group, dim, kind,
                                                                         threads):
    """Every row whole and alone; all rows in any pieces beside each other; and token by token at the end."""
    counts = [count for count, _ in rows]
    case = Case(seed, [0] * len(rows), counts, kv_heads, group, dim, kind)
    whole = [case.calls([(row, 0, count)]) for row, count in enumerate(counts)]
    caches = [numbers(case.k_cache).copy(), numbers(case.v_cache).copy()]
    for cache, before in ((case.k_cache, caches[0]), (case.v_cache, caches[1])):
        numbers(cache)[:] = numbers(empty_cache(len(before), kv_heads, dim, kind))
    set_threads(threads)
    try:
        cuts = [np.split(np.arange(count), borders) for count, borders in rows]
        found = [[] for _ in rows]
        while any(cuts):
            pieces = [(row, int(left[0][0]), len(left.pop(0))) for row, left in enumerate(cuts) if left]
            out, at = case.calls(pieces), 0
            for row, _, count in pieces:
                found[row].append(out[at:at + count])
                at += count
    finally:
        set_threads(2)
    for row, count in enumerate(counts):
        assert np.array_equal(np.concatenate(found[row]).view(np.int32), whole[row].view(np.int32))
        last = min(count, 3)
        again = np.concatenate([case.calls([(row, p, 1)]) for p in range(count - last, count)])
        assert np.array_equal(again.view(np.int32), whole[row][count - last:].view(np.int32))
    for cache, before in ((case.k_cache, caches[0]), (case.v_cache, caches[1])):
        assert np.array_equal(numbers(cache).view(np.uint8), before.view(np.uint8))


def test_shared_blocks_of_a_prefix_are_read_by_all():
    case = Case(3, [40, 40], [2, 1], kind="float32")
    case.tables[1, :2] = case.tables[0, :2]  # 32 positions of the other row; the third block is its own
    out = case.calls([(1, 40, 1)])
    np.testing.assert_allclose(out[0], case.expected(1, 40), rtol=1e-4, atol=3e-6)


def test_int8_numbers_that_are_not_finite_show():
    case = Case(3, [0], [2], kind="int8")
    case.v[0][0, 0] = np.nan
    case.k[0][1, 0] = np.inf
    assert np.isnan(case.calls([(0, 0, 2)])).any()


def test_no_tokens_and_tokens_that_only_fill():
    case = Case(0, [0, 3], [1, 1])
    q = np.ones((3, 2 * 3 * 16), np.float32)
    kv = np.ones((3, 32), np.float32)
    caches = [numbers(cache).copy() for cache in (case.k_cache, case.v_cache)]
    out, = call("paged_attention", [q, kv, kv, case.cos, case.sin, case.k_cache, case.v_cache,
                                    np.full(3, -1, np.int32), np.full(3, 10**6, np.int32), case.tables],
                [(q.shape, "float32")])
    assert not out.any()
    for cache, before in zip((case.k_cache, case.v_cache), caches):
        assert np.array_equal(cache, before, equal_nan=True)
    assert call("paged_attention", [q[:0], kv[:0], kv[:0], case.cos, case.sin, case.k_cache, case.v_cache,
                                    np.zeros(0, np.int32), np.zeros(0, np.int32), case.tables],
                [((0, 96), "float32")])[0].shape == (0, 96)


BAD = {
    "row too large": (7, [0, 2], ("rows", "2", "token 1", "0 to 1")),
    "row below -1": (7, [-2, 1], ("rows", "-2")),
    "row twice": (7, [0, 1, 0], ("rows", "0", "token 2", "together")),
    "position past the tables": (8, [48, 3], ("positions", "48", "0 to 47")),
    "negative position": (8, [-1, 3], ("positions", "-1")),
    "positions with a hole": (8, [20, 22], ("positions", "22", "20")),
    "no block": (9, [[0, -1, -1], [3, -1, -1]], ("tables", "-1", "entry 1 of row 0")),
    "no such block": (9, [[0, 9, -1], [3, -1, -1]], ("tables", "9")),
    "a block that two rows write": (9, [[0, 3, -1], [3, -1, -1]], ("tables", "3", "row 0 writes that block")),
    "a block that another one reads": (9, [[3, 1, -1], [3, -1, -1]], ("tables", "3", "row 1 writes that block")),
    "rows of int64": (7, np.zeros(2, np.int64), ("rows", "int64")),
    "cos of another width": (3, np.zeros((48, 7), np.float32), ("sin",)),
    "v_cache of another dtype": (6, np.zeros((5, 2, 256), np.int8), ("v_cache", "int8")),
    "a cache of another width": (5, np.zeros((5, 2, 255), np.float32), ("v_cache",)),
    "v of another shape": (2, np.zeros((2, 16), np.float32), ("v", "(2, 16)")),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_arguments_are_refused_before_writing(name):
    place, value, words = BAD[name]
    rng = np.random.default_rng(0)
    rows, positions = np.array([0, 1], np.int32), np.array([20, 3], np.int32)
    if name == "row twice":
        rows, positions = np.array([0, 1, 0], np.int32), np.array([20, 3, 21], np.int32)
    if name == "positions with a hole":
        rows = np.array([0, 0], np.int32)
    n = len(rows)
    inputs = [rng.normal(size=(n, width)).astype(np.float32) for width in (96, 32, 32)]
    inputs += [*tables(48, 16), *(np.zeros((5, 2, 256), np.float32) for _ in range(2)), rows, positions,
               np.array([[0, 1, -1], [3, -1, -1]], np.int32)]
    inputs[place] = value if isinstance(value, np.ndarray) else np.array(value, np.int32)
    out = np.full((n, 96), 7, np.float32)
    with pytest.raises(Refused) as error:
        call("paged_attention", inputs, [out])
    assert all(word in str(error.value) for word in ("paged_attention", *words)), str(error.value)
    assert (out == 7).all() and not numbers(inputs[5]).any()


# -- the face in graphs -----------------------------------------------------------------------------------------------

class Net(nn.Cell):
    """One call a run over a cache of its own."""

    def __init__(self, function, case, dtype=ms.float32):
        super().__init__()
        self.function = function
        shape = (len(numbers(case.k_cache)), case.kv_heads, paged.block_numbers(case.dim, dtype))
        zeros = np.zeros(shape, np.int8 if dtype == ms.int8 else np.float32)
        self.k_cache = Parameter(Tensor(zeros, dtype), name="k_cache")
        self.v_cache = Parameter(Tensor(zeros, dtype), name="v_cache")
        self.cos, self.sin = Tensor(case.cos), Tensor(case.sin)

    def construct(self, q, k, v, rows, positions, tables):
        return self.function(q, k, v, self.cos, self.sin, self.k_cache, self.v_cache, rows, positions, tables)


def test_face_and_reference_agree():
    case = Case(9, [0, 0, 0], [20, 1, 35], dim=8)
    results = []
    for function in (paged.paged_attention, paged.paged_attention_reference):
        net, outs = Net(function, case), []
        for pieces in ([(0, 0, 19), (2, 0, 3)], [(2, 3, 31), (1, 0, 1)], [(0, 19, 1), (2, 34, 1)]):
            q, k, v = (np.concatenate([x[row][first:first + count] for row, first, count in pieces])
                       for x in (case.q, case.k, case.v))
            rows = np.concatenate([np.full(count, row) for row, _, count in pieces] + [[-1]]).astype(np.int32)
            places = np.concatenate([np.arange(first, first + count) for _, first, count in pieces] + [[0]])
            fill = [np.concatenate([x, np.ones_like(x[:1])]) for x in (q, k, v)]
            outs.append(net(*map(Tensor, fill), Tensor(rows), Tensor(places.astype(np.int32)),
                            Tensor(case.tables)).asnumpy())
        results.append((*outs, net.k_cache.asnumpy(), net.v_cache.asnumpy()))
    for got, want in zip(*results):
        np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)
    assert not results[0][0][-1].any()


@pytest.mark.parametrize("dtype", [ms.bfloat16, ms.int8])
def test_narrow_caches_in_graphs(dtype):
    if backend() != "cpu":
        pytest.skip("the reference form keeps a float32 cache on a CPU")
    case = Case(9, [0], [20], dim=8)
    inputs = [Tensor(x) for x in (case.q[0], case.k[0], case.v[0], np.zeros(20, np.int32),
                                  np.arange(20, dtype=np.int32), case.tables)]
    wide, narrow = (Net(paged.paged_attention, case, one)(*inputs).asnumpy() for one in (ms.float32, dtype))
    assert not np.array_equal(wide, narrow)
    np.testing.assert_allclose(wide, narrow, atol=0.1)


def test_refusals_in_graphs():
    if backend() != "cpu":
        pytest.skip("needs the compiled CPU library")
    case = Case(9, [0], [2], dim=8)
    inputs = [Tensor(x) for x in (case.q[0], case.k[0], case.v[0], np.zeros(2, np.int32),
                                  np.array([0, 5], np.int32), case.tables)]
    with pytest.raises(RuntimeError, match="paged_attention"):
        Net(paged.paged_attention, case)(*inputs)
    with pytest.raises(KernelError, match=r"paged_attention: q has shape \(2, 6\)"):
        Net(paged.paged_attention, case)(Tensor(case.q[0][:, :6]), *inputs[1:])
    net = Net(paged.paged_attention, case)

    @ms.jit
    def gradient(q):
        return ops.grad(lambda q: net.construct(q, *inputs[1:]).sum())(q)

    with pytest.raises(RuntimeError, match="paged_attention has no gradient"):
        gradient(inputs[0])


def test_put_and_get_are_inverse():
    for kind in KINDS:
        cache = empty_cache(2, 1, 6, kind)
        x = np.random.default_rng(0).normal(size=6).astype(np.float32)
        for keys in (True, False):
            put(cache, kind, keys, 1, 3, 0, x)
            np.testing.assert_allclose(get(cache, kind, keys, 1, 3, 0, 6), rounded(x, kind), rtol=1e-6)
