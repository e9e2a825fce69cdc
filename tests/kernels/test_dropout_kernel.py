"""dropout: the C operator against NumPy's uint32 arithmetic, its statistics, face and reference in graph mode."""

import numpy as np
import pytest

import mindspore as ms
from mindspore import Tensor, ops

from call import Refused, call, set_threads
from colora_ms.kernels.dropout import dropout, dropout_constants, dropout_reference

ms.set_context(mode=ms.GRAPH_MODE)


def mix(h):
    """The finalizer of MurmurHash3 on a uint32 array."""
    with np.errstate(over="ignore"):
        for shift, factor in ((16, 0x85ebca6b), (13, 0xc2b2ae35)):
            h = (h ^ h >> np.uint32(shift)) * np.uint32(factor)
        return h ^ h >> np.uint32(16)


def mask(shape, key, rate):
    """Which elements stay, by the docstring's formula."""
    columns = shape[-1]
    a, b = mix(np.array(key, np.int32).view(np.uint32))
    r = np.arange(int(np.prod(shape[:-1])), dtype=np.uint32)[:, None]
    c = np.arange(columns, dtype=np.uint32)[None]
    with np.errstate(over="ignore"):
        word = mix(mix(r + a) ^ (c * np.uint32(0x9e3779b9) + b))
    return ((word >> np.uint32(8)) >= round(rate * 2 ** 24)).reshape(shape)


def constants(rate):
    return [value.asnumpy() for value in dropout_constants(rate)]


def run(x, key, rate):
    return call("dropout", [x, np.array(key, np.int32), *constants(rate)], [(x.shape, "float32")])[0]


@pytest.mark.parametrize("shape", [(1,), (15,), (3, 16), (0, 5), (5, 0), (2, 3, 17), (1, 100003), (700, 33), (4097, 1)])
@pytest.mark.parametrize("rate", [0.0, 0.1, 0.9])
def test_the_operator_is_the_formula(shape, rate):
    rng = np.random.default_rng(0)
    x, key = rng.normal(size=shape).astype(np.float32), rng.integers(-2 ** 31, 2 ** 31, 2)
    want = np.where(mask(shape, key, rate), x * np.float32(1 / (1 - rate)), np.float32(0))
    for threads in (1, 2):
        set_threads(threads)
        np.testing.assert_array_equal(run(x, key, rate), want)


def test_what_is_dropped_is_zero_whatever_it_was():
    x = np.full((8, 40), np.nan, np.float32)
    kept = mask(x.shape, (1, 2), 0.5)
    np.testing.assert_array_equal(np.isnan(run(x, (1, 2), 0.5)), kept)
    assert 0.3 < kept.mean() < 0.7


def test_masks_are_independent_of_one_another_and_of_their_neighbours():
    """Correlations of centred masks over n elements have a standard deviation of sqrt(n) for independent ones."""
    rate, shape = 0.1, (300, 576)
    spread = np.sqrt(rate * (1 - rate))
    rng = np.random.default_rng(5)
    words = rng.integers(-2 ** 31, 2 ** 31 - 64, (4, 2))  # four places in a model
    ones = np.ones(shape, np.float32)
    draws = np.array([[((run(ones, w + k, rate) > 0) - (1 - rate)) / spread for k in range(6)] for w in words],
                     np.float32)

    def check(products):
        z = products.sum(dtype=np.float64) / np.sqrt(products.size)
        assert abs(z) < 4, z
    check(draws)
    for one in draws.reshape(-1, *shape):
        check(one)
    check(draws[:, 1:] * draws[:, :-1])  # from call to call
    check(draws[:, 3:] * draws[:, :-3])
    for i in range(4):
        for j in range(i):
            check(draws[i] * draws[j])  # from place to place
    check(draws[..., 1:, :] * draws[..., :-1, :])
    check(draws[..., :, 1:] * draws[..., :, :-1])
    check(draws[..., :, 16:] * draws[..., :, :-16])
    check(draws[..., 1:, 1:] * draws[..., :-1, :-1])
    # Row and column enter the hash one after the other: no pattern over rectangles, next to each other or far apart.
    check(draws[..., 1:, 1:] * draws[..., :-1, 1:] * draws[..., 1:, :-1] * draws[..., :-1, :-1])
    check(draws[..., 128:, 64:] * draws[..., :-128, 64:] * draws[..., 128:, :-64] * draws[..., :-128, :-64])
    # The share of kept elements of rows and columns scatters as that of independent draws.
    for axis in (-1, -2):
        sums = draws.sum(axis) / np.sqrt(shape[axis])
        assert abs((sums ** 2).mean() - 1) < 5 * np.sqrt(2 / sums.size)


@pytest.mark.parametrize("inputs, words", [
    ({"key": np.zeros(3, np.int32)}, ("dropout", "key", "(3,)")),
    ({"key": np.zeros(2, np.float32)}, ("dropout", "key", "float32")),
    ({"x": np.ones((2, 4), np.float16)}, ("dropout", "x", "float16")),
])
def test_bad_arguments_are_refused_before_writing(inputs, words):
    values = {"x": np.ones((2, 4), np.float32), "key": np.zeros(2, np.int32), **inputs}
    y = np.full((2, 4), 7, np.float32)
    with pytest.raises(Refused) as error:
        call("dropout", [*values.values(), *constants(0.5)], [y])
    assert all(word in str(error.value) for word in words)
    assert (y == 7).all()


def test_face_and_reference_are_the_formula_and_so_are_their_gradients():
    rng = np.random.default_rng(3)
    shape, key = (2, 1, 37), np.array([-7, 12345], np.int32)
    x, factor = rng.normal(size=(2, *shape)).astype(np.float32)
    constants_ = dropout_constants(0.25)

    @ms.jit
    def all_forms(x, half, key, factor):
        single = ops.value_and_grad(lambda a: (dropout(a, key, *constants_) * factor).sum())(x)
        plain = ops.value_and_grad(lambda a: (dropout_reference(a, key, *constants_) * factor).sum())(x)
        small = ops.value_and_grad(lambda a: (dropout(a, key, *constants_) * factor.astype(ms.float16)).sum())(half)
        return (dropout(x, key, *constants_), dropout_reference(x, key, *constants_), dropout(half, key, *constants_),
                single[1], plain[1], small[1])

    half = x.astype(np.float16)
    found = [value.asnumpy() for value in all_forms(*(Tensor(value) for value in (x, half, key, factor)))]
    kept = mask(shape, key, 0.25)
    assert kept.any() and not kept.all()
    for got, values in zip(found, (x, x, half, factor, factor, factor.astype(np.float16))):
        want = np.where(kept, values * np.float32(4 / 3).astype(values.dtype), np.zeros_like(values))
        assert got.dtype == want.dtype
        np.testing.assert_array_equal(got, want)
