"""Mixes of several rows, penalties and log-probabilities: the selection's operators against NumPy float64."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import mindspore as ms
from mindspore import Tensor

from call import Refused, call, options, set_threads
from colora_ms.kernels import ABSENT
from colora_ms.kernels.adjust import adjust_logits, adjust_logits_reference
from colora_ms.kernels.details import token_details, token_details_reference
from colora_ms.kernels.options import DETAILS, MOST_ROWS, MOST_TOP
from colora_ms.kernels.select import contrastive_select, contrastive_select_reference

ms.set_context(mode=ms.GRAPH_MODE)
CONTRAST, LOG, PROBABILITY = 0, 1, 2
NONE, LEADING, MIXTURE = 0, 1, 2


def selection(rows, weights=(), whole=None, **real):
    """The four tensors for requests whose rows and weights are lists; scalars count for all."""
    n = len(rows)
    mix_rows, mix_weights = np.full((n, MOST_ROWS), -1, np.int32), np.zeros((n, MOST_ROWS), np.float32)
    for r, (mine, w) in enumerate(zip(rows, weights or [()] * n)):
        mix_rows[r, :len(mine)], mix_weights[r, :len(w)] = mine, w
    return options(dict(budget=np.zeros(n, np.int32), mix_rows=mix_rows, mix_weights=mix_weights, **(whole or {})),
                   real)


def select(logits, tensors, uniform=0.0):
    n = len(tensors[0])
    uniform = np.broadcast_to(np.asarray(uniform, np.float32), (n,)).copy()
    return call("contrastive_select", [logits, *tensors, uniform], [((n, 3), "int32"), ((n, 4), "float32")])


def details(logits, tensors, token):
    n = len(tensors[0])
    return call("token_details", [logits, *tensors, np.asarray(token, np.int32)],
                [((n, MOST_TOP), "int32"), ((n, DETAILS), "float32")])


def log_softmax(x):
    x = np.asarray(x, np.float64)
    away = x - x.max()
    return away - np.log(np.exp(away).sum())


def expected(rows, weights, mixing, cut, alpha):
    """(scores, valid) in float64 from normalised log-probabilities, as the papers write them."""
    logs = [log_softmax(row) for row in rows]
    if mixing == PROBABILITY:
        scores = np.log(sum(w * np.exp(one) for w, one in zip(weights, logs)))
    else:
        scores = sum(w * one for w, one in zip(weights, logs))
    voice = {NONE: None, LEADING: logs[0], MIXTURE: scores}[cut]
    valid = np.ones(len(scores), bool) if voice is None else voice >= np.log(alpha) + voice.max()
    return scores, valid, np.ones(len(scores)) if voice is None else np.abs(voice - np.log(alpha) - voice.max())


@settings(max_examples=80, deadline=None)
@given(vocab=st.sampled_from([1, 2, 17, 255, 257, 1000]), count=st.integers(2, 8),
       mixing=st.sampled_from([LOG, PROBABILITY]), cut=st.sampled_from([NONE, LEADING, MIXTURE]),
       alpha=st.sampled_from([1e-6, 0.1, 0.7, 1.0]), scale=st.sampled_from([0.3, 4.0]), seed=st.integers(0, 999))
def test_scores_and_log_probabilities_match_float64(vocab, count, mixing, cut, alpha, scale, seed):
    rng = np.random.default_rng(seed)
    logits = (rng.normal(size=(count + 1, vocab)) * scale + rng.normal(size=(count + 1, 1)) * 20).astype(np.float32)
    rows = rng.permutation(count + 1)[:count]
    weights = rng.normal(size=count) if mixing == LOG else rng.random(count)
    weights = np.where(rng.random(count) < 0.2, 0, weights).astype(np.float32)
    weights[0] = 0.75
    tensors = selection([rows], [weights], dict(mixing=mixing, cut=cut, logprobs=20, voices=1), alpha=alpha)
    ints, floats = select(logits, tensors)
    token, favourite, found = ints[0]
    scores, valid, margin = expected(logits[rows], weights.astype(np.float64), mixing, cut,
                                     np.float64(np.float32(alpha)))
    unsure = margin < 1e-4
    assert favourite == logits[rows[0]].argmax() and abs(int(found) - int(valid.sum())) <= unsure.sum()
    sure = np.where(valid & ~unsure, scores, -np.inf)
    assert valid[token] or unsure[token]
    assert scores[token] >= sure.max() - 1e-4 * (1 + scale)
    np.testing.assert_allclose(floats[0], [logits[rows[0], token], logits[rows[1], token], floats[0, 2],
                                           logits[rows[0]].max()], rtol=0)
    if mixing == PROBABILITY:
        assert floats[0, 2] == pytest.approx(scores[token], abs=1e-4)
    if unsure.any() and cut != NONE:
        return
    chances = log_softmax(np.where(valid, scores, -np.inf))
    tops, numbers = details(logits, tensors, [token])
    listed = min(20, int(valid.sum()))
    assert (tops[0, listed:] == -1).all() and (numbers[0, 1 + listed:21] == 0).all()
    best = np.sort(chances[valid])[::-1][:listed]
    np.testing.assert_allclose(numbers[0, 1:1 + listed], best, atol=2e-4)
    np.testing.assert_allclose(chances[tops[0, :listed]], numbers[0, 1:1 + listed], atol=2e-4)
    assert numbers[0, 0] == pytest.approx(chances[token], abs=2e-4) and len(set(tops[0, :listed])) == listed
    np.testing.assert_allclose(numbers[0, 21:21 + count], [log_softmax(logits[r])[token] for r in rows], atol=2e-4)
    assert not numbers[0, 21 + count:].any()


@pytest.mark.parametrize("cut", [NONE, LEADING, MIXTURE])
@pytest.mark.parametrize("mixing", [LOG, PROBABILITY])
def test_draws_follow_the_mixture(mixing, cut):
    """Temperature comes behind the mixture."""
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(3, 50)).astype(np.float32)
    n, weights = 4000, [0.5, 0.3, 0.2]
    uniform = ((np.arange(n) + 0.5) / n).astype(np.float32)
    tensors = selection([[2, 0, 1]] * n, [weights] * n, dict(mixing=mixing, cut=cut), alpha=0.2, temperature=0.7)
    tokens = select(logits, tensors, uniform)[0][:, 0]
    scores, valid, _ = expected(logits[[2, 0, 1]], weights, mixing, cut, 0.2)
    p = np.exp(log_softmax(np.where(valid, scores / 0.7, -np.inf)))
    assert np.abs(np.bincount(tokens, minlength=50) / n - p).max() < 1e-3


def test_a_contrast_is_the_mix_of_its_two_weights_bit_for_bit():
    rng = np.random.default_rng(1)
    logits = (rng.normal(size=(2, 3000)) * 3).astype(np.float32)
    for beta in (0.0, 0.5, 0.3, 2.0):
        for temperature in (0.0, 0.8):
            real = dict(alpha=0.05, temperature=temperature, top_p=0.9)
            contrast = selection([[0, 1]], [()], beta=beta, **real)
            weights = np.float32(1) + np.float32(beta), -np.float32(beta)
            mix = selection([[0, 1]], [weights], dict(mixing=LOG, cut=LEADING), **real)
            for a, b in zip(select(logits, contrast, 0.6), select(logits, mix, 0.6)):
                assert np.array_equal(a.view(np.int32), b.view(np.int32))


def test_requests_do_not_depend_on_one_another_nor_on_threads():
    rng = np.random.default_rng(2)
    logits = (rng.normal(size=(24, 5000)) * 3).astype(np.float32)
    rows = np.split(rng.permutation(24), [3, 5, 6, 14, 18, 22])
    n = len(rows)
    tensors = selection(rows, [rng.random(len(one)) for one in rows],
                        dict(mixing=[1, 0, 0, 2, 2, 1, 1], cut=[0, 1, 1, 2, 0, 1, 2], logprobs=[5, -1, 0, 20, 3, 1, -1],
                             voices=[1, 0, 1, 1, 0, 0, 0]),
                        alpha=0.1, beta=0.5, temperature=[0, 1, 0, 1, 0.5, 0, 2])
    uniform = rng.random(n).astype(np.float32)

    def run(tensors, uniform):
        ints, floats = select(logits, tensors, uniform)
        return [ints, floats, *details(logits, tensors, np.ascontiguousarray(ints[:, 0]))]

    whole = run(tensors, uniform)
    for r in range(n):
        one = run([x[r:r + 1] for x in tensors], uniform[r:r + 1])
        assert all(np.array_equal(a[0], b[r]) for a, b in zip(one, whole))
    set_threads(1)
    alone = run(tensors, uniform)
    set_threads(2)
    assert all(np.array_equal(a, b) for a, b in zip(alone, whole))


def test_rows_without_weight_are_not_read():
    logits = np.array([[1, 2, 3], [np.nan] * 3, [3, 1, 0]], np.float32)
    for mixing in (LOG, PROBABILITY):
        tensors = selection([[0, 1, 2]], [[0.5, 0, 0.5]], dict(mixing=mixing, cut=NONE))
        assert select(logits, tensors)[0][0, 0] in (0, 2)


def test_what_the_first_row_rules_out_is_never_taken():
    rng = np.random.default_rng(3)
    logits = rng.normal(size=(3, 40)).astype(np.float32)
    logits[:, 5:] = -np.inf
    for mixing in (LOG, PROBABILITY):
        for cut in (NONE, LEADING, MIXTURE):
            for temperature in (0.0, 50.0):
                tensors = selection([[0, 1, 2]] * 50, [[2, -0.5 if mixing == LOG else 0.5, 0.1]] * 50,
                                    dict(mixing=mixing, cut=cut), alpha=1e-9, temperature=temperature)
                ints = select(logits, tensors, np.linspace(0, 0.9999999, 50))[0]
                assert (ints[:, 0] < 5).all() and (ints[:, 2] == 5).all()
    alone = selection([[0]] * 50, whole={}, temperature=80.0)
    assert (select(logits, alone, np.linspace(0, 0.9999999, 50))[0][:, 0] < 5).all()


BAD = {
    "hole": (dict(rows=[[0, -1, 1]]), ("mix_rows", "behind a -1", "place 1")),
    "row": (dict(rows=[[0, 1, 7]]), ("mix_rows", "7", "place 2", "request 0")),
    "contrast of three": (dict(rows=[[0, 1, 2]], mixing=CONTRAST), ("mix_rows", "3 rows", "2 for a contrast")),
    "mixing": (dict(mixing=3), ("mixing", "3")), "cut": (dict(cut=-1), ("cut", "-1")),
    "weight": (dict(weights=[[1, np.nan, 0]]), ("mix_weights", "nan", "place 1")),
    "negative share": (dict(weights=[[1, -1, 0]], mixing=PROBABILITY), ("mix_weights", "-1", "mean of probabilities")),
    "no weight": (dict(weights=[[0, 0, 0]]), ("mix_weights", "every row")),
    "alpha": (dict(alpha=0.0), ("alpha", "0")), "logprobs": (dict(logprobs=21), ("logprobs", "21")),
    "voices": (dict(voices=2), ("voices", "2")),
    "NaN behind": (dict(logits=[[0, 0], [0, 0], [0, np.nan]]), ("logits", "row 2", "token 1")),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_mixes_are_refused_before_writing(name):
    change, words = BAD[name]
    given_ = dict(rows=[[0, 1, 2]], weights=[[1, 1, 1]], mixing=LOG, cut=LEADING, alpha=0.5, logits=np.zeros((3, 2)),
                  logprobs=-1, voices=0) | change
    tensors = selection(given_["rows"], given_["weights"],
                        {key: given_[key] for key in ("mixing", "cut", "logprobs", "voices")}, alpha=given_["alpha"])
    ints, floats = np.full((1, 3), 7, np.int32), np.full((1, 4), 7, np.float32)
    with pytest.raises(Refused) as error:
        call("contrastive_select", [np.asarray(given_["logits"], np.float32), *tensors, np.zeros(1, np.float32)],
             [ints, floats])
    assert all(word in str(error.value) for word in words), str(error.value)
    assert (ints == 7).all() and (floats == 7).all()


# -- penalties, bias, masks -------------------------------------------------------------------------------------------

def adjustments(random, n, vocab, entries=6):
    """(options by name, per request {token: (times, flags, bias)}, allowed (n, vocab) bool)."""
    told = [{int(t): (int(random.integers(0, 4)), int(random.integers(0, 4)), float(np.float32(random.normal() * 3)))
             for t in random.choice(vocab, random.integers(0, min(entries, vocab) + 1), replace=False)}
            for _ in range(n)]
    whole = dict(min_tokens=random.integers(0, 2, n), masked=random.integers(0, 2, n))
    real = dict(presence_penalty=random.choice([0.0, 0.8], n), frequency_penalty=random.choice([0.0, -0.4], n),
                repetition_penalty=random.choice([1.0, 1.3, 0.8], n))
    return whole, real, told, random.random((n, vocab)) < 0.7


def packed(told, allowed, spare=4):
    """entries, bias, offsets, mask."""
    rows = [(token, count, flags) for one in told for token, (count, flags, _) in sorted(one.items())]
    bias = [b for one in told for _, (_, _, b) in sorted(one.items())]
    bits = np.zeros((len(told), -(-allowed.shape[1] // 32) * 32), np.uint8)
    bits[:, :allowed.shape[1]] = allowed
    return [np.array(rows + [(0, 1, 1)] * spare, np.int32).reshape(-1, 3), np.array(bias + [5.0] * spare, np.float32),
            np.cumsum([0, *map(len, told)]).astype(np.int32),
            np.packbits(bits, axis=1, bitorder="little").view(np.int32)]


def adjusted(row, whole, real, told, allowed, r):
    """One row in float64, by the definitions."""
    found = row.astype(np.float64)
    for token, (count, flags, bias) in told[r].items():
        x = found[token]
        if count or flags & 1:
            x = x * real["repetition_penalty"][r] if x < 0 else x / real["repetition_penalty"][r]
        x -= real["frequency_penalty"][r] * count + real["presence_penalty"][r] * (count > 0) - bias
        found[token] = -np.inf if flags & 2 and whole["min_tokens"][r] else x
    return np.where(allowed[r] | (whole["masked"][r] == 0), found, -np.inf)


@settings(max_examples=60, deadline=None)
@given(vocab=st.sampled_from([1, 5, 31, 32, 33, 64, 100]), n=st.integers(1, 4), seed=st.integers(0, 9999))
def test_adjusted_logits_match_float64(vocab, n, seed):
    random = np.random.default_rng(seed)
    logits = (random.normal(size=(2 * n + 1, vocab)) * 3).astype(np.float32)
    whole, real, told, allowed = adjustments(random, n, vocab)
    order = random.permutation(2 * n + 1)
    rows = [[order[2 * r], order[2 * r + 1]] for r in range(n)]
    tensors = [*selection(rows, [()] * n, whole, alpha=0.5, **real), *packed(told, allowed)]
    found = call("adjust_logits", [logits, *tensors], [(logits.shape, "float32")])[0]
    for r, mine in enumerate(rows):
        for row in mine:
            np.testing.assert_allclose(found[row], adjusted(logits[row], whole, real, told, allowed, r), rtol=1e-5,
                                       atol=1e-5)
    assert np.array_equal(found[order[-1]], logits[order[-1]])


@pytest.mark.parametrize("change, words", [
    (dict(entries=[(3, 0, 0), (3, 0, 0)]), ("entries", "token 3", "place 1")),
    (dict(entries=[(0, 0, 0), (40, 0, 0)]), ("entries", "token 40")), (dict(entries=[(0, -1, 0)]), ("entries", "-1")),
    (dict(entries=[(0, 0, 4)]), ("entries", "(0, 0, 4)")), (dict(bias=[np.nan]), ("bias", "nan", "token 0")),
    (dict(offsets=[0, 2]), ("offsets", "0 to 2")), (dict(repetition_penalty=0.0), ("repetition_penalty", "0")),
    (dict(presence_penalty=np.inf), ("presence_penalty", "inf")), (dict(min_tokens=-1), ("min_tokens", "-1")),
    (dict(masked=2), ("masked", "2")), (dict(masked=1, mask=None), ("mask", "absent", "request 0")),
    (dict(mask=np.zeros((1, 1), np.int32)), ("mask", "a bit a token")),
])
def test_bad_adjustments_are_refused(change, words):
    entries = np.array(change.get("entries", [(0, 0, 0)]), np.int32)
    bias = np.array(change.get("bias", [0.0] * len(entries)), np.float32)
    offsets = np.array(change.get("offsets", [0, len(entries)]), np.int32)
    mask = change.get("mask", np.full((1, 2), -1, np.int32))
    whole = {name: change[name] for name in ("min_tokens", "masked") if name in change}
    real = {name: change[name] for name in ("repetition_penalty", "presence_penalty") if name in change}
    logits = np.zeros((1, 40), np.float32)
    with pytest.raises(Refused) as error:
        call("adjust_logits", [logits, *selection([[0]], whole=whole, **real), entries, bias, offsets, mask],
             [(logits.shape, "float32")])
    assert all(word in str(error.value) for word in ("adjust_logits", *words)), str(error.value)


def test_two_requests_may_share_a_row_that_nobody_adjusts():
    logits = np.zeros((1, 40), np.float32)
    for frequency in (0.0, 0.5):
        tensors = [*selection([[0], [0]], whole={}, frequency_penalty=[0.0, frequency]), None, None, None, None]
        if frequency:
            with pytest.raises(Refused, match="'mix_rows' is 0 in requests 0 and 1"):
                call("adjust_logits", [logits, *tensors], [(logits.shape, "float32")])
        else:
            assert not call("adjust_logits", [logits, *tensors], [(logits.shape, "float32")])[0].any()


def test_faces_and_references_agree_in_graph_mode():
    rng = np.random.default_rng(5)
    n, vocab = 12, 130
    counts = [1, 2, 2, 3, 4, 8, 3, 2, 1, 3, 2, 5]
    logits = (rng.normal(size=(sum(counts), vocab)) * 2).astype(np.float32)
    rows = np.split(rng.permutation(sum(counts)), np.cumsum(counts)[:-1])
    mixing = np.array([0, 0, 1, 2, 1, 2, 1, 2, 0, 1, 0, 2])
    weights = [rng.random(c) if m == 2 else rng.normal(size=c) for c, m in zip(counts, mixing)]
    told_whole, told_real, told, allowed = adjustments(rng, n, vocab)
    allowed[:, 7] = True
    whole = dict(mixing=mixing, cut=[1, 1, 0, 1, 2, 2, 1, 0, 1, 2, 1, 0], logprobs=rng.integers(-1, 21, n),
                 voices=rng.integers(0, 2, n), top_k=rng.integers(0, 4, n), **told_whole)
    real = dict(alpha=rng.uniform(0.01, 0.5, n), beta=rng.uniform(0, 1, n),
                temperature=rng.random(n) * (np.arange(n) % 2), **told_real)
    tensors = [Tensor(x) for x in selection(rows, weights, whole, **real)]
    inactive = tensors[2].asnumpy().copy()
    inactive[8] = -1
    tensors[2] = Tensor(inactive)
    more = [Tensor(x) for x in packed(told, allowed)]
    uniform = Tensor(rng.random(n).astype(np.float32))

    def both(adjust, choose, describe, parts):
        @ms.jit
        def run(logits, tensors, more, uniform):
            new = adjust(logits, *tensors, *more)
            ints, floats = choose(new, *tensors, uniform)
            tops, numbers = describe(new, *tensors, ints[:, 0])
            return new, ints, floats, tops, numbers

        return [x.asnumpy() for x in run(Tensor(logits), tuple(tensors), tuple(parts), uniform)]

    for parts in (more, [ABSENT] * 4):
        if parts is not more:
            whole_now = tensors[0].asnumpy().copy()
            whole_now[:, -1] = 0  # masked
            tensors[0] = Tensor(whole_now)
        got = both(adjust_logits, contrastive_select, token_details, parts)
        want = both(adjust_logits_reference, contrastive_select_reference, token_details_reference, parts)
        assert np.array_equal(got[1], want[1]) and np.array_equal(got[3], want[3])
        for a, b in zip((got[0], got[2], got[4]), (want[0], want[2], want[4])):
            np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)
