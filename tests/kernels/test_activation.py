"""swiglu: the C operator against NumPy float64, the face in graph mode."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import mindspore as ms
from mindspore import Tensor, ops

from call import Refused, call, set_threads
from colora_ms.kernels.activation import swiglu, swiglu_reference

ms.set_context(mode=ms.GRAPH_MODE)


def run(gate, up):
    return call("swiglu", [gate, up], [(gate.shape, "float32")])[0]


@settings(max_examples=20, deadline=None)
@given(size=st.sampled_from([0, 1, 3, 15, 16, 17, 33, 1536]), scale=st.sampled_from([0.01, 1.0, 30.0]),
       seed=st.integers(0, 99))
def test_swiglu_and_its_gradient_match_float64(size, scale, seed):
    rng = np.random.default_rng(seed)
    gate, up, dy = (rng.normal(size=(2, size)) * scale).astype(np.float32), *rng.normal(size=(2, 2, size))
    up, dy = up.astype(np.float32), dy.astype(np.float32)
    g = gate.astype(np.float64)
    s = 1 / (1 + np.exp(-g))
    np.testing.assert_allclose(run(gate, up), g * s * up, rtol=1e-6, atol=1e-30)
    dgate, dup = call("swiglu_grad", [gate, up, dy], [(gate.shape, "float32")] * 2)
    np.testing.assert_allclose(dup, dy * g * s, rtol=1e-6, atol=1e-30)
    np.testing.assert_allclose(dgate, dy * up * (s + g * s * (1 - s)), rtol=1e-5, atol=1e-6)


def test_extremes():
    gate = np.array([-np.inf, -1e4, -100, -88, 0, -0.0, 88, 100, 1e4, 3e38, np.nan], np.float32)
    got = run(gate, np.ones_like(gate))
    # silu(-inf) is -inf * 0, NaN by its formula; everything finite stays finite.
    assert np.isnan(got[[0, 10]]).all()
    np.testing.assert_allclose(got[1:10], [0, 0, -88 * np.exp(-88.0), 0, 0, 88, 100, 1e4, 3e38], rtol=1e-5, atol=1e-36)


def test_an_element_does_not_depend_on_its_place():
    rng = np.random.default_rng(0)
    gate, up = rng.normal(size=(2, 100003)).astype(np.float32)
    whole = run(gate, up)
    assert np.array_equal(run(gate[77:100], up[77:100]), whole[77:100])
    set_threads(1)
    assert np.array_equal(run(gate, up), whole)
    set_threads(2)


@pytest.mark.parametrize("up, words", [
    (np.ones((2, 5), np.float32), ("swiglu", "up", "(2, 5)", "(2, 4)")),
    (np.ones((2, 4), np.float16), ("swiglu", "up", "float16")),
])
def test_bad_arguments_are_refused_before_writing(up, words):
    y = np.full((2, 4), 7, np.float32)
    with pytest.raises(Refused) as error:
        call("swiglu", [np.ones((2, 4), np.float32), up], [y])
    assert all(word in str(error.value) for word in words)
    assert (y == 7).all()


def test_face_and_reference_agree_in_graph_mode():
    rng = np.random.default_rng(3)
    gate, up, mix = (Tensor(rng.normal(size=(3, 21)).astype(np.float32)) for _ in range(3))

    @ms.jit
    def face(gate, up):
        return ops.value_and_grad(lambda a, b: (swiglu(a, b) * mix).sum(), (0, 1))(gate, up)

    @ms.jit
    def reference(gate, up):
        return ops.value_and_grad(lambda a, b: (swiglu_reference(a, b) * mix).sum(), (0, 1))(gate, up)

    value, gradients = face(gate, up)
    want_value, want_gradients = reference(gate, up)
    np.testing.assert_allclose(value.asnumpy(), want_value.asnumpy(), rtol=1e-5)
    for got, want in zip(gradients, want_gradients):
        np.testing.assert_allclose(got.asnumpy(), want.asnumpy(), rtol=1e-4, atol=1e-6)
