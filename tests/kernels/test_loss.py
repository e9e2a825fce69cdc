"""linear_cross_entropy and linear_token_losses: the C operators against NumPy float64, the faces in graph mode."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import mindspore as ms
from mindspore import Tensor, ops

from call import Refused, call, from_bf16, set_threads, table, to_bf16
from colora_ms.kernels import backend
from colora_ms.kernels.aot import KernelError
from colora_ms.kernels.loss import (
    linear_cross_entropy,
    linear_cross_entropy_reference,
    linear_token_cross_entropy,
    linear_token_losses,
    linear_token_losses_reference,
)
from colora_ms.kernels.operands import BFLOAT16, FLOAT32, base_of

ms.set_context(mode=ms.GRAPH_MODE)


def make(rng, tokens, hidden, vocab, ignored):
    x = rng.normal(size=(tokens, hidden)).astype(np.float32)
    weight = (rng.normal(size=(vocab, hidden)) / np.sqrt(hidden)).astype(np.float32)
    labels = rng.integers(0, vocab, size=tokens).astype(np.int32)
    labels[rng.random(tokens) < ignored] = -100
    return x, weight, labels


def run(x, weight, labels):
    return call("linear_cross_entropy", [x, labels, *table(weight)],
                [((1,), "float32"), ((1,), "float32"), (x.shape, "float32"), (labels.shape, "float32"),
                 (labels.shape, "float32")])


def expected(x, weight, labels):
    """-> (losses, d sum / d x, d sum / d weight) in float64"""
    x, weight = x.astype(np.float64), weight.astype(np.float64)
    logits = x @ weight.T
    top = logits.max(-1, keepdims=True)
    lse = np.log(np.exp(logits - top).sum(-1, keepdims=True)) + top
    slopes = np.exp(logits - lse)
    rows = np.arange(len(labels))
    known = np.maximum(labels, 0)
    losses = lse[:, 0] - logits[rows, known]
    slopes[rows, known] -= 1
    slopes[labels == -100] = 0
    return np.where(labels == -100, 0, losses), slopes @ weight, slopes.T @ x


@settings(max_examples=25, deadline=None)
@given(tokens=st.sampled_from([0, 1, 2, 17, 129, 150]), hidden=st.sampled_from([1, 5, 16, 97, 200, 333]),
       vocab=st.sampled_from([1, 2, 37, 128, 129, 300, 700]), ignored=st.sampled_from([0.0, 0.3, 1.0]),
       bf16=st.booleans(), seed=st.integers(0, 99))
def test_loss_and_gradients_match_float64(tokens, hidden, vocab, ignored, bf16, seed):
    x, weight, labels = make(np.random.default_rng(seed), tokens, hidden, vocab, ignored)
    given_weight = to_bf16(weight) if bf16 else weight
    weight = from_bf16(given_weight) if bf16 else weight
    losses, dx, dweight = expected(x, weight, labels)
    loss_sum, count, got_dx, lse, trained_losses = run(x, given_weight, labels)
    assert count == (labels != -100).sum()
    np.testing.assert_allclose(loss_sum, losses.sum(), rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(got_dx, dx, rtol=1e-4, atol=1e-6)
    got_dweight, = call("linear_cross_entropy_weight_grad",
                        [x, labels, *table(given_weight), lse, np.ones(tokens, np.float32)],
                        [((vocab, hidden), "float32")])
    np.testing.assert_allclose(got_dweight, dweight, rtol=1e-4, atol=1e-5)
    got_losses, = call("linear_token_losses", [x, labels, *table(given_weight)], [(labels.shape, "float32")])
    np.testing.assert_allclose(got_losses, losses, rtol=1e-5, atol=2e-6)
    np.testing.assert_array_equal(trained_losses, got_losses)  # a reference and what is trained begin equal, to the bit


@settings(max_examples=15, deadline=None)
@given(tokens=st.sampled_from([1, 2, 17, 129, 150]), hidden=st.sampled_from([1, 5, 97, 200]),
       vocab=st.sampled_from([1, 37, 300]), ignored=st.sampled_from([0.0, 0.3, 1.0]), seed=st.integers(0, 99))
def test_the_weights_gradient_follows_the_share_of_each_token(tokens, hidden, vocab, ignored, seed):
    rng = np.random.default_rng(seed)
    x, weight, labels = make(rng, tokens, hidden, vocab, ignored)
    share = rng.normal(size=tokens).astype(np.float32)
    lse = run(x, weight, labels)[3]
    got, = call("linear_cross_entropy_weight_grad", [x, labels, *table(weight), lse, share],
                [((vocab, hidden), "float32")])
    parts = [expected(x[n:n + 1], weight, labels[n:n + 1])[2] * share[n] for n in range(tokens)]
    np.testing.assert_allclose(got, sum(parts), rtol=1e-4, atol=1e-5)


def test_large_logits_do_not_overflow():
    x = np.array([[300.0, 0.0], [-300.0, 0.0]], np.float32)
    weight = np.array([[1.0, 0.0], [-1.0, 0.0], [0.0, 1.0]], np.float32)
    labels = np.array([1, 0], np.int32)
    loss_sum, _, dx, _, _ = run(x, weight, labels)
    assert loss_sum == 1200.0
    np.testing.assert_allclose(dx, [[2, 0], [-2, 0]], atol=1e-6)


def test_ignored_tokens_are_not_computed():
    x, weight, labels = make(np.random.default_rng(0), 9, 20, 50, 0.4)
    x[labels == -100] = np.nan
    loss_sum, _, dx, lse, losses = run(x, weight, labels)
    assert np.isfinite(loss_sum) and np.isfinite(dx).all() and np.isfinite(lse).all() and np.isfinite(losses).all()
    assert not dx[labels == -100].any() and dx[labels != -100].any()


def test_result_does_not_depend_on_threads():
    args = make(np.random.default_rng(0), 200, 100, 1000, 0.1)
    two = run(*args)
    set_threads(1)
    one = run(*args)
    set_threads(2)
    assert all(np.array_equal(x, y) for x, y in zip(one, two))


@pytest.mark.parametrize("place, value, words", [
    (2, np.array([0, 7, 1], np.int32), ("labels", "7", "index 1", "0 to 6")),
    (2, np.array([0, -1, 1], np.int32), ("labels", "-1", "-100")),
    (2, np.array([0, 1], np.int32), ("labels", "(2,)")),
    (2, np.array([0, 1, 2], np.int64), ("labels", "int64")),
    (1, np.ones((7, 5), np.float32), ("weight", "(7, 5)", "4")),
    (1, np.ones((7, 4), np.int8), ("weight_scale", "absent")),
])
@pytest.mark.parametrize("name", ["linear_cross_entropy", "linear_token_losses"])
def test_bad_arguments_are_refused_before_writing(name, place, value, words):
    inputs = list(make(np.random.default_rng(0), 3, 4, 7, 0))
    inputs[place] = value
    outputs = [np.full(shape, 7, np.float32) for shape in ([(1,), (1,), (3, 4), (3,), (3,)] if name.endswith("entropy")
                                                            else [(3,)])]
    with pytest.raises(Refused) as error:
        x, weight, labels = inputs
        call(name, [x, labels, *table(weight)], outputs)
    assert all(word in str(error.value) for word in (name, *words)), str(error.value)
    assert all((x == 7).all() for x in outputs)


@pytest.mark.parametrize("bf16", [False, True])
def test_faces_and_references_agree_in_graph_mode(bf16):
    x, weight, labels = (Tensor(a) for a in make(np.random.default_rng(1), 30, 24, 300, 0.3))
    weight, form = (weight.astype(ms.bfloat16), BFLOAT16) if bf16 else (weight, FLOAT32)

    @ms.jit
    def face(x, weight):
        def loss(x, weight):
            total, count = linear_cross_entropy(x, base_of(form, weight), labels)
            return total / count
        return ops.value_and_grad(loss, (0, 1))(x, weight)

    @ms.jit
    def reference(x, weight):
        def loss(x, weight):
            total, count = linear_cross_entropy_reference(x, base_of(form, weight), labels)
            return total / count
        return ops.value_and_grad(loss, (0, 1))(x, weight)

    value, gradients = face(x, weight)
    want_value, want_gradients = reference(x, weight)
    np.testing.assert_allclose(value.asnumpy(), want_value.asnumpy(), rtol=1e-5)
    for got, want in zip(gradients, want_gradients):
        assert got.dtype == want.dtype
        got, want = got.astype(ms.float32).asnumpy(), want.astype(ms.float32).asnumpy()
        assert want.any()
        np.testing.assert_allclose(got, want, rtol=2e-2 if bf16 else 1e-4, atol=1e-4 if bf16 else 1e-7)

    @ms.jit
    def weighted(function, x, weight, share):
        def loss(x, weight):
            return (function(x, base_of(form, weight), labels) * share).sum()
        return ops.value_and_grad(loss, (0, 1))(x, weight)

    share = Tensor(np.random.default_rng(2).normal(size=30).astype(np.float32))
    want_value, want_gradients = weighted(linear_token_losses_reference, x, weight, share)
    for function in (linear_token_cross_entropy, linear_token_losses):
        value, gradients = weighted(function, x, weight, share)
        np.testing.assert_allclose(value.asnumpy(), want_value.asnumpy(), rtol=1e-4)
        for got, want in zip(gradients, want_gradients):
            got, want = got.astype(ms.float32).asnumpy(), want.astype(ms.float32).asnumpy()
            assert want.any()
            np.testing.assert_allclose(got, want, rtol=2e-2 if bf16 else 1e-4, atol=1e-3 if bf16 else 1e-6)
    got = ms.jit(linear_token_losses)(x, base_of(form, weight), labels)
    want = ms.jit(linear_token_losses_reference)(x, base_of(form, weight), labels)
    np.testing.assert_allclose(got.asnumpy(), want.asnumpy(), rtol=1e-4, atol=1e-5)


def test_wrong_shapes_are_python_exceptions_at_compile_time():
    if backend() != "cpu":
        pytest.skip("needs the compiled CPU library")
    x, weight, labels = (Tensor(a) for a in make(np.random.default_rng(1), 3, 4, 7, 0))
    with pytest.raises(KernelError, match=r"linear_cross_entropy: weight has shape \(7, 3\)"):
        ms.jit(linear_cross_entropy)(x, base_of(FLOAT32, weight[:, :3]), labels)
