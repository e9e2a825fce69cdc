"""contrastive_select: the rule of Contrastive LoRA Decoding and sampling, against NumPy float64."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import mindspore as ms
from mindspore import Tensor, ops

from call import Refused, call, options, set_threads
from colora_ms.kernels import backend
from colora_ms.kernels.select import contrastive_select, contrastive_select_reference

ms.set_context(mode=ms.GRAPH_MODE)


def arguments(logits, expert, amateur, alpha=0.1, beta=0.5, temperature=0.0, top_k=0, top_p=1.0, uniform=0.0,
              min_p=0.0):
    """The operator's inputs; numbers are spread over the requests."""
    expert = np.atleast_1d(np.asarray(expert, np.int32))
    real = dict(alpha=alpha, beta=beta, temperature=temperature, top_p=top_p, min_p=min_p)
    uniform = np.broadcast_to(np.asarray(uniform, np.float32), expert.shape).copy()
    return [np.asarray(logits, np.float32), *options(dict(expert_rows=expert, amateur_rows=amateur, top_k=top_k), real),
            uniform]


def select(*given_, **named):
    inputs = arguments(*given_, **named)
    n = len(inputs[1])
    return call("contrastive_select", inputs, [((n, 3), "int32"), ((n, 4), "float32")])


def expected(e, a, alpha, beta, temperature, top_k, top_p, uniform, min_p=0.0):
    """One request in float64 -> (token, valid tokens, scores, distance of the draw to the nearest border)."""
    e = e.astype(np.float64)
    valid = np.ones(len(e), bool) if a is None else e >= math.log(alpha) + e.max()
    scores = e if a is None else np.where(valid, (1 + beta) * e - beta * a.astype(np.float64), -np.inf)
    if temperature == 0:
        return int(scores.argmax()), int(valid.sum()), scores, 1.0
    order = [i for i in np.lexsort((np.arange(len(e)), -scores)) if valid[i]]
    if top_k:
        order = order[:top_k]
    mass = np.exp((scores[order] - scores[order[0]]) / temperature)
    mass /= mass.sum()
    margin = 1.0
    if top_p < 1:
        count = int((np.cumsum(mass) < top_p).sum()) + 1
        margin = min(margin, np.abs(np.cumsum(mass) - top_p).min())
        mass = mass[:count] / mass[:count].sum()
    if min_p > 0:
        shares = mass / mass[0]
        margin = min(margin, np.abs(shares[1:] - min_p).min(initial=1.0))
        mass = mass[shares >= min_p] / mass[shares >= min_p].sum()
    borders = np.cumsum(mass)
    margin = min(margin, np.abs(borders - uniform).min())
    return int(order[min(int((borders <= uniform).sum()), len(mass) - 1)]), int(valid.sum()), scores, margin


def test_the_vectors_of_the_specification():
    e, a = [2.0, 1.5, 0.5, -1.0], [2.5, 0.2, 0.4, -1.0]
    ints, floats = select([e, a], 0, 1, alpha=0.5, beta=0.5)
    assert ints.tolist() == [[1, 0, 2]]
    np.testing.assert_allclose(floats, [[1.5, 0.2, 2.15, 2.0]], rtol=1e-6)
    for beta in (0.0, 0.5, 100.0):
        assert select([e, a], 0, 1, alpha=1.0, beta=beta)[0].tolist() == [[0, 0, 1]]
    assert select([e, a], 0, 1, alpha=0.5, beta=0.0)[0][0, 0] == 0
    assert select([e, e], 0, 1, alpha=0.5, beta=0.5)[0][0, 0] == 0


@settings(max_examples=40, deadline=None)
@given(vocab=st.sampled_from([1, 2, 7, 31, 32, 255, 256, 257, 1000, 4097]), scale=st.sampled_from([0.1, 1.0, 8.0]),
       alpha=st.sampled_from([1e-30, 0.01, 0.1, 0.9, 1.0]), beta=st.sampled_from([0.0, 0.5, 2.0]),
       temperature=st.sampled_from([0.0, 0.3, 1.0, 5.0]), top_k=st.sampled_from([0, 1, 3, 50, 10 ** 6]),
       top_p=st.sampled_from([1.0, 0.9, 0.3, 1e-6]), min_p=st.sampled_from([0.0, 1e-6, 0.05, 0.5, 1.0]),
       contrast=st.booleans(), seed=st.integers(0, 999))
def test_choice_matches_float64(vocab, scale, alpha, beta, temperature, top_k, top_p, min_p, contrast, seed):
    rng = np.random.default_rng(seed)
    logits = (rng.normal(size=(3, vocab)) * scale).astype(np.float32)
    uniform = np.float32(rng.random() * 0.999)
    ints, floats = select(logits, 2, 0 if contrast else -1, alpha, beta, temperature, top_k, top_p, uniform, min_p)
    e, a = logits[2], logits[0] if contrast else None
    token, valid, scores, margin = expected(e, a, np.float64(np.float32(alpha)), beta,
                                            np.float64(np.float32(temperature)), top_k,
                                            np.float64(np.float32(top_p)), float(uniform), float(np.float32(min_p)))
    got = int(ints[0, 0])
    if margin > 1e-5:  # away from a border of the draw, where float32 rounding decides
        assert scores[got] == pytest.approx(scores[token], abs=1e-5 * scale * (1 + 2 * beta))
    assert ints[0, 1] == e.argmax()
    assert abs(int(ints[0, 2]) - valid) <= (np.abs(e - (math.log(alpha) + e.max())) < 1e-5).sum()
    np.testing.assert_allclose(floats[0], [e[got], a[got] if contrast else 0, scores[got], e.max()], rtol=1e-5,
                               atol=1e-5)


@settings(max_examples=20, deadline=None)
@given(vocab=st.integers(1, 300), beta=st.sampled_from([0.0, 0.5, 3.0]), seed=st.integers(0, 999))
def test_identities(vocab, beta, seed):
    rng = np.random.default_rng(seed)
    logits = rng.normal(size=(2, vocab)).astype(np.float32)
    e, a = logits
    best = int(e.argmax())
    assert select(logits, 0, 1, alpha=1.0, beta=beta)[0][0, 0] == best
    assert select(logits, 0, 1, alpha=0.1, beta=0.0)[0][0, 0] == best
    assert select([e, e], 0, 1, alpha=0.1, beta=beta)[0][0, 0] == best
    assert select([e, e], 0, 0, alpha=0.1, beta=beta)[0][0, 0] == best
    # Without a mask the rule is classifier-free guidance.
    tiny = select(logits, 0, 1, alpha=1e-37, beta=beta)[0][0]
    assert tiny[2] == vocab
    guided = np.float32(1 + beta) * e - np.float32(beta) * a
    assert tiny[0] == (guided if beta else e).argmax()
    # Sampling with top_k = 1, or a tiny top_p, is argmax.
    greedy = select(logits, 0, 1, alpha=0.1, beta=beta)[0][0, 0]
    assert select(logits, 0, 1, 0.1, beta, temperature=2.0, top_k=1, uniform=0.99)[0][0, 0] == greedy
    assert select(logits, 0, 1, 0.1, beta, temperature=2.0, top_p=1e-6, uniform=0.99)[0][0, 0] == greedy
    assert select(logits, 0, 1, 0.1, beta, temperature=2.0, min_p=1.0, uniform=0.0)[0][0, 0] == greedy


def test_ties_go_to_the_smallest_index():
    logits = np.zeros((1, 600), np.float32)
    logits[0, [77, 300, 599]] = 5
    assert select(logits, 0, -1)[0].tolist() == [[77, 77, 600]]
    assert select(logits, 0, 0, alpha=0.5)[0].tolist() == [[77, 77, 3]]
    picks = [int(select(logits, 0, 0, 0.5, temperature=1.0, uniform=u)[0][0, 0])
             for u in (0, 0.3, 0.34, 0.6, 0.67, 0.99)]
    assert picks == [77, 77, 300, 300, 599, 599]
    assert int(select(logits, 0, 0, 0.5, temperature=1.0, top_k=2, uniform=0.99)[0][0, 0]) == 300


def test_a_token_exactly_at_the_cut_stays():
    cut = np.float32(np.log(np.float32(0.5))) + np.float32(3.0)
    logits = [[3.0, cut, np.nextafter(cut, np.float32(-9))], [9.0, 0.0, -99.0]]
    assert select(logits, 0, 1, alpha=0.5, beta=1.0)[0].tolist() == [[1, 0, 2]]


def test_draws_follow_the_distribution():
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(1, 50)).astype(np.float32)
    uniform = ((np.arange(4000) + 0.5) / 4000).astype(np.float32)
    tokens = select(logits, np.zeros(4000), -1, temperature=0.7, uniform=uniform)[0][:, 0]
    share = np.bincount(tokens, minlength=50) / 4000
    p = np.exp(logits[0].astype(np.float64) / 0.7)
    assert np.abs(share - p / p.sum()).max() < 1e-3


def test_a_draw_that_reaches_the_tail_of_tiny_weights():
    logits = np.zeros((1, 5001), np.float32)
    logits[0, 1234] = 10  # the others: e^-10 each, together 18 % of the mass
    for uniform in (0.5, 0.9, 0.999):
        token = expected(logits[0], None, 1, 0, 1.0, 0, 1.0, uniform)[0]
        assert (token == 1234) == (uniform < 0.8)
        got = select(logits, 0, -1, temperature=1.0, uniform=uniform)[0][0, 0]
        assert abs(int(got) - token) <= 1
    assert select(logits, 0, -1, temperature=1.0, top_p=0.9, uniform=0.99)[0][0, 0] < 2700
    assert select(logits, 0, -1, temperature=1.0, top_k=3, uniform=0.99999)[0][0, 0] == 1
    assert select(logits, 0, -1, temperature=1.0, min_p=0.01, uniform=0.99999)[0][0, 0] == 1234
    assert select(logits, 0, -1, temperature=1.0, min_p=1e-9, uniform=0.99999)[0][0, 0] > 2700
    assert select(logits, 0, -1, temperature=1.0, top_k=3, uniform=0.5)[0][0, 0] == 1234


def test_requests_do_not_depend_on_one_another_nor_on_threads():
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(14, 5000)).astype(np.float32) * 3
    inputs = arguments(logits, rng.permutation(14)[:7], rng.permutation(14)[:7], temperature=[0, 1, 0, 2, 0.5, 0, 1],
                       top_k=[0, 5, 0, 0, 90, 0, 0], top_p=[1, 1, 1, 0.9, 0.5, 1, 1], uniform=rng.random(7))
    outputs = [((7, 3), "int32"), ((7, 4), "float32")]
    whole = call("contrastive_select", inputs, outputs)
    for r in range(7):
        one = call("contrastive_select", inputs[:1] + [x[r:r + 1] for x in inputs[1:]],
                   [((1, 3), "int32"), ((1, 4), "float32")])
        assert np.array_equal(one[0][0], whole[0][r]) and np.array_equal(one[1][0], whole[1][r])
    set_threads(1)
    alone = call("contrastive_select", inputs, outputs)
    set_threads(2)
    assert all(np.array_equal(x, y) for x, y in zip(alone, whole))


def test_inactive_requests_read_nothing():
    logits = np.full((2, 40), np.nan, np.float32)
    ints, floats = select(logits, [-1, -1], [7, -9], alpha=5, beta=-1, temperature=np.nan)
    assert not ints.any() and not floats.any()


def test_beta_zero_and_the_mask_keep_the_amateur_out():
    e, bad = [2.0, 1.9, -50.0], [0.0, -np.inf, np.nan]
    assert select([e, bad], 0, 1, alpha=0.5, beta=0.0)[0].tolist() == [[0, 0, 2]]
    assert select([e, [0.0, 1.0, np.nan]], 0, 1, alpha=0.5, beta=0.5)[0][0, 0] == 0  # NaN only outside the mask


BAD = {
    "NaN in the expert": (dict(logits=[[0, np.nan, 1], [0, 0, 0]]), ("logits", "NaN", "row 0", "request 0")),
    "infinity in the expert": (dict(logits=[[0, np.inf, 1], [0, 0, 0]]), ("logits", "infinity", "row 0")),
    "no finite logit": (dict(logits=[[-np.inf] * 3, [0, 0, 0]]), ("logits", "-infinity", "row 0")),
    "NaN in the amateur": (dict(logits=[[0, 0, 0], [0, np.nan, 0]]), ("logits", "row 1", "token 1")),
    "expert row": (dict(expert=2), ("mix_rows", "2", "request 0", "0 to 1")),
    "negative expert row": (dict(expert=-2), ("mix_rows", "-2")),
    "amateur row": (dict(amateur=2), ("mix_rows", "2", "place 1")),
    "alpha 0": (dict(alpha=0), ("alpha", "0", "(0, 1]")),
    "alpha above 1": (dict(alpha=1.5), ("alpha", "1.5")),
    "alpha NaN": (dict(alpha=np.nan), ("alpha", "nan")),
    "beta": (dict(beta=-0.5), ("beta", "-0.5")),
    "beta infinite": (dict(beta=np.inf), ("beta", "inf")),
    "temperature": (dict(temperature=-1), ("temperature", "-1")),
    "top_k": (dict(temperature=1, top_k=-3), ("top_k", "-3")),
    "top_p": (dict(temperature=1, top_p=0), ("top_p", "0")),
    "min_p": (dict(temperature=1, min_p=1.5), ("min_p", "1.5", "[0, 1]")),
    "min_p NaN": (dict(temperature=1, min_p=np.nan), ("min_p", "nan")),
    "uniform": (dict(temperature=1, uniform=1), ("uniform", "1", "[0, 1)")),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_arguments_are_refused_before_writing(name):
    change, words = BAD[name]
    inputs = arguments(**(dict(logits=np.zeros((2, 3)), expert=0, amateur=1) | change))
    ints, floats = np.full((1, 3), 7, np.int32), np.full((1, 4), 7, np.float32)
    with pytest.raises(Refused) as error:
        call("contrastive_select", inputs, [ints, floats])
    assert all(word in str(error.value) for word in ("contrastive_select", *words)), str(error.value)
    assert (ints == 7).all() and (floats == 7).all()


def test_face_and_reference_agree_in_graph_mode():
    rng = np.random.default_rng(1)
    n = 24
    logits = rng.normal(size=(2 * n, 700)).astype(np.float32) * 3
    amateur = np.arange(n) * 2 + 1
    amateur[::5] = -1
    expert = np.arange(n) * 2
    expert[7] = -1
    inputs = arguments(logits, expert, amateur, alpha=rng.uniform(0.01, 1, n), beta=rng.uniform(0, 2, n),
                       temperature=rng.uniform(0, 2, n) * (np.arange(n) % 2), top_k=rng.integers(0, 9, n),
                       top_p=rng.uniform(0.2, 1, n), min_p=rng.uniform(0, 0.3, n) * (np.arange(n) % 3),
                       uniform=rng.uniform(0, 1, n))
    tensors = [Tensor(x) for x in inputs]
    got = [x.asnumpy() for x in ms.jit(contrastive_select)(*tensors)]
    want = [x.asnumpy() for x in ms.jit(contrastive_select_reference)(*tensors)]
    assert np.array_equal(got[0], want[0])
    np.testing.assert_allclose(got[1], want[1], rtol=1e-5, atol=1e-6)
    assert len(set(got[0][:, 0].tolist())) > n // 2


def test_gradients_are_refused():
    if backend() != "cpu":
        pytest.skip("needs the compiled CPU library")
    rest = [Tensor(x) for x in arguments(np.zeros((2, 3)), 0, 1)[1:]]

    @ms.jit
    def gradient(logits):
        return ops.grad(lambda x: contrastive_select(x, *rest)[1].sum())(logits)

    with pytest.raises(RuntimeError, match="contrastive_select has no gradient"):
        gradient(Tensor(np.zeros((2, 3), np.float32)))
