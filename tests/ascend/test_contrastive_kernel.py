"""contrastive_select under the strict emulator against NumPy float64 (scoring rule of arXiv 2505.14620, and mixes)."""
import numpy as np
import pytest

from emulated import BYTES, INPUT, OUTPUT, WORKSPACE, plan_contrastive_select, to_dtype, to_float64

DTYPES = ("float16", "bfloat16", "float32")


def launch(emulator, logits, mix_rows, weights, log_alpha, dtype, cores=48, seed=0):
    """((ints, floats), report)."""
    mix_rows = np.ascontiguousarray(mix_rows, np.int32)
    requests, voices = mix_rows.shape
    tiling, workspace = plan_contrastive_select(*logits.shape, requests, voices, dtype, cores)
    ints, floats = np.full((requests, 3), -77, np.int32), np.full((requests, 2 + voices), np.nan, np.float32)
    report = emulator.launch(f"contrastive_select_{dtype}", cores, [
        (logits, INPUT), (mix_rows, INPUT), (np.ascontiguousarray(weights, np.float32), INPUT),
        (np.ascontiguousarray(log_alpha, np.float32), INPUT), (ints, OUTPUT), (floats, OUTPUT), (workspace, WORKSPACE),
        (tiling, INPUT)], seed)
    assert report["findings"] == []
    return (ints, floats), report


def contrast(emulator, expert, amateur, alpha, beta, dtype="float32", **launched):
    """The CoLD rule: rows 0..n-1 are the experts, the rest the amateurs."""
    n, beta = len(expert), np.asarray(beta, np.float32)
    rows = np.stack((np.arange(n), np.arange(n) + n), 1)
    (ints, floats), _ = launch(emulator, np.concatenate((expert, amateur)), rows, np.stack((1 + beta, -beta), 1),
                               np.log(np.asarray(alpha, np.float32)), dtype, **launched)
    return ints[:, 0], floats[:, 0]


def check(results, logits, mix_rows, weights, log_alpha, slack=2e-5):
    """The chosen token is allowed and as good as the best, up to float32 rounding; tokens within rounding of the cut
    may count either way. The scores are those of the token."""
    ints, floats = results
    token, score, row_scores = ints[:, 0], floats[:, 0], floats[:, 2:]
    for q, rows in enumerate(mix_rows):
        if rows[0] < 0:
            assert not ints[q].any() and not floats[q].any()
            continue
        lead = logits[rows[0]]
        used = [(w, logits[r]) for w, r in zip(np.asarray(weights, np.float32)[q].astype(np.float64), rows)
                if r >= 0 and w != 0]
        total = sum((w * row for w, row in used), np.zeros_like(lead))
        size = sum((abs(w) * np.abs(row) for w, row in used), np.ones_like(lead))
        margin = lead - (np.float64(np.float32(log_alpha[q])) + lead.max())
        sure = np.where((margin >= slack) & np.isfinite(lead), total, -np.inf)
        t = token[q]
        assert 0 <= t < len(lead) and margin[t] >= -slack, "a token below the cut was chosen"
        assert total[t] >= sure.max() - slack * (1 + abs(sure.max())), "a better token exists"
        assert abs(score[q] - total[t]) <= 1e-6 * size[t]
        want = np.array([np.float32(logits[r][t]) if r >= 0 else 0 for r in rows])
        assert np.array_equal(row_scores[q], want)
        assert ints[q, 1] == lead.argmax() and floats[q, 1] == lead.max()
        alone, known = len(rows) == 1 or rows[1] < 0, np.isfinite(lead)
        least, most = ((margin >= side) & known for side in (slack, -slack))
        assert ints[q, 2] == len(lead) if alone else least.sum() <= ints[q, 2] <= most.sum()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("requests,voices,vocab", [(1, 2, 49152), (1, 1, 262144), (4, 2, 151936), (3, 8, 32000),
                                                   (16, 3, 32000), (50, 2, 5000), (7, 2, 1), (2, 4, 63), (5, 2, 1025),
                                                   (0, 2, 100)])
def test_against_numpy(emulator, dtype, requests, voices, vocab):
    rng = np.random.default_rng([requests, voices, vocab])
    logits = to_dtype(rng.standard_normal((max(requests * voices, 1), vocab)) * 3, dtype)
    rows = rng.permutation(requests * voices).reshape(requests, voices)
    weights = rng.uniform(-1, 2, (requests, voices)).astype(np.float32)
    log_alpha = np.log(rng.uniform(0.01, 1, requests)).astype(np.float32)
    if requests > 2:
        rows[1, 1:] = -1                      # a row alone
        rows[2], weights[2] = -1, 0           # inactive
        weights[0, -1], log_alpha[0] = 0.0, -np.inf
    results, _ = launch(emulator, logits, rows, weights, log_alpha, dtype, cores=(48, 40)[vocab % 2])
    check(results, to_float64(logits, dtype), rows, weights, log_alpha)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("requests", (1, 4, 8, 16))
def test_every_logit_is_read_once(emulator, dtype, requests):
    """A vocabulary of 152k; float32 logits of 16 requests do not fit (50,688 a core): their leading rows are read
    twice."""
    vocab, rng = 151936, np.random.default_rng(0)
    logits = to_dtype(rng.standard_normal((2 * requests, vocab), np.float32), dtype)
    rows = np.arange(2 * requests).reshape(requests, 2)
    weights = np.tile([1.5, -0.5], (requests, 1))
    _, report = launch(emulator, logits, rows, weights, np.full(requests, -2.3), dtype)
    read = report["buffers"][0]["in"] - 2 * requests * BYTES[dtype]  # the token's logits in the end
    assert read == logits.nbytes * (1.5 if (dtype, requests) == ("float32", 16) else 1)
    assert report["cores_used"] >= 40


def test_vectors_of_the_paper_notes(emulator):
    """The worked example: greedy gives 0, the contrast gives 1; alpha = 1 and beta = 0 give 0."""
    expert = np.tile(np.array([2.0, 1.5, 0.5, -1.0], np.float32), (4, 1))
    amateur = np.tile(np.array([2.5, 0.2, 0.4, -1.0], np.float32), (4, 1))
    token, _ = contrast(emulator, expert, amateur, [0.5, 1.0, 0.5, 1.0], [0.5, 0.5, 0.0, 9.0])
    assert token.tolist() == [1, 0, 0, 0]


def test_ties_go_to_the_smallest_token(emulator):
    """Within a repeat, across tiles, across cores."""
    for vocab in (100, 30000, 262144):
        expert = np.zeros((3, vocab), np.float32)
        expert[1, [vocab - 1, vocab // 2, vocab // 3]] = 4.0
        expert[2, [vocab - 1, 70]] = 4.0
        token, _ = contrast(emulator, expert, np.zeros_like(expert), [0.1] * 3, [0.5] * 3)
        assert token.tolist() == [0, vocab // 3, 70]


def test_a_row_of_weight_0_does_not_matter(emulator):
    rng = np.random.default_rng(0)
    expert = rng.standard_normal((5, 9000)).astype(np.float32)
    token, _ = contrast(emulator, expert, np.full_like(expert, -np.inf), [0.1] * 5, [0.0] * 5)
    assert np.array_equal(token, expert.argmax(1))
    # the leading row too: it cuts, and its infinities take tokens away, but adds nothing
    logits = np.concatenate((expert, expert[::-1]))
    logits[:5, :4000] = -np.inf
    rows = np.stack((np.arange(5), np.arange(5) + 5), 1)
    (ints, floats), _ = launch(emulator, logits, rows, np.tile([0.0, 1.0], (5, 1)), np.full(5, -np.inf), "float32")
    assert np.array_equal(ints[:, 0], 4000 + expert[::-1, 4000:].argmax(1)) and (ints[:, 2] == 5000).all()
    assert np.array_equal(floats[:, 0], expert[::-1, 4000:].max(1))


def test_alpha_one_is_the_leading_row_s_choice(emulator):
    rng = np.random.default_rng(1)
    expert = rng.standard_normal((5, 9000)).astype(np.float32)
    token, _ = contrast(emulator, expert, expert[::-1].copy(), [1.0] * 5, [0.8] * 5)
    assert np.array_equal(token, expert.argmax(1))


def test_infinities(emulator):
    """Logits of -inf are never taken; nothing finite gives token 0; infinities of both signs are no number."""
    rng = np.random.default_rng(2)
    expert, amateur = rng.standard_normal((2, 4, 3000)).astype(np.float32)
    token, score = contrast(emulator, np.full_like(expert, -np.inf), amateur, [0.3] * 4, [0.5] * 4)
    assert token.tolist() == [0, 0, 0, 0] and np.isneginf(score).all()
    expert[:, 1:], amateur[:, 5:] = -np.inf, -np.inf
    assert contrast(emulator, expert, amateur, [0.3] * 4, [0.5] * 4)[0].tolist() == [0, 0, 0, 0]
    logits = rng.standard_normal((3, 500)).astype(np.float32)
    logits[1:, 100:] = -np.inf
    (ints, floats), _ = launch(emulator, logits, [[0, 1, 2]], [[1.0, 1.0, -1.0]], [-np.inf], "float32")
    total = logits[0, :100].astype(np.float64) + logits[1, :100] - logits[2, :100]
    assert ints[0].tolist() == [total.argmax(), logits[0].argmax(), 100] and abs(floats[0, 0] - total.max()) < 1e-5


@pytest.mark.parametrize("cores", (1, 7, 40, 48))
def test_any_number_of_cores(emulator, cores):
    rng = np.random.default_rng(3)
    logits = rng.standard_normal((12, 20000)).astype(np.float32)
    rows, weights = np.arange(12).reshape(6, 2), np.tile([1.5, -0.5], (6, 1))
    log_alpha = np.full(6, np.log(0.2), np.float32)
    results, _ = launch(emulator, logits, rows, weights, log_alpha, "float32", cores, seed=cores)
    check(results, logits.astype(np.float64), rows, weights, log_alpha)
