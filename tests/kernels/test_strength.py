"""contrast_strength: beta of the adaptive contrasts, against NumPy float64."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import mindspore as ms
from mindspore import Tensor

from call import Refused, call, options, set_threads
from colora_ms.kernels.strength import contrast_strength, contrast_strength_reference

ms.set_context(mode=ms.GRAPH_MODE)
FIXED, ENTROPY, DIVERGENCE, MARGIN, SKIP = 0, 1, 2, 3, 8


def arguments(logits, mode, expert=0, amateur=1, alpha=0.1, beta=0.5, previous=-1, prompt=((0,),), lengths=0):
    """The operator's inputs; numbers are spread over the requests."""
    mode = np.atleast_1d(np.asarray(mode, np.int32))
    previous, lengths = (np.broadcast_to(np.asarray(x, np.int32), mode.shape).copy() for x in (previous, lengths))
    prompt = np.broadcast_to(np.asarray(prompt, np.int32), (len(mode), len(prompt[0]))).copy()
    both = options(dict(mode=mode, expert_rows=expert, amateur_rows=amateur), dict(alpha=alpha, beta=beta))
    return [np.asarray(logits, np.float32), *both, previous, prompt, lengths]


def strength(*given_, **named):
    inputs = arguments(*given_, **named)
    return call("contrast_strength", inputs, [((len(inputs[1]),), "float32")])[0]


def softmax(x):
    weights = np.exp(x - x.max())
    return weights / weights.sum()


def share(e, a, alpha, mode):
    """The share of beta in float64, written another way than the operator does it."""
    e, a = np.asarray(e, np.float64), np.asarray(a, np.float64)
    order = np.sort(e)[::-1]
    valid = e >= np.log(alpha) + order[0]
    if mode == ENTROPY:
        q = softmax(e[valid])
        return float(-(q * np.log(q)).sum() / np.log(valid.sum())) if valid.sum() > 1 else 0.0
    if mode == DIVERGENCE:
        p, q = softmax(e), softmax(a)
        m = (p + q) / 2
        return float(sum(np.where(x > 0, x * np.log2(np.maximum(x, 1e-300) / m), 0).sum() for x in (p, q)) / 2)
    if mode == MARGIN:
        return 0.0 if alpha == 1 or len(e) < 2 else max(0.0, 1 + (order[0] - order[1]) / np.log(alpha))
    return 1.0


@settings(max_examples=60, deadline=None)
@given(vocab=st.sampled_from([1, 2, 3, 15, 16, 17, 97, 1000]), scale=st.sampled_from([0.01, 1.0, 6.0]),
       alpha=st.sampled_from([1e-6, 0.05, 0.3, 1.0]), mode=st.integers(0, 3), seed=st.integers(0, 999))
def test_share_matches_float64(vocab, scale, alpha, mode, seed):
    rng = np.random.default_rng(seed)
    e, a = logits = (rng.normal(size=(2, vocab)) * scale).astype(np.float32)
    alpha = float(np.float32(alpha))
    if np.abs(e - (np.log(alpha) + e.max())).min() < 1e-5 and alpha < 1:
        return  # rounding decides whether a token is inside the cut
    got = strength(logits, mode, alpha=alpha, beta=0.8)[0]
    assert got == pytest.approx(0.8 * share(e, a, alpha, mode), abs=2e-5)
    assert 0 <= got <= np.float32(0.8)


def test_known_values():
    log2 = [[np.log(2), 0, 0, -99], [0, 0, 0, -99]]
    # q = (1/2, 1/4, 1/4): entropy 3/2 bits of log2(3).
    assert strength(log2, ENTROPY, beta=1)[0] == pytest.approx(1.5 / np.log2(3), abs=1e-6)
    # A tie of two tokens: the highest strength of entropy and margin.
    tie = [[5, 5, -9], [5, -9, -9]]
    assert strength(tie, ENTROPY, beta=2)[0] == pytest.approx(2, abs=1e-6)
    assert strength(tie, MARGIN, beta=2)[0] == 2
    # Distributions on different tokens: one bit. Equal distributions: none.
    assert strength([[99, 0, 0], [0, 99, 0]], DIVERGENCE, beta=1)[0] == pytest.approx(1, abs=1e-6)
    assert strength([[3, 1, 2], [4, 2, 3]], DIVERGENCE, beta=1)[0] == pytest.approx(0, abs=1e-7)
    # Half way to the cut: half of beta.
    half = [[0, 0.5 * np.log(0.1), -50], [0, 0, 0]]
    assert strength(half, MARGIN, alpha=0.1, beta=1)[0] == pytest.approx(0.5, abs=1e-6)
    # One token in the cut, or a cut that lets only the favourite through.
    for mode in (ENTROPY, MARGIN):
        assert strength([[9, 0, 0], [0, 0, 9]], mode, alpha=0.5)[0] == 0
    assert strength([[1, 0.9, 0], [0, 0, 9]], MARGIN, alpha=1)[0] == 0


def test_copied_spans_are_left_alone():
    logits = np.zeros((2, 12), np.float32)
    logits[0, 7] = 1.0  # the favourite
    prompt = [[3, 5, 7, 5, 9, 5]]
    options = dict(prompt=prompt, beta=1)
    assert strength(logits, SKIP, previous=5, lengths=6, **options)[0] == 0  # 5 7 stands in the prompt
    assert strength(logits, SKIP, previous=3, lengths=6, **options)[0] == 1  # 3 7 does not
    assert strength(logits, SKIP, previous=-1, lengths=6, **options)[0] == 1
    assert strength(logits, SKIP, previous=5, lengths=2, **options)[0] == 1  # only the first two tokens count
    assert strength(logits, FIXED, previous=5, lengths=6, **options)[0] == 1
    for mode in (ENTROPY, DIVERGENCE, MARGIN):
        assert strength(logits, mode + SKIP, previous=5, lengths=6, **options)[0] == 0
        assert strength(logits, mode + SKIP, previous=7, lengths=6, **options)[0] \
            == strength(logits, mode, previous=7, lengths=6, **options)[0] > 0


def test_requests_without_a_contrast_read_nothing():
    bad = np.full((2, 40), np.nan, np.float32)
    assert strength(bad, [ENTROPY, 77, 0], expert=[-1, 0, -1], amateur=[1, -1, -1], alpha=9,
                    beta=-1).tolist() == [0, 0, 0]
    # Rows that contrastive_select will refuse keep beta, so that its message is the one to be read.
    assert strength(bad, [FIXED, MARGIN, DIVERGENCE], beta=0.5).tolist() == [0.5, 0.5, 0.5]
    assert strength([[1, 2], [np.nan, 0]], DIVERGENCE, beta=0.5)[0] == 0.5


def test_requests_do_not_depend_on_one_another_nor_on_threads():
    rng = np.random.default_rng(2)
    logits = rng.normal(size=(16, 40000)).astype(np.float32) * 4
    inputs = arguments(logits, np.arange(8) % 4, expert=np.arange(8), amateur=np.arange(8) + 8)
    whole = call("contrast_strength", inputs, [((8,), "float32")])[0]
    set_threads(1)
    assert np.array_equal(call("contrast_strength", inputs, [((8,), "float32")])[0], whole)
    set_threads(2)
    for r in (1, 2, 6):
        one = [inputs[0], *(x[r:r + 1] for x in inputs[1:])]
        assert call("contrast_strength", one, [((1,), "float32")])[0][0] == whole[r]


@pytest.mark.parametrize("change, words", [
    (dict(mode=4), ("mode", "4")), (dict(mode=-1), ("mode", "-1")), (dict(mode=16), ("mode", "16")),
    (dict(expert=2), ("mix_rows", "2")), (dict(amateur=-2), ("mix_rows", "-2")),
    (dict(alpha=0), ("alpha", "0")), (dict(alpha=np.nan), ("alpha", "nan")), (dict(beta=-1), ("beta", "-1")),
    (dict(beta=np.inf), ("beta", "inf")), (dict(lengths=2), ("lengths", "2")),
])
def test_bad_arguments_are_refused_before_writing(change, words):
    inputs = arguments(**(dict(logits=np.zeros((2, 3)), mode=1) | change))
    out = np.full(1, 7, np.float32)
    with pytest.raises(Refused) as error:
        call("contrast_strength", inputs, [out])
    assert all(word in str(error.value) for word in ("contrast_strength", *words)), str(error.value)
    assert out[0] == 7


def test_face_and_reference_agree_in_graph_mode():
    rng = np.random.default_rng(1)
    n = 24
    logits = rng.normal(size=(2 * n, 300)).astype(np.float32) * 3
    amateur = np.arange(n) * 2 + 1
    amateur[::7] = -1
    expert = np.arange(n) * 2
    expert[5] = -1
    prompt = rng.integers(0, 300, (n, 9))
    previous = prompt[:, 3].copy()
    prompt[:, 4] = logits[np.arange(n) * 2].argmax(1)  # the favourite follows `previous` in every prompt
    inputs = arguments(logits, np.arange(n) % 4 + SKIP * (np.arange(n) // 4 % 2), expert, amateur,
                       alpha=rng.uniform(0.01, 1, n), beta=rng.uniform(0, 2, n), previous=previous)
    inputs[-2], inputs[-1] = prompt.astype(np.int32), rng.integers(3, 10, n).astype(np.int32)
    tensors = [Tensor(x) for x in inputs]
    got = ms.jit(contrast_strength)(*tensors).asnumpy()
    want = ms.jit(contrast_strength_reference)(*tensors).asnumpy()
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)
    assert (got == 0).sum() > 4 and len(set(got.tolist())) > n // 3
