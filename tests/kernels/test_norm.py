"""rms_norm and rms_norm_residual: the C operators against NumPy float64, the faces in graph mode."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import mindspore as ms
from mindspore import Tensor, ops

from call import Refused, call, from_bf16, set_threads, to_bf16
from colora_ms.kernels import backend, norm
from colora_ms.kernels.aot import KernelError

ms.set_context(mode=ms.GRAPH_MODE)


def expected(x, weight, eps):
    x = x.astype(np.float64)
    return x / np.sqrt((x * x).mean(-1, keepdims=True) + eps) * weight


def run(x, weight, eps):
    return call("rms_norm", [x, weight, np.float32(eps)], [(x.shape, "float32"), (x.shape[:-1], "float32")])


@settings(max_examples=25, deadline=None)
@given(rows=st.integers(1, 9), hidden=st.sampled_from([1, 2, 3, 15, 16, 17, 63, 64, 65, 576, 1023]),
       bf16=st.booleans(), seed=st.integers(0, 99))
def test_norm_matches_float64(rows, hidden, bf16, seed):
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(rows, hidden)).astype(np.float32) * np.float32(10.0 ** rng.integers(-3, 4))
    weight = rng.normal(size=hidden).astype(np.float32)
    given_weight = to_bf16(weight) if bf16 else weight
    weight = from_bf16(given_weight) if bf16 else weight
    y, inverse = run(x, given_weight, 1e-5)
    want = expected(x, weight, 1e-5)
    np.testing.assert_allclose(y, want, rtol=2e-6, atol=1e-7)
    np.testing.assert_allclose(inverse, 1 / np.sqrt((x.astype(np.float64) ** 2).mean(-1) + 1e-5), rtol=2e-6)


def test_a_zero_row_is_zero_and_an_empty_batch_is_empty():
    y, _ = run(np.zeros((2, 40), np.float32), np.ones(40, np.float32), 1e-6)
    assert not y.any()
    assert run(np.zeros((0, 40), np.float32), np.ones(40, np.float32), 1e-6)[0].shape == (0, 40)


def test_rows_do_not_depend_on_the_batch_nor_on_threads():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(300, 577)).astype(np.float32)
    weight = rng.normal(size=577).astype(np.float32)
    whole = run(x, weight, 1e-5)[0]
    for row in (0, 7, 299):
        assert np.array_equal(run(x[row:row + 1], weight, 1e-5)[0][0], whole[row])
    set_threads(1)
    alone = run(x, weight, 1e-5)[0]
    set_threads(2)
    assert np.array_equal(alone, whole)


@pytest.mark.parametrize("shape", [(4, 40), (2, 3, 5, 64)])
def test_residual_form_is_the_norm_of_the_sum(shape):
    rng = np.random.default_rng(1)
    x, residual = rng.normal(size=(2, *shape)).astype(np.float32)
    weight = rng.normal(size=shape[-1]).astype(np.float32)
    y, total, _ = call("rms_norm_residual", [x, residual, weight, np.float32(1e-5)],
                       [(shape, "float32"), (shape, "float32"), (shape[:-1], "float32")])
    assert np.array_equal(total, x + residual)
    assert np.array_equal(y, run(total, weight, 1e-5)[0])


@settings(max_examples=10, deadline=None)
@given(rows=st.integers(1, 130), hidden=st.sampled_from([1, 7, 33, 64]), more=st.booleans(), seed=st.integers(0, 99))
def test_gradients_match_float64(rows, hidden, more, seed):
    rng = np.random.default_rng(seed)
    x, dy, extra = rng.normal(size=(3, rows, hidden))
    weight = rng.normal(size=hidden)
    eps = 1e-3
    inverse = 1 / np.sqrt((x * x).mean(-1) + eps)
    g = dy * weight
    want = inverse[:, None] * g - x * (inverse ** 3 * (g * x).mean(-1))[:, None] + (extra if more else 0)
    # The formula itself, against a finite difference of the forward in one direction.
    step = rng.normal(size=x.shape) * 1e-6
    slope = (dy * (expected(x + step, weight, eps) - expected(x - step, weight, eps))).sum() / 2
    np.testing.assert_allclose(((want - (extra if more else 0)) * step).sum(), slope, rtol=1e-4, atol=1e-10)
    x32, w32, i32, d32, e32 = (a.astype(np.float32) for a in (x, weight, inverse, dy, extra))
    dx, = call("rms_norm_grad", [x32, w32, i32, d32, e32 if more else None], [(x.shape, "float32")])
    np.testing.assert_allclose(dx, want, rtol=1e-4, atol=2e-5)
    dweight, = call("rms_norm_weight_grad", [x32, w32, i32, d32], [((hidden,), "float32")])
    np.testing.assert_allclose(dweight, (dy * x * inverse[:, None]).sum(0), rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("change, words", [
    (dict(weight=np.ones(5, np.float32)), ("rms_norm", "weight", "(5,)")),
    (dict(weight=np.ones(4, np.int32)), ("rms_norm", "weight", "int32")),
    (dict(x=np.ones((2, 4), np.float64)), ("rms_norm", "x", "float64")),
    (dict(eps=np.float32(-1)), ("rms_norm", "eps", "-1")),
    (dict(eps=np.float32(np.nan)), ("rms_norm", "eps", "nan")),
    (dict(eps=np.ones(2, np.float32)), ("rms_norm", "eps", "(2,)")),
])
def test_bad_arguments_are_refused_before_writing(change, words):
    given_ = dict(x=np.ones((2, 4), np.float32), weight=np.ones(4, np.float32), eps=np.float32(1e-5)) | change
    y = np.full((2, 4), 7, np.float32)
    with pytest.raises(Refused) as error:
        call("rms_norm", list(given_.values()), [y, ((2,), "float32")])
    assert all(word in str(error.value) for word in words)
    assert (y == 7).all()


def _graph_gradients(function, *inputs):
    return ops.value_and_grad(function, tuple(range(len(inputs))))(*inputs)


def test_faces_and_references_agree_in_graph_mode():
    rng = np.random.default_rng(3)
    x, residual, mix, mix2 = (Tensor(rng.normal(size=(2, 3, 20)).astype(np.float32)) for _ in range(4))
    weight = Tensor(rng.normal(size=20).astype(np.float32))
    eps = Tensor(1e-5, ms.float32)

    @ms.jit
    def face(x, residual, weight):
        def loss(x, residual, weight):
            y, total = norm.rms_norm_residual(x, residual, weight, eps)
            return (norm.rms_norm(y, weight, eps) * mix + total * mix2).sum()
        return _graph_gradients(loss, x, residual, weight)

    @ms.jit
    def reference(x, residual, weight):
        def loss(x, residual, weight):
            y, total = norm.rms_norm_residual_reference(x, residual, weight, eps)
            return (norm.rms_norm_reference(y, weight, eps) * mix + total * mix2).sum()
        return _graph_gradients(loss, x, residual, weight)

    value, gradients = face(x, residual, weight)
    want_value, want_gradients = reference(x, residual, weight)
    np.testing.assert_allclose(value.asnumpy(), want_value.asnumpy(), rtol=1e-5)
    for got, want in zip(gradients, want_gradients):
        np.testing.assert_allclose(got.asnumpy(), want.asnumpy(), rtol=1e-4, atol=1e-5)


def test_wrong_shapes_are_python_exceptions_at_compile_time():
    if not (backend() == "cpu"):
        pytest.skip("needs the compiled CPU library")

    @ms.jit
    def face(x, weight):
        return norm.rms_norm(x, weight, Tensor(1e-5, ms.float32))

    with pytest.raises(KernelError, match=r"rms_norm: weight has shape \(5,\)"):
        face(Tensor(np.ones((2, 4), np.float32)), Tensor(np.ones(5, np.float32)))
