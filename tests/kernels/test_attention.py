"""causal_attention: the C operators against NumPy float64, the face in graph mode."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import mindspore as ms
from mindspore import Tensor, ops

from call import Refused, call, set_threads
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
